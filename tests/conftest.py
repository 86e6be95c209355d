"""What all tests share. ``pythonpath`` in pyproject.toml lets them import the modules of ``tests/helpers``."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before any test imports them: an assertion that fails in a helper shows its operands, as one in a test does.
pytest.register_assert_rewrite(*(helper.stem for helper in (Path(__file__).parent / "helpers").glob("*.py")))

# The processes of test-serial have a core each. A second thread of torch's would wait by spinning for a core that the
# other process has: the tests of the pack then took three times the CPU. Set before torch is imported, which reads it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--examples", action="store_true", help="run every script of docs/examples, the slow ones too")
    parser.addoption("--slurm", action="store_true", help="run the script for Slurm under a real one")


def pytest_configure(config: pytest.Config) -> None:
    # A warning is a fault, wherever it comes from; -W on the command line comes after this line, and wins.
    config.addinivalue_line("filterwarnings", "error")
    # Under mpirun there are no property tests (ranks might draw different examples), and importing hypothesis takes
    # each of the ranks a second.
    if not config.getoption("--with-mpi", default=False):
        from hypothesis import settings

        # A test must not depend on how busy the machine is, nor on what an earlier run has found.
        settings.register_profile("commlab", derandomize=True, deadline=None, database=None)
        settings.load_profile("commlab")


@pytest.fixture(scope="session")
def forked() -> Iterator[Any]:
    """Runs a function on the ranks of a job of torch.distributed; see :class:`forked.Forked`."""
    from forked import Forked

    ranks = Forked()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def small_heap() -> Iterator[None]:
    """For modules that collect garbage again and again to see what is left: only what their tests made is looked at.

    Everything that has been imported by then is a million objects, and going through them takes half a second.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
