"""The window: memory that the ranks of a node share. Nobody sends there, everyone reads."""
