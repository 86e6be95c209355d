"""From tokens to batches: samples of one sequence each, their order, and which rank trains on which of them.

Every rank holds the same tokens and derives the same order from the seed. So ranks need no message to agree on the
samples of each rank, or on the number of tokens of a global batch. Reasons: docs/data.md.
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
"""The label of a padded position: no loss, not counted (torch's own default ``ignore_index``)."""


class Blocks:
    """A row of tokens cut into samples of ``seq_len`` predictions each.

    Sample i reads tokens [i * seq_len, (i + 1) * seq_len) and predicts the tokens one further. So every token but the
    very first is predicted exactly once, at every position of a sample, and no slice of the logits is needed to shift
    the labels. The last sample may be shorter: it is padded, and its padded labels are IGNORED.
    ``token_bytes``: how many bytes of text each token stands for, where :meth:`byte_count` will be asked.
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
        """Of the tokens that each sample predicts: the first position, and the one behind the last."""
        begins = indices.astype(np.int64) * self.seq_len + 1
        return begins, np.minimum(begins + self.seq_len, len(self._tokens))

    def token_count(self, indices: np.ndarray) -> int:
        """How many tokens these samples predict. Every rank can count a whole global batch: no message is needed for
        the divisor of a step."""
        begins, ends = self._bounds(indices)
        return int((ends - begins).sum())

    def byte_count(self, indices: np.ndarray) -> int:
        """How many bytes of text the predicted tokens stand for; needs ``token_bytes``."""
        if self._ends_bytes is None:
            raise UsageError("these blocks were made without token_bytes, so they can't count bytes of text")
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
    """One rank's share of one step."""

    epoch: int
    """Counted from 0."""
    step: int
    """Counted from 0 over all epochs."""
    samples: np.ndarray
    """The indices of the whole global batch, in order."""
    micro_batches: tuple[np.ndarray, ...]
    """The rank's share of ``samples``, cut into micro-batches: on every rank the same number of them, some of which may
    be empty."""

    @property
    def own(self) -> np.ndarray:
        """The rank's share of ``samples``, whole."""
        return np.concatenate(self.micro_batches)


class BatchSampler:
    """Deals every sample once per epoch: a permutation drawn from (seed, epoch) is cut into global batches, and each
    global batch into contiguous shares, one per rank.

    The order depends neither on the number of ranks nor on accumulation, so P ranks compute what one rank computes
    with the same global batch. The last global batch of an epoch holds the samples that are left. Shares differ by one
    sample at most; with fewer samples than ranks, some ranks have none. Cost: 8 bytes per sample.
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
        """This rank's batches from ``start_step`` on, epoch after epoch, without end. The step is the whole cursor:
        resuming needs nothing else."""
        for step in itertools.count(start_step):
            yield self.batch(step, self._rank)

    def batch(self, step: int, rank: int) -> Batch:
        """The share of ``rank`` in step ``step``."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            # Some of the next epoch's first steps may be asked for before this epoch's last ones.
            self._orders = {known: order for known, order in self._orders.items() if known == epoch - 1}
            self._orders[epoch] = self._order(epoch)
        samples = self._orders[epoch][index * self.batch_size : (index + 1) * self.batch_size]
        own = _share(samples, rank, self._size)
        micro_batches = tuple(_share(own, index, self._grad_accumulation) for index in range(self._grad_accumulation))
        return Batch(epoch, step, samples, micro_batches)

    def _order(self, epoch: int) -> np.ndarray:
        # RandomState, because numpy promises never to change its stream; the stream of default_rng may change between
        # versions, and a resumed run would see another order.
        return np.random.RandomState([self.seed, epoch]).permutation(self.num_samples)

    def state_dict(self, step: int) -> dict[str, int]:
        """What a checkpoint saves, so that a run can go on after ``step`` batches, on any number of ranks."""
        return {"step": step, "seed": self.seed, "num_samples": self.num_samples, "batch_size": self.batch_size}

    def start_step(self, state: dict[str, int]) -> int:
        """The step to go on from. UsageError where the saved run dealt other samples, so that no sample is silently
        seen twice."""
        for name, value in self.state_dict(state["step"]).items():
            if state[name] != value:
                raise UsageError(
                    f"the checkpoint has {name} {state[name]}, this run {value}; they must be equal to resume"
                )
        return state["step"]


def held_out_batches(
    blocks: Blocks, batch_size: int, *, rank: int = 0, size: int = 1, limit: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """This rank's share of the held-out samples, as (input ids, labels, bytes of text); a batch has ``batch_size``
    samples at most, over all ranks.

    ``limit``: how many global batches at most; their samples are evenly spaced over all held-out samples, so that they
    stand for the whole. Ranks may get different numbers of batches, and none: exchange nothing inside the loop.
    """
    own = _share(_held_out_samples(blocks, batch_size, limit), rank, size)
    step = max(1, batch_size // size)
    for begin in range(0, len(own), step):
        indices = own[begin : begin + step]
        input_ids, labels, _ = blocks.batch(indices)
        yield input_ids, labels, blocks.byte_count(indices)


def require_held_out(blocks: Blocks, batch_size: int, limit: int | None = None) -> None:
    """UsageError where the samples of :func:`held_out_batches`, over all ranks, stand for no byte of text: there would
    be nothing to divide by."""
    if not blocks.byte_count(_held_out_samples(blocks, batch_size, limit)):
        raise UsageError(
            "the text is too short: what an evaluation would take of the held-out text has not one byte that is"
            " predicted; give more text"
        )


def _held_out_samples(blocks: Blocks, batch_size: int, limit: int | None) -> np.ndarray:
    wanted = len(blocks) if limit is None else min(len(blocks), limit * batch_size)
    return np.arange(wanted) * len(blocks) // max(wanted, 1)


def _share(samples: np.ndarray, index: int, shares: int) -> np.ndarray:
    """The index-th of ``shares`` contiguous shares; the first ones are one longer where samples can't be dealt
    equally."""
    quotient, rest = divmod(len(samples), shares)
    begin = index * quotient + min(index, rest)
    return samples[begin : begin + quotient + (index < rest)]
