"""Why a command of bench ends without having done its work."""

from __future__ import annotations


class BenchError(RuntimeError):
    """A command cannot do its work here; the message says why, and the command ends with exit code 2."""
