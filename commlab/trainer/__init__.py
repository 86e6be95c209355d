"""The trainer: the program behind ``python -m commlab.train``."""
