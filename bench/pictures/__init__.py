"""Figures drawn from results."""
