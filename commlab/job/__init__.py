"""The job: how it was launched, which ranks share a node, and what this machine has."""
