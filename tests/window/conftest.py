"""What tests of windows share: that a test leaves nothing behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from window_pairs import descriptors, mappings


@pytest.fixture
def nothing_is_left_behind() -> Iterator[None]:
    """No descriptor and no mapping of a window more than before the test."""
    before = descriptors(), mappings()
    yield
    gc.collect()
    assert (descriptors(), mappings()) == before
