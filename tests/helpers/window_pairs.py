"""The window of a node's two ranks, made by hand in one process, and what a process holds of windows."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from bits import needs_native

from commlab.window.memory import Window

by_hand = [
    pytest.mark.usefixtures("small_heap", "nothing_is_left_behind"),
    needs_native,
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the window needs Linux"),
]
"""The marks of tests that make windows by hand."""


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    """Parts of windows that this process has mapped."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:commlab")


def pair() -> tuple[Window, Window]:
    """Both ranks of a node in one process: each opens the other's part as any process would."""
    windows = Window(0, 2), Window(1, 2)
    cards = [window.card() for window in windows]
    for window in windows:
        window.open(cards, 0.0)
    for window in windows:
        window.make_staging()
    return windows


def closed(*windows: Window) -> None:
    for window in windows:
        window.close()
