"""A process to kill while it writes checkpoints: imports once, then forks a writer for every line that it reads.

stdin   FOLDER CRASH_AT     CRASH_AT: before which call that changes the disk the writer kills itself; 0: never
stdout  pid N; then "acknowledged STEP" whenever a save has returned; then "gone"
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import training

import commlab
from commlab.checkpoint import Checkpoints

NUMEL = 200_000
"""0.8 MB, three times with the optimizer's state: most of a writer's life is spent writing."""
STEPS = 1000


class State:
    """A model and an optimizer whose every number tells the step."""

    def __init__(self, folder: Path) -> None:
        self.model = torch.nn.Linear(NUMEL, 1)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        engine = commlab.strategy("single", self.model, self.optimizer, training.alone())
        self.checkpoints = Checkpoints(folder, self.model, engine)

    def expected(self, step: int, at: int) -> torch.Tensor:
        return torch.arange(NUMEL, dtype=torch.float32).add_(at * 0.5).mul_(step)

    def fill(self, step: int) -> None:
        weight = self.model.weight
        weight.data.copy_(self.expected(step, 0)[None])
        state = {"step": torch.tensor(float(step))}
        for at, name in enumerate(("exp_avg", "exp_avg_sq"), 1):
            state[name] = self.expected(step, at)[None]
        self.optimizer.state[weight] = state

    def check(self, step: int) -> None:
        """Every number is of this step."""
        state = self.optimizer.state[self.model.weight]
        assert torch.equal(self.model.weight.data[0], self.expected(step, 0))
        assert float(state["step"]) == step
        assert torch.equal(state["exp_avg"][0], self.expected(step, 1))
        assert torch.equal(state["exp_avg_sq"][0], self.expected(step, 2))


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def crash_before(call: int) -> None:
    """From now on the ``call``-th call that changes the disk does not return, nor does this process go on."""
    calls = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return function

    import safetensors.torch

    for module, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (shutil, "rmtree"), (Path, "write_text")):
        setattr(module, name, counted(getattr(module, name)))
    safetensors.torch.save_file = counted(safetensors.torch.save_file)


def write(folder: Path, crash_at: int) -> None:
    """Go on where the newest checkpoint ends; with ``crash_at``, for one more checkpoint only."""
    state = State(folder)
    found = state.checkpoints.restore()
    step = 0 if found is None else found[0]
    if found is not None:
        state.check(step)
    if crash_at:
        crash_before(crash_at)
    for after in range(step + 1, step + 2 if crash_at else STEPS):
        state.fill(after)
        state.checkpoints.save(after, {"step": after})
        say(f"acknowledged {after}")


class Server:
    """The forking process, as a test sees it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, folder: Path, crash_at: int = 0) -> int:
        """The writer's pid."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{folder} {crash_at}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline().split()[1])

    def acknowledged(self) -> list[int]:
        """Once the writer is gone: the steps whose save had returned."""
        assert self._process.stdout is not None
        lines = list(iter(lambda: self._process.stdout.readline().strip(), "gone"))  # type: ignore[union-attr]
        assert "" not in lines, "the forking process has died"
        return [int(line.split()[1]) for line in lines]

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # imports what is imported late: the writers are to write
        State(Path(folder)).checkpoints.save(1)
        State(Path(folder)).checkpoints.restore()
    for line in sys.stdin:
        folder, _, crash_at = line.strip().rpartition(" ")
        child = os.fork()
        if not child:
            status = 1
            try:
                write(Path(folder), int(crash_at))
                status = 0
            finally:
                os._exit(status)
        say(f"pid {child}")
        os.waitpid(child, 0)
        say("gone")


if __name__ == "__main__":
    main()
