"""Precision: what the model is computed in, and what keeps 16-bit gradients in range."""
