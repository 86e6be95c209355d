from __future__ import annotations

from collections.abc import Iterator

import pytest
from forked import Forked


@pytest.fixture(scope="session")
def forked() -> Iterator[Forked]:
    """Runs a function on the ranks of a job; see :class:`forked.Forked`."""
    ranks = Forked()
    yield ranks
    ranks.close()
