"""How many files a reader opens to follow one thing: ``python tests/helpers/reader_way.py [CHECKOUT]``.

Two ranks under mpirun go four ways through commlab, each after three steps to warm up, and rank 0 prints which files of
commlab ran: a file counts where one of its functions is called, not where it is only imported.

- *allreduce*: 4 bytes that lie in the window, the public call alone. What counts is the number of Python calls.
- *dps*: a step of strategy dps in the window, from ``engine.backward()`` to the end of ``engine.step()``, with
  clipping, as the trainer does by default. ``chunks`` and ``trace`` are not counted: everything uses them, and nobody
  opens them to follow a step.
- *push*: ``ParameterServer.push()`` and its ``wait()`` in a group of one rank, which serves itself, so that the
  worker's side and the server's are both seen. What counts are the files of ``ps/``; below them the message is a
  transport's.
- *push, worker's side*: the same call where another rank serves.

With these rules commit c2ec415, before the rooms, has 9 calls, 24 files for the step and 14 for the push. The program
uses public names alone, so CHECKOUT may be any version; without it, the one that holds this file is followed.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
WARM_UP_STEPS = 3
LAUNCH_S = 120


class Follower:
    """Notes the functions of one folder that are called, on all threads that start after it was made."""

    def __init__(self, folder: Path) -> None:
        self._folder = f"{folder}/"
        self._following = False
        self.calls: list[str] = []
        """``file:function`` of each call, in order."""
        threading.setprofile(self._note)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if self._following and event == "call" and code.co_filename.startswith(self._folder):
            self.calls.append(f"{code.co_filename.removeprefix(self._folder)}:{code.co_name}")

    def follow(self, way: Callable[[], object]) -> list[str]:
        """The calls that ``way`` makes."""
        self.calls.clear()
        sys.setprofile(self._note)
        self._following = True
        way()
        self._following = False
        sys.setprofile(None)
        return list(self.calls)


def files_of(calls: list[str]) -> list[str]:
    return sorted({call.partition(":")[0] for call in calls})


def go() -> None:
    """One rank's part. Collective over two ranks."""
    import torch

    import commlab

    follower = Follower(Path(commlab.__file__).parent)
    group = commlab.init()
    assert group.size == 2 and group.window is not None, f"2 ranks with a window are needed: {group.window_reason}"
    printed = group.rank == 0

    def report(title: str, calls: list[str], counted: Callable[[str], bool]) -> None:
        files = files_of(calls)
        if printed:
            print(f"{title}: {sum(map(counted, files))} files ({len(files)} in all), {len(calls)} calls")
            print("\n".join(f"    {file}" + ("" if counted(file) else "  (not counted)") for file in files), flush=True)

    numbers = commlab.empty(1)
    for _ in range(WARM_UP_STEPS):
        commlab.allreduce(numbers)
    report("allreduce", follower.follow(lambda: commlab.allreduce(numbers)), lambda file: True)

    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    engine = commlab.strategy("dps", model, torch.optim.AdamW(model.parameters()), max_grad_norm=1.0)
    for step in range(WARM_UP_STEPS + 1):
        loss = engine.model(torch.ones(4, 64)).square().sum()

        def finish(loss: torch.Tensor = loss) -> None:
            engine.backward(loss, 4, 8)
            engine.step()

        calls = follower.follow(finish)
        engine.zero_grad()
        if step == WARM_UP_STEPS:
            report("dps", calls, lambda file: file not in ("chunks.py", "trace.py"))
    engine.close()

    weights = {"w": torch.zeros(4)}
    alone = [group.subgroup([rank]) for rank in range(2)][group.rank]
    for title, members, servers in (("push", alone, None), ("push, worker's side", group, 1)):
        store = commlab.ParameterServer(
            weights.items(), lambda params: torch.optim.SGD(params, lr=0.5), group=members, servers=servers
        )
        if store.role == "server":
            continue
        for step in range(WARM_UP_STEPS + 1):
            calls = follower.follow(lambda store=store: store.push("w", torch.ones(4)).wait())
            if step == WARM_UP_STEPS:
                report(title, calls, lambda file: file.startswith("ps/"))
            store.step()
        store.close()
    commlab.shutdown()


def main(checkout: Path) -> int:
    sys.path.insert(0, str(ROOT))
    from bench.core.mpirun import find_mpi, mpirun_environment

    mpi = find_mpi()
    environment = mpirun_environment(mpi) | {"PYTHONPATH": str(checkout.resolve())}
    command = [mpi.mpirun, "-n", "2", sys.executable, __file__, "--rank"]
    return subprocess.run(command, env=environment, timeout=LAUNCH_S, check=False).returncode


if __name__ == "__main__":
    if sys.argv[1:] == ["--rank"]:
        go()
    else:
        sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else ROOT))
