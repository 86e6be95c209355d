"""Training runs as rows of a table."""
