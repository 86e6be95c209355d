"""The runtime: groups of ranks, and what moves their operations on."""
