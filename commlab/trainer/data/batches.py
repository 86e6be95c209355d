"""Tokens to batches: samples of one sequence each, and the order in which ranks see them.

Every rank holds the same tokens and derives the same order from the seed, so ranks agree on who trains on what, and on
how many tokens a global batch has, without a message. Reasons: docs/data.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...errors import UsageError

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""The label of a padded position: no loss, not counted (torch's own default `ignore_index`)."""


class Blocks:
    """A row of tokens cut into samples of `seq_len` predictions each.

    Sample i reads tokens [i * seq_len, (i + 1) * seq_len) and predicts the tokens one further. So every token but the
    very first is predicted exactly once, at every position of a sample, and no slice of the logits is needed to shift
    the labels. The last sample may be shorter: it is padded, and its padded labels are IGNORED.
    """

    def __init__(
        self, tokens: np.ndarray, seq_len: int, *, padding: int = 0, token_bytes: np.ndarray | None = None
    ) -> None:
        if seq_len < 1:
            raise UsageError(f"a sequence must have at least 1 token, got --seq-len {seq_len}")
        if len(tokens) < 2:
            raise UsageError(
                f"{len(tokens)} tokens are too few: a sample is a token and the one after it; give more text"
            )
        self.seq_len = seq_len
        self._tokens = tokens
        self._padding = padding
        self._ends_bytes = None if token_bytes is None else np.concatenate([[0], np.cumsum(token_bytes)])

    def __len__(self) -> int:
        """Number of samples."""
        return -(-(len(self._tokens) - 1) // self.seq_len)

    def _bounds(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last + 1 position among the tokens that each sample predicts."""
        begins = indices.astype(np.int64) * self.seq_len + 1
        return begins, np.minimum(begins + self.seq_len, len(self._tokens))

    def token_count(self, indices: np.ndarray) -> int:
        """How many tokens these samples predict. Any rank can ask it of the whole global batch: no message is needed
        for the divisor."""
        begins, ends = self._bounds(indices)
        return int((ends - begins).sum())

    def byte_count(self, indices: np.ndarray) -> int:
        """How many bytes of text the predicted tokens stand for; needs `token_bytes`."""
        if self._ends_bytes is None:
            raise UsageError("these blocks were made without token_bytes, so they can't tell bytes of text")
        begins, ends = self._bounds(indices)
        return int((self._ends_bytes[ends] - self._ends_bytes[begins]).sum())

    def batch(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(input ids, labels, tokens predicted): two int64 CPU tensors [len(indices), seq_len]; no indices give no
        rows."""
        import torch

        begins, _ = self._bounds(indices)
        positions = begins[:, None] + np.arange(-1, self.seq_len)
        inside = positions < len(self._tokens)
        rows = np.where(
            inside, self._tokens[np.minimum(positions, len(self._tokens) - 1)].astype(np.int64), self._padding
        )
        labels = np.where(inside, rows, IGNORED)[:, 1:]
        ids = torch.from_numpy(np.ascontiguousarray(rows[:, :-1]))
        return ids, torch.from_numpy(np.ascontiguousarray(labels)), int(inside[:, 1:].sum())


@dataclass(frozen=True)
class Batch:
    """One optimizer step's share of one rank.

    `epoch` counts from 0, `step` from 0 over all epochs. `samples` are the indices of the whole global batch, in order;
    `micro_batches` this rank's part of them, in `grad_accumulation` pieces. A piece may be empty; their number is the
    same on every rank.
    """

    epoch: int
    step: int
    samples: np.ndarray
    micro_batches: tuple[np.ndarray, ...]

    @property
    def own(self) -> np.ndarray:
        """This rank's part, in one piece."""
        return np.concatenate(self.micro_batches)


class BatchSampler:
    """Deals every sample once per epoch: a permutation from (seed, epoch), cut into global batches, each cut into
    contiguous parts of ranks.

    The order does not depend on the number of ranks, nor on accumulation, so P ranks compute what one rank computes
    with the same global batch. The last global batch of an epoch holds what is left. Parts differ by one sample at
    most; with fewer samples than ranks, some ranks have none. Cost: 8 bytes per sample.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        rank: int = 0,
        size: int = 1,
        grad_accumulation: int = 1,
        seed: int = 0,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("size", size), ("grad_accumulation", grad_accumulation)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if not 0 <= rank < size:
            raise UsageError(f"rank must lie in 0..{size - 1}, got {rank}")
        if num_samples < batch_size:
            raise UsageError(
                f"less data than one global batch: {num_samples} samples for a batch of {batch_size};"
                " give more text, a smaller --batch-size or a shorter --seq-len"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self._rank, self._size, self._grad_accumulation = rank, size, grad_accumulation
        self._orders: dict[int, np.ndarray] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in one epoch, the smaller last one included."""
        return -(-self.num_samples // self.batch_size)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches from `start_step` on, epoch after epoch, without end. The step is the whole cursor: resuming needs
        nothing else."""
        for step in itertools.count(start_step):
            yield self.batch(step, self._rank)

    def batch(self, step: int, rank: int) -> Batch:
        """Rank ``rank``'s share of step ``step``."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            # The next epoch's first steps may be asked for before the last ones of this.
            self._orders = {known: order for known, order in self._orders.items() if known == epoch - 1}
            self._orders[epoch] = self._order(epoch)
        samples = self._orders[epoch][index * self.batch_size : (index + 1) * self.batch_size]
        own = _part(samples, rank, self._size)
        pieces = tuple(_part(own, piece, self._grad_accumulation) for piece in range(self._grad_accumulation))
        return Batch(epoch, step, samples, pieces)

    def _order(self, epoch: int) -> np.ndarray:
        # RandomState, because numpy promises never to change its stream; default_rng's may change between versions, and
        # with it what a resumed run sees.
        return np.random.RandomState([self.seed, epoch]).permutation(self.num_samples)

    def state_dict(self, step: int) -> dict[str, int]:
        """What a checkpoint needs to go on after `step` batches, on any number of ranks."""
        return {"step": step, "seed": self.seed, "num_samples": self.num_samples, "batch_size": self.batch_size}

    def start_step(self, state: dict[str, int]) -> int:
        """The step to go on from. UsageError where the saved run dealt other samples, so that none is silently seen
        twice."""
        for name, value in self.state_dict(state["step"]).items():
            if state[name] != value:
                raise UsageError(
                    f"the checkpoint has {name} {state[name]}, this run {value}; they must be equal to resume"
                )
        return state["step"]


def held_out_batches(
    blocks: Blocks, batch_size: int, *, rank: int = 0, size: int = 1, limit: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """This rank's part of the held-out samples: (input ids, labels, bytes of text), `batch_size` samples at most over
    all ranks at a time.

    `limit` global batches at most, their samples evenly spaced over all of them, so that a part stands for the whole.
    Ranks may get different numbers of batches, and none: exchange nothing inside the loop.
    """
    wanted = len(blocks) if limit is None else min(len(blocks), limit * batch_size)
    own = _part(np.arange(wanted) * len(blocks) // max(wanted, 1), rank, size)
    step = max(1, batch_size // size)
    for begin in range(0, len(own), step):
        indices = own[begin : begin + step]
        input_ids, labels, _ = blocks.batch(indices)
        yield input_ids, labels, blocks.byte_count(indices)


def _part(samples: np.ndarray, index: int, parts: int) -> np.ndarray:
    """The index-th of `parts` contiguous parts, the first ones one longer where it does not divide."""
    quotient, rest = divmod(len(samples), parts)
    begin = index * quotient + min(index, rest)
    return samples[begin : begin + quotient + (index < rest)]
