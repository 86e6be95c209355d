"""What all tests share. ``pythonpath`` in pyproject.toml lets them import the modules of ``tests/helpers``."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Under mpirun there are no property tests (ranks might draw different examples), and importing hypothesis takes
    # each of the ranks a second.
    if not config.getoption("--with-mpi", default=False):
        from hypothesis import settings

        # A test must not depend on how busy the machine is, nor on what an earlier run has found.
        settings.register_profile("commlab", derandomize=True, deadline=None, database=None)
        settings.load_profile("commlab")
