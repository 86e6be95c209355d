"""Buckets: parameters grouped in the order in which backward finishes them, each sent as soon as all its gradients are
there.

    registration order      wte  wpe  h.0 ...  h.11  ln_f            backward runs from the right to the left
    buckets                      [   bucket 2   ][ bucket 1 ][ 0 ]   so bucket 0 is ready first, and travels meanwhile

Every rank starts its buckets strictly in index order, so no message has to say which bucket it belongs to. What one
does with a ready bucket is not known here: it is given to ``launch``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from .. import trace
from ..chunks import Range
from ..errors import UsageError
from .mirror import Mirror, mirrors
from .norm import Squares
from .wire import Packer

USUAL_BYTES = 25 * 2**20


@dataclass(frozen=True)
class NamedParameter:
    """A parameter as the buckets see it; ``group`` is the index of its group in the user's optimizer."""

    name: str
    tensor: torch.nn.Parameter
    group: int
    index: int
    """Place in registration order."""


@dataclass
class Bucket:
    """Parameters of one dtype and one optimizer group, and where each lies in the flat buffer."""

    index: int
    parameters: list[NamedParameter]
    ranges: list[Range]
    dtype: torch.dtype
    """Of the flat buffer, that is of the wire."""
    flat: torch.Tensor = field(repr=False)
    """In CPU memory."""
    mirror: Mirror | None = field(default=None, repr=False)
    """``flat`` on the GPU that the parameters are on."""
    squares: Squares = field(default_factory=Squares)
    """Of what this rank reduces of it in this step."""
    waiting: set[int] = field(default_factory=set)
    """Indices of the parameters whose gradients are not there yet."""

    def __post_init__(self) -> None:
        self.packer = Packer(self.ranges)

    def pack(self, gradients: list[torch.Tensor | None], scale: float) -> bool:
        """Write the gradients to ``flat``, on the way there where they are on a GPU; whether they are finite, as far as
        is known by now (:meth:`Packer.finite`)."""
        if self.mirror is None:
            return self.packer.pack(gradients, self.flat, scale)
        finite = self.packer.pack(gradients, self.mirror.device, scale)
        self.mirror.to_host()
        return finite

    def result(self) -> torch.Tensor:
        """``flat``, reduced, where the parameters are."""
        if self.mirror is None:
            return self.flat
        self.mirror.to_device()
        return self.mirror.device

    @property
    def numel(self) -> int:
        return self.flat.numel()

    @property
    def name(self) -> str:
        return f"bucket {self.index}"


def named_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[NamedParameter]:
    """The trainable parameters of ``model`` in registration order, a tied one once, with their groups in ``optimizer``.

    UsageError for a parameter that the optimizer does not have, or has but the model does not, and for sparse or
    complex ones.
    """
    group_of = {id(tensor): group for group, entry in enumerate(optimizer.param_groups) for tensor in entry["params"]}
    named: list[NamedParameter] = []
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        if id(tensor) not in group_of:
            raise UsageError(
                f"parameter {name!r} is trainable, but the optimizer does not have it; add it, or freeze it"
            )
        if not tensor.dtype.is_floating_point:
            raise UsageError(f"parameter {name!r} is {tensor.dtype}; gradients travel as floating-point numbers")
        named.append(NamedParameter(name, tensor, group_of.pop(id(tensor)), len(named)))
    if group_of:
        shapes = [
            list(tensor.shape)
            for entry in optimizer.param_groups
            for tensor in entry["params"]
            if id(tensor) in group_of
        ]
        raise UsageError(
            f"the optimizer has {len(group_of)} parameters that are not trainable ones of the model: {shapes[:5]}"
        )
    return named


def usual_bytes(parameters: Iterable[NamedParameter], nodes: int) -> int:
    """How large buckets are where nobody says: 25 MiB; between nodes, where links are slow, no more than a quarter of
    all gradients, so that most of a small model can leave during backward too, but 1 MiB."""
    if nodes == 1:
        return USUAL_BYTES
    total_bytes = sum(each.tensor.numel() * each.tensor.element_size() for each in parameters)
    return min(USUAL_BYTES, max(2**20, total_bytes // 4))


def plan(
    parameters: Iterable[NamedParameter],
    bucket_bytes: int,
    wire: torch.dtype | None,
    allocate: Callable[[int, torch.dtype], torch.Tensor] = lambda numel, dtype: torch.empty(numel, dtype=dtype),
) -> list[Bucket]:
    """Fill buckets of at most ``bucket_bytes`` (more where one parameter is larger) in reverse registration order.

    A bucket holds one dtype, one device and one optimizer group, so that a chunk of it can be updated as one. Buckets
    are numbered in the order in which backward completes them. ``allocate(numel, dtype)`` makes their flat buffers:
    1-D, CPU.
    """
    open_buckets: dict[tuple[torch.dtype, torch.device, int], list[NamedParameter]] = {}
    closed: list[list[NamedParameter]] = []
    for parameter in reversed(list(parameters)):
        key = parameter.tensor.dtype, parameter.tensor.device, parameter.group
        members = open_buckets.setdefault(key, [])
        filled = sum(member.tensor.numel() * member.tensor.element_size() for member in members)
        if members and filled + parameter.tensor.numel() * parameter.tensor.element_size() > bucket_bytes:
            closed.append(members)
            members = open_buckets[key] = []
        members.append(parameter)
    closed.extend(members for members in open_buckets.values() if members)
    # Complete when its last member is: the one registered first.
    closed.sort(key=lambda members: -members[-1].index)
    buckets = []
    for index, members in enumerate(closed):
        ranges = adjoining(members)
        dtype = wire or members[0].tensor.dtype
        flat, device = allocate(ranges[-1].stop, dtype), members[0].tensor.device
        mirror = Mirror(flat, device) if mirrors(device) else None
        buckets.append(Bucket(index, members, ranges, dtype, flat, mirror))
    return buckets


def adjoining(members: Iterable[NamedParameter]) -> list[Range]:
    """Where each lies when all lie side by side."""
    ranges, at = [], 0
    for member in members:
        ranges.append(Range(at, at + member.tensor.numel()))
        at = ranges[-1].stop
    return ranges


class GradientBuckets:
    """Watches backward through post-accumulate-grad hooks, packs what is complete, and launches it in index order.

    ``launch(bucket)`` starts the bucket on its way. ``scale()`` is asked for when a step's first bucket is packed, and
    multiplies all gradients of the step. ``poll()`` lets operations under way move on while backward computes.
    ``overlap``: False keeps all buckets until backward has ended.
    """

    def __init__(
        self,
        buckets: list[Bucket],
        launch: Callable[[Bucket], None],
        scale: Callable[[], float],
        poll: Callable[[], None],
        *,
        keep_gradients: bool,
        overlap: bool = True,
    ):
        self.buckets = buckets
        self.syncing = True
        """Off inside ``no_sync``: gradients accumulate on this rank and nothing is launched."""
        self.overlap = overlap
        """Off: nothing leaves before :meth:`flush`. May change between two steps, on all ranks alike."""
        self.used: set[int] = set()
        """Parameters (by index) that have had a gradient since the last :meth:`reset`."""
        self._finite = True
        self.launch_s = 0.0
        """Time spent packing, launching and polling, inside backward and in :meth:`flush`, since the last
        :meth:`reset`."""
        self._launch, self._scale, self._poll = launch, scale, poll
        self._keep_gradients = keep_gradients
        self._next = 0
        self._travelling: deque[Bucket] = deque()
        """Packed and not launched yet: their copies to the host are under way."""
        self._step_scale: float | None = None
        self._hooks = [
            member.tensor.register_post_accumulate_grad_hook(self._hook(bucket, member))
            for bucket in buckets
            for member in bucket.parameters
        ]
        self.reset()

    def _hook(self, bucket: Bucket, member: NamedParameter) -> Callable[[torch.Tensor], None]:
        def on_gradient(_: torch.Tensor) -> None:
            self.used.add(member.index)
            if not self.syncing:
                return
            if member.index not in bucket.waiting:
                raise UsageError(
                    f"the gradient of {member.name!r} is ready a second time before step(): run "
                    "all backward() calls but the last "
                    "of a step inside engine.no_sync()"
                )
            bucket.waiting.discard(member.index)
            if not self.overlap:
                return
            started_s = time.perf_counter()
            self._launch_ready()
            self._poll()
            self.launch_s += time.perf_counter() - started_s

        return on_gradient

    def _launch_ready(self) -> None:
        while self._next < len(self.buckets) and not self.buckets[self._next].waiting:
            self._pack_next()
        while self._travelling and (self._travelling[0].mirror is None or self._travelling[0].mirror.arrived()):
            self._launch(self._travelling.popleft())

    @property
    def finite(self) -> bool:
        """Whether all that was packed since the last :meth:`reset` is finite. Waits for GPUs."""
        return self._finite and all(bucket.packer.finite() for bucket in self.buckets)

    def _pack_next(self) -> None:
        bucket = self.buckets[self._next]
        self._next += 1
        if self._step_scale is None:
            self._step_scale = self._scale()
        gradients = [member.tensor.grad for member in bucket.parameters]
        for member, gradient in zip(bucket.parameters, gradients, strict=True):
            if gradient is not None and gradient.is_sparse:
                raise UsageError(f"the gradient of {member.name!r} is sparse; use sparse=False in its embedding")
        with trace.span(f"pack {bucket.name}", "compute"):
            self._finite &= bucket.pack(gradients, self._step_scale)
        if not self._keep_gradients:
            for member in bucket.parameters:
                member.tensor.grad = None
        self._travelling.append(bucket)

    def flush(self) -> None:
        """After backward: launch what is left; parameters without a gradient on this rank travel as zeros."""
        started_s = time.perf_counter()
        while self._next < len(self.buckets):
            self._pack_next()
            self._launch_ready()
        self.launch_packed()
        self.launch_s += time.perf_counter() - started_s

    def launch_packed(self) -> None:
        """Launch all that is packed, once it has arrived: how much has by itself differs between ranks."""
        while self._travelling:
            bucket = self._travelling.popleft()
            if bucket.mirror is not None:
                bucket.mirror.wait()
            self._launch(bucket)

    def reset(self) -> None:
        """Get ready for the next step."""
        self._next, self._step_scale, self.launch_s, self._finite = 0, None, 0.0, True
        self._travelling.clear()
        self.used.clear()
        for bucket in self.buckets:
            bucket.packer.forget()
            bucket.squares.told = None
            bucket.waiting = {member.index for member in bucket.parameters}

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
