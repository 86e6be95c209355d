"""``python tests/helpers/torch_suite.py RANKS [WORDS]``: torch's own tests of torch.distributed, with commlab's groups
under gloo's name.

They are in torch's wheel (``torch.testing._internal``) and want ``expecttest``. Ranks are forked: 285 tests that
each import torch anew would take an hour. WORDS: only tests whose names have one of them. ``--plain``: gloo itself.
``--own-name``: the backend is ``"commlab"``, and tests that torch keeps for gloo, NCCL or MPI are skipped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


def load(backend: str, plain: bool = False) -> Any:
    """The test case of torch, on whose ranks ``backend`` means commlab, or (``plain``) what it means to torch."""
    import torch.testing._internal.common_distributed as common

    if backend == "commlab":
        # Where torch's tests look up what a backend of another's making can do, as they are defined.
        for feature in ("ddp", "subgroup"):
            common.DistTestCases.backend_feature[feature].add(backend)
    import torch.testing._internal.distributed.distributed_test as distributed

    import commlab.c10d

    if backend == "commlab":
        commlab.c10d.register()
    elif not plain:
        commlab.c10d.replace_gloo()

    def fork_processes(self: Any) -> None:
        self._start_processes(multiprocessing.get_context("fork").Process)

    common.MultiProcessTestCase._spawn_processes = fork_processes  # type: ignore[method-assign]

    class OnCommlab(distributed.TestDistBackend, distributed.DistributedTest._DistTestBase):  # type: ignore[misc]
        def setUp(self) -> None:
            super().setUp()
            self._spawn_processes()

    return OnCommlab


def prepare(backend: str, ranks: str, limit_s: int | None = None) -> None:
    """Set what torch's tests read from the environment, some of it when they are imported."""
    variables = {"BACKEND": backend, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    os.environ |= {**variables, "INIT_METHOD": "", "TEMP_DIR": tempfile.mkdtemp()}
    if limit_s is not None:
        os.environ["DISTRIBUTED_TESTS_DEFAULT_TIMEOUT"] = str(limit_s)
    import torch

    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ranks")
    parser.add_argument("words", nargs="*")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--own-name", action="store_true")
    asked = parser.parse_intermixed_args()
    backend = "commlab" if asked.own_name else "gloo"
    prepare(backend, asked.ranks)
    try:
        case = load(backend, asked.plain)
    except ImportError as error:
        print(f"torch's tests are not at hand here ({error}): nothing was tested")
        return 0
    names = unittest.TestLoader().getTestCaseNames(case)
    found = [name for name in names if not asked.words or any(word in name for word in asked.words)]
    started_s = time.monotonic()
    result = unittest.TextTestRunner(verbosity=2).run(unittest.TestSuite(case(name) for name in found))
    failed = result.failures + result.errors
    passed = result.testsRun - len(result.skipped) - len(failed)
    print(f'{asked.ranks} ranks as "{backend}": {passed} passed, {len(result.skipped)} skipped, {len(failed)} failed')
    print(f"{time.monotonic() - started_s:.0f} s")
    for test, _ in failed:
        print(f"failed: {test}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
