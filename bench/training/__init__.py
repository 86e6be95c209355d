"""Training runs: jobs of the trainer, and the rows of the paper's table."""
