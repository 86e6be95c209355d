"""Gradients on their way: buckets, and how a number travels."""
