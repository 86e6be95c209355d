"""The arguments of torch.distributed's methods, in the forms in which programs and C++ give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def listed(tensors: Any) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def awaited(opts: Any) -> bool:
    """Whether the caller waits for the operation at once, as far as it says so."""
    return getattr(opts, "asyncOp", True) is False


def present(opts: Any) -> tuple[Any, ...]:
    return () if opts is None else (opts,)


def with_op(asked: Any, kind: Any) -> Any:
    """Options, also where the caller gave a bare reduction or nothing."""
    if hasattr(asked, "timeout"):
        return asked
    opts = kind()
    if asked is not None:
        opts.reduceOp = asked
    return opts


def op_text(reduce_op: Any) -> str:
    """A reduction's name: SUM, BAND, ..."""
    return str(getattr(reduce_op, "op", reduce_op)).rpartition(".")[2]


def with_root(asked: Any, kind: Any, op: Any = None) -> Any:
    """Options, also where the caller gave a bare root or nothing."""
    if hasattr(asked, "timeout"):
        return asked
    opts = kind()
    opts.rootRank = asked or 0
    if op is not None:
        opts.reduceOp = op
    return opts


def rows_of(rank: int, size: int, whole: torch.Tensor, splits: Sequence[int]) -> list[torch.Tensor]:
    """``whole`` cut along its first dimension, as all_to_all_single does."""
    rows = whole.shape[0] if whole.dim() else whole.numel()
    even = not splits
    splits = [rows // size] * size if even else list(splits)
    if sum(splits) != rows or len(splits) != size:
        raise ValueError(
            f"rank {rank}: Tensor's dim 0 does not divide equally across group size: {rows} rows, {size} ranks"
            if even
            else f"rank {rank}: Split sizes don't match total dim 0 size: {splits} of {rows} rows, {size} ranks"
        )
    return list(whole.detach().split(splits)) if whole.dim() else [whole.detach()]
