"""The metrics of a run: written to a file of JSON lines and to TensorBoard, with the versions they depend on."""

from __future__ import annotations

import json
import platform
import sys
from typing import IO, Any

import torch

from .. import native
from ..job.version import __version__

_SHOWN = {
    "loss": "loss/train, nats per token",
    "held_out_bits_per_byte": "loss/held-out, bits per byte",
    "lr": "optimizer/learning rate",
    "grad_norm": "optimizer/gradient norm",
    "loss_scale": "optimizer/loss scale",
    "forward_s": "step/forward, s",
    "backward_s": "step/backward, s",
    "exchange_s": "step/exchange, s",
    "update_s": "step/update, s",
    "slowest_compute_s": "step/forward and backward of the slowest rank, s",
    "slowest_rank": "step/slowest rank",
    "bytes_sent": "step/bytes sent by rank 0",
}


class Metrics:
    """Where metrics go: a file, TensorBoard, both, or neither. One rank makes the object.

    ``path``: the file of JSON lines; None: no file. ``append``: go on at the end of that file. ``tensorboard``: the
    folder of the event files; None: no TensorBoard.
    """

    def __init__(self, path: str | None, tensorboard: str | None, append: bool):
        self._file: IO[str] | None = None
        self._board: Any = None
        if path:
            self._file = open(path, "a" if append else "w", encoding="utf-8")  # noqa: SIM115 - as long as the run
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(tensorboard)

    def write(self, row: dict[str, Any]) -> None:
        """Write one line of the file. Of a row with a step, TensorBoard gets the numbers that have a title there, at
        the number of steps done."""
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self._board is not None and "step" in row:
            done = row["step"] + ("loss" in row)
            for name, title in _SHOWN.items():
                if row.get(name) is not None:
                    self._board.add_scalar(title, row[name], done)
            if "loss" in row:
                self._board.add_scalar("step/tokens per s", row["tokens"] / row["step_s"], done)

    def text(self, title: str, text: str) -> None:
        """Show a text in TensorBoard; the file does not get it."""
        if self._board is not None:
            self._board.add_text(title, f"```\n{text}\n```")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def versions() -> dict[str, str]:
    """The versions of everything that a result depends on."""
    found = {
        "commlab": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "arithmetic": native.backend(),
    }
    if "mpi4py.MPI" in sys.modules:
        from ..transport.mpi import library

        found["mpi"] = library()
    return found
