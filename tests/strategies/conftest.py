"""What tests of engines share: the three ranks of :mod:`coupled`, which are threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from coupled import SIZE
from crew import Crew


@pytest.fixture
def crew() -> Iterator[Crew]:
    """A crew for one test: a rank that a failure has left waiting is in no other test's way."""
    made = Crew(SIZE)
    yield made
    made.close()
