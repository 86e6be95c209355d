"""What to say of a step whose gradient or loss is not finite: which ranks have seen it first, and where."""

from __future__ import annotations

import torch

from ..errors import NotFiniteError
from ..gradients.hooks import GradientBuckets
from ..runtime.control import gather_bytes, sides_of
from .start import Training


def not_finite_error(training: Training, buckets: GradientBuckets) -> NotFiniteError:
    """The error for a step that all ranks know to be not finite, equal on all of them but for the rank that raises it.
    Collective."""
    group, options = training.group, training.options
    instead = 'Take a smaller learning rate, or clip; nonfinite="skip" leaves such steps out'
    if options.nonfinite == "torch":
        instead = (
            f"It could not travel on wire {options.wire}: use precision fp16, which scales the loss and skips such "
            'steps, or wire bf16 or none, or nonfinite="skip"'
        )
    own = _what_is_not(training, buckets)
    everyones = [text.decode() for text in gather_bytes(group, own.encode(), "what is not finite")]
    known = [text or "all its own is finite" for text in everyones]
    where = sides_of(known) if any(everyones) else "every rank's own gradient is, but not the sum of them or its norm"
    return NotFiniteError(
        f"rank {group.rank}: in step {training.steps} the gradient is not finite (an overflow, inf or NaN): {where}. "
        f"Nothing was updated. {instead}"
    )


def _what_is_not(training: Training, buckets: GradientBuckets) -> str:
    """What is not finite on this rank; empty where nothing is."""
    found = [] if training.record.loss_is_finite() else ["the loss"]
    name = buckets.not_finite or _in_mirrors(buckets)
    if not buckets.buckets:
        name = _in_gradients(training)
    if name:
        found.append(f"the gradient of {name!r}")
    return " and ".join(found)


def _in_mirrors(buckets: GradientBuckets) -> str:
    """The first parameter whose gradient is not finite, as a GPU has packed it; empty where there is none."""
    for bucket in buckets.buckets:
        if bucket.mirror is not None and not bucket.packer.finite():
            for member, extent in zip(bucket.parameters, bucket.ranges, strict=True):
                if not _is_finite(bucket.mirror.device[extent.start : extent.stop]):
                    return member.name
    return ""


def _in_gradients(training: Training) -> str:
    """The first parameter whose ``p.grad`` is not finite: where no buckets were packed, a library has reduced it, and
    every rank has the same."""
    for item in training.parameters:
        if item.tensor.grad is not None and not _is_finite(item.tensor.grad):
            return item.name
    return ""


def _is_finite(numbers: torch.Tensor) -> bool:
    return bool(numbers.isfinite().all())
