"""Horovod's own tests of its PyTorch API with commlab in its place: ``mpirun -n P python horovod_suite.py CHECKOUT``.

CHECKOUT: the sources of Horovod, of which ``test/parallel/test_torch.py`` is run. Each rank runs pytest; rank 0 prints.
``--without-muon``: tests that take every optimizer of torch do not know that Muon wants matrices. ``--anew``: init()
and shutdown() for every test. Exit code: pytest's, the worst of rank 0.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))


def _rank_and_size() -> tuple[int, int]:
    from commlab.job.launch import detect

    launch = detect()
    return launch.rank, launch.size


def _skipped(test: Any, message: str) -> None:
    test.skipTest(message)


@contextmanager
def _path() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield str(Path(folder) / "file")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--without-muon", action="store_true")
    parser.add_argument("--anew", action="store_true")
    arguments, more = parser.parse_known_args()
    import torch

    import commlab.horovod

    commlab.horovod.replace()
    torch.set_num_threads(1)
    if arguments.without_muon and hasattr(torch.optim, "Muon"):
        torch.optim.Muon.__module__ = "elsewhere"  # type: ignore[attr-defined]
    rank, size = _rank_and_size()
    if arguments.anew:
        os.environ["HOROVOD_RANK"], os.environ["HOROVOD_SIZE"] = str(rank), str(size)
    # What the tests take of Horovod's helpers, which need its launcher.
    common: Any = ModuleType("common")
    common.mpi_env_rank_and_size, common.skip_or_fail_gpu_test, common.temppath = _rank_and_size, _skipped, _path
    sys.modules["common"] = common
    if rank:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
    file = arguments.checkout / "test/parallel/test_torch.py"
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", f"--rootdir={arguments.checkout}"]
    code = int(pytest.main([*options, "-rs", str(file), *more]))
    sys.stdout.flush()
    # A test that fails on one rank leaves the others waiting: nobody waits for them here.
    os._exit(code)


if __name__ == "__main__":
    main()
