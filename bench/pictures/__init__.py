"""Pictures drawn from result files and traces. Only the modules that draw import matplotlib."""

from __future__ import annotations


def needs_matplotlib(error: ImportError) -> str:
    """What a command answers whose pictures cannot be drawn here."""
    return f"pictures need matplotlib: pip install matplotlib ({error})"
