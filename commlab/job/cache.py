"""Where things are kept that take long to make, and that any run of the same user can use again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(of: str) -> Path:
    """A folder for things of one kind; made by whoever writes there. $XDG_CACHE_HOME or ~/.cache holds it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "commlab", of)
