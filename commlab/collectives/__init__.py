"""Collectives: the operations on tensors, by whichever route suits the call."""
