"""The user's cache: things that take long to make, and that any later job of the same user can use again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder(of: str) -> Path:
    """The folder for things of one kind, below $XDG_CACHE_HOME or ~/.cache; of a user without a home, below the folder
    for temporary files. The first writer makes the folder, and it may be that nobody can."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        base = Path(tempfile.gettempdir(), f"commlab-cache-{os.getuid()}")
    return Path(base, "commlab", of)
