"""Transports: how bytes move between two ranks. The table of names is in ``commlab.runtime.world``."""
