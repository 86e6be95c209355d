"""Cores that are busy: a thread of matrix products in every rank, as beside a training step's communication."""

from __future__ import annotations

import threading
from types import TracebackType

import torch

SIZE = 256
"""Rows of a square matrix: a product takes about a millisecond, during which the thread does not hold the GIL."""


class Products:
    """One thread that multiplies matrices while the ``with`` block runs."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._multiply, name="products", daemon=True)

    def _multiply(self) -> None:
        torch.set_num_threads(1)  # of this thread
        matrix = torch.ones(SIZE, SIZE) / SIZE
        product = matrix.clone()
        while not self._ended.is_set():
            torch.mm(matrix, matrix, out=product)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
