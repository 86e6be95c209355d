"""The buckets of a worker whose parameters dedicated servers have: in forward's order, cut small, pushed as far as they
have gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ..gradients.bucket import Bucket, plan, usual_bytes
from ..gradients.parameters import adjoining
from ..native.dtypes import WIRES
from ..ps.messages import MESSAGE_BYTES
from ..runtime.handle import Handle
from .flat import FlatParameters
from .start import Training

BUCKET_BYTES = 4 * MESSAGE_BYTES
"""The most that is packed at once, whatever ``bucket_bytes`` says: servers can be busy before a bucket is full."""


def plan_served(training: Training) -> list[Bucket]:
    """The buckets of what is trained."""
    options = training.options
    # One order for pushes and pulls: forward's, in which servers keep their slices; the optimizer's groups are theirs
    # to know.
    parameters = [replace(item, group=0) for item in training.parameters]
    usual = options.bucket_bytes or usual_bytes(parameters, len(training.group.nodes), training.group.byte_s)
    buckets = []
    for bucket in plan(parameters, min(usual, BUCKET_BYTES), WIRES[options.wire]):
        members = bucket.parameters[::-1]
        buckets.append(Bucket(bucket.index, members, adjoining(members), bucket.dtype, bucket.flat))
    return buckets


def flattened(bucket: Bucket) -> FlatParameters:
    """The bucket's parameters, moved into a flat buffer of this rank's own."""
    return FlatParameters(bucket, torch.empty(bucket.numel, dtype=bucket.parameters[0].tensor.dtype, device="cpu"))


def with_gradients(bucket: Bucket, used: set[int]) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """The parameters of a packed bucket that are among those ``used`` (by index), with their gradients; those that
    adjoin together: servers update what was pushed."""
    packed = [member.index in used for member in bucket.parameters]
    first = 0
    while first < len(packed):
        last = first
        while last < len(packed) and packed[last]:
            last += 1
        if last > first:
            names = tuple(member.name for member in bucket.parameters[first:last])
            yield names, bucket.flat[bucket.ranges[first].start : bucket.ranges[last - 1].stop]
        first = last + 1


class BucketPushes:
    """The pushes of one bucket, under way: a :class:`commlab.gradients.hooks.Waitable`."""

    result = None

    def __init__(self, handles: Sequence[Handle]):
        self._handles = handles

    def wait(self, timeout_s: float | None = None) -> None:
        """Return once the servers have taken in all of them; raise what went wrong."""
        for handle in self._handles:
            handle.wait(timeout_s)
