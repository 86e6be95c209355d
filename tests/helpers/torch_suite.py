"""``python tests/helpers/torch_suite.py RANKS [WORDS]``: torch's own tests of torch.distributed, with commlab's groups
under gloo's name.

They are in torch's wheel (``torch.testing._internal``) and want ``expecttest``. Ranks are forked: 285 tests that
each import torch anew would take an hour. WORDS: only tests whose names have one of them. ``--plain``: gloo itself.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


def load(plain: bool) -> Any:
    """The test case of torch, on whose ranks ``"gloo"`` means commlab."""
    import torch.testing._internal.common_distributed as common
    import torch.testing._internal.distributed.distributed_test as distributed

    import commlab.c10d

    if not plain:
        commlab.c10d.replace_gloo()

    def fork_processes(self: Any) -> None:
        self._start_processes(multiprocessing.get_context("fork").Process)

    common.MultiProcessTestCase._spawn_processes = fork_processes  # type: ignore[method-assign]

    class OnCommlab(distributed.TestDistBackend, distributed.DistributedTest._DistTestBase):  # type: ignore[misc]
        def setUp(self) -> None:
            super().setUp()
            self._spawn_processes()

    return OnCommlab


def main() -> int:
    words = [word for word in sys.argv[1:] if word != "--plain"]
    if not words:
        print(__doc__)
        return 2
    ranks, *names = words
    variables = {"BACKEND": "gloo", "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    os.environ |= {**variables, "INIT_METHOD": "", "TEMP_DIR": tempfile.mkdtemp()}
    import torch

    torch.set_num_threads(1)
    try:
        case = load("--plain" in sys.argv)
    except ImportError as error:
        print(f"torch's tests are not at hand here ({error}): nothing was tested")
        return 0
    found = [
        name for name in unittest.TestLoader().getTestCaseNames(case) if not names or any(w in name for w in names)
    ]
    started_s = time.monotonic()
    result = unittest.TextTestRunner(verbosity=2).run(unittest.TestSuite(case(name) for name in found))
    failed = result.failures + result.errors
    passed = result.testsRun - len(result.skipped) - len(failed)
    print(f"{ranks} ranks: {passed} passed, {len(result.skipped)} skipped, {len(failed)} failed")
    print(f"{time.monotonic() - started_s:.0f} s")
    for test, _ in failed:
        print(f"failed: {test}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
