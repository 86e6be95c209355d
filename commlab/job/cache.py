"""The user's cache: things that take long to make, and that any later job of the same user can use again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(of: str) -> Path:
    """The folder for things of one kind, below $XDG_CACHE_HOME or ~/.cache. The first writer makes the folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "commlab", of)
