"""What tests of Horovod's API share: ranks that are forked from a process that has imported it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from forked import Forked


@pytest.fixture(scope="session")
def forked() -> Iterator[Callable[..., list[Any]]]:
    """Runs a function on the ranks of a job that calls ``hvd.init()`` itself; see :class:`forked.Forked`."""
    made = Forked()
    yield partial(made, backend=None, preload=("commlab.horovod.torch",))
    made.close()
