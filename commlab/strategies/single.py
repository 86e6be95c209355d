"""``single``: one rank, nothing is sent. What the others are measured against, and must agree with."""

from __future__ import annotations

from .external import Local


class Single(Local):
    """Backward, clip and step in one process."""

    name = "single"
