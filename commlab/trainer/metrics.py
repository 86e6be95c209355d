"""The metrics of a run: written to a file of JSON lines and to TensorBoard, with the versions they depend on."""

from __future__ import annotations

import fcntl
import json
import math
import platform
import sys
from contextlib import suppress
from typing import IO, Any

import torch

from .. import native
from ..errors import UsageError
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
        self.trouble = ""
        """Why metrics are missing; empty: none are."""
        if path:
            self._file = _opened(path, append)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(tensorboard)

    def write(self, row: dict[str, Any]) -> None:
        """Write one line of the file, in which null stands for what is inf or NaN: JSON has no such numbers, and many
        readers would refuse the whole file. Of a row with a step, TensorBoard gets the numbers that have a title there,
        at the number of steps done. Where something can't be written any more, the run goes on without metrics, and
        ``trouble`` has the reason."""
        try:
            if self._file is not None:
                self._file.write(json.dumps(_strict(row), allow_nan=False) + "\n")
                self._file.flush()
            if self._board is not None and "step" in row:
                self._show(row)
        except OSError as error:
            self.trouble = (
                f"the metrics are not whole: from step {row.get('step', 'none')} on they can't be written ({error})"
            )
            self.close()

    def _show(self, row: dict[str, Any]) -> None:
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
        """Close what is open; nothing is written afterwards."""
        file, board, self._file, self._board = self._file, self._board, None, None
        for opened in (file, board):
            with suppress(OSError):  # what can't be written was reported by write()
                if opened is not None:
                    opened.close()


def _opened(path: str, append: bool) -> IO[str]:
    """The file, locked for as long as it is open: two runs would write into each other's lines."""
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - as long as the run
    except OSError as error:
        raise UsageError(
            f"--metrics {path!r} can't be written: {error.strerror or error}; give another file"
        ) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UsageError(f"--metrics {path!r}: another run writes there; give each run a file of its own") from error
    except OSError:
        pass  # a pipe, a device, a file system without locks
    if not append:
        with suppress(OSError):
            file.truncate(0)
    return file


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


def _strict(value: Any) -> Any:
    """What JSON has in place of ``value``."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list | tuple) else value
