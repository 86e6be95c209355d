"""Threads as the ranks of a node: their control pages and staging areas, all in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from commlab.chunks import Range
from commlab.native import library
from commlab.native.dtypes import MOVED, OP_CODES

PATIENCE_US = 60e6
MEMORY = 1
"""The segment of each rank that tensors lie in, beside its staging area."""
MEMORY_NUMEL = 2 * 2**20 // 8


class Node:
    """The pages and staging areas of some ranks, all in this process."""

    def __init__(self, size: int, block_bytes: int):
        self.size, self.block_bytes = size, block_bytes
        self._pages = [torch.zeros(library.built.CONTROL_BYTES + 64, dtype=torch.uint8) for _ in range(size)]
        addresses = [(page.data_ptr() + 63) // 64 * 64 for page in self._pages]
        for rank, address in enumerate(addresses):
            library.built.format_page(address, rank, b"t" * 16)
        self.syncs = [library.built.NodeSync(rank, addresses, 0.0) for rank in range(size)]
        self._areas = [torch.full((4 * block_bytes + 64,), 0x7E, dtype=torch.uint8) for _ in range(size)]
        self.staging = [(area.data_ptr() + 63) // 64 * 64 for area in self._areas]

    def piped(
        self,
        rank: int,
        data: Tensor,
        moves: str,
        chunks: Sequence[Range],
        op: str = "sum",
        divisor: float = 1,
        wire: torch.dtype | None = None,
        out: Tensor | None = None,
    ) -> object:
        return library.built.Piped(
            self.syncs[rank],
            self.staging,
            self.block_bytes,
            data.data_ptr(),
            0 if out is None else out.data_ptr(),
            MOVED[data.dtype][0],
            MOVED[wire or data.dtype][0],
            OP_CODES[op],
            divisor,
            "reduce" in moves,
            "gather" in moves,
            [tuple(chunk) for chunk in chunks],
            MOVED[data.dtype if out is None else out.dtype][0],
        )

    def run(self, work: Callable[[int], None]) -> None:
        """``work(rank)`` in a thread per rank. Between two operations all ranks meet, as they do in a group."""
        failures: list[BaseException] = []

        def guarded(rank: int) -> None:
            try:
                work(rank)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=guarded, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "ranks wait for each other"
        if failures:
            raise failures[0]

    def meet(self, rank: int) -> None:
        self.syncs[rank].arrive()
        assert self.syncs[rank].wait(PATIENCE_US) == -1


class SharedNode(Node):
    """Ranks that have mapped each other's memory."""

    def __init__(self, size: int):
        native: Any = library.built
        super().__init__(size, native.STAGING_BYTES // 4)
        self.native = native
        self.memory = [torch.zeros(MEMORY_NUMEL, dtype=torch.int64) for _ in range(size)]
        self.mapped = [native.Mappings(size, rank) for rank in range(size)]
        for of in range(size):
            for rank in range(size):
                self.map_staging(rank, of)
                self.mapped[rank].add(of, MEMORY, self.memory[of].data_ptr(), self.memory[of].nbytes)

    def map_staging(self, rank: int, of: int) -> None:
        """Let ``rank`` know where the staging area of ``of`` is."""
        self.mapped[rank].add(of, 0, self.staging[of], self.native.STAGING_BYTES)
