"""The parameters that are trained, each with its name, its group in the optimizer and its index; and what a model must
not have: numbers that are nowhere, and tensors that are tied by their memory alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..chunks import Range
from ..errors import UsageError

_COMPILED = "_orig_mod."
"""What ``torch.compile(model)`` puts before the names of the parameters of ``model``."""


@dataclass(frozen=True)
class NamedParameter:
    """A parameter of the user's model that the optimizer has."""

    name: str
    tensor: torch.nn.Parameter
    group: int
    """The index of the parameter's group in the user's optimizer."""
    index: int
    """How many trainable parameters the model has registered before this one."""

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


class Named(NamedTuple):
    """The parameters of an optimizer, by their names in the model."""

    trained: list[NamedParameter]
    """In registration order, a tied one once."""
    frozen: list[NamedParameter]
    """Those that do not require a gradient: an optimizer passes over them. Their ``index`` means nothing."""


def plain_name(name: str) -> str:
    """``name`` without what torch.compile has put into it: state is saved and loaded under one name, compiled or
    not."""
    return name.replace(_COMPILED, "")


def parameters_by_name(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """``model.named_parameters()``, under plain names."""
    return ((plain_name(name), tensor) for name, tensor in model.named_parameters())


def buffers_by_name(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """``model.named_buffers()``, under plain names."""
    return ((plain_name(name), tensor) for name, tensor in model.named_buffers())


def named_parameters(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, partial: bool = False
) -> list[NamedParameter]:
    """The trainable parameters of ``model`` in registration order; see :func:`name_parameters`."""
    return name_parameters(model, members_of(optimizer), partial=partial).trained


def members_of(optimizer: torch.optim.Optimizer) -> list[list[torch.Tensor]]:
    """The parameters of each of the optimizer's groups."""
    return [list(entry["params"]) for entry in optimizer.param_groups]


def name_parameters(
    model: torch.nn.Module, members: Sequence[Sequence[torch.Tensor]], *, partial: bool = False
) -> Named:
    """The parameters of an optimizer whose groups have ``members``, by their names in ``model``.

    UsageError for a trainable parameter that the optimizer does not have (unless ``partial``: another engine trains
    it), for a tensor that the optimizer has and the model does not, and for a trainable parameter that is not of a
    floating-point dtype, has no memory of its own for every number, or is on the meta device.
    """
    group_of = {id(tensor): group for group, entry in enumerate(members) for tensor in entry}
    found = Named([], [])
    for name, tensor in parameters_by_name(model):
        group = group_of.pop(id(tensor), None)
        if group is None and (partial or not tensor.requires_grad):
            continue
        if group is None:
            raise UsageError(
                f"parameter {name!r} is trainable, but the optimizer does not have it; add it "
                "(optimizer.add_param_group()), or freeze it (requires_grad_(False)); where another engine trains it, "
                "give both engines partial=True"
            )
        if not tensor.requires_grad:
            found.frozen.append(NamedParameter(name, tensor, group, len(found.frozen)))
            continue
        _require_trainable(name, tensor)
        found.trained.append(NamedParameter(name, tensor, group, len(found.trained)))
    if group_of:
        shapes = [list(tensor.shape) for entry in members for tensor in entry if id(tensor) in group_of]
        raise UsageError(
            f"the optimizer has {len(group_of)} parameters that are not trainable ones of the model: {shapes[:5]}; who "
            "replaces a parameter of the model (by setattr, parametrize, or another module) must do so in the "
            "optimizer too"
        )
    return found


def _require_trainable(name: str, tensor: torch.Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise UsageError(f"parameter {name!r} is {tensor.dtype}; gradients travel as floating-point numbers")
    if not unexpanded(tensor.detach()).numel() == tensor.numel():
        raise UsageError(
            f"parameter {name!r} is expanded: {tensor.numel()} numbers of shape {list(tensor.shape)} lie in the memory "
            f"of {unexpanded(tensor.detach()).numel()}, and no optimizer can write them; make the parameter of the "
            "small tensor, and expand it in forward"
        )


def require_numbers(model: torch.nn.Module) -> None:
    """UsageError for a parameter or a buffer that has no numbers, which rank 0 could give: on the meta device, or of a
    lazy module that has seen no input."""
    for kind, tensors in (("parameter", parameters_by_name(model)), ("buffer", buffers_by_name(model))):
        for name, tensor in tensors:
            if torch.nn.parameter.is_lazy(tensor):
                raise UsageError(
                    f"{kind} {name!r} is of a lazy module, and has no shape yet; run a forward pass before "
                    "commlab.strategy(), on all ranks, with inputs of one shape"
                )
            if tensor.is_meta:
                raise UsageError(
                    f"{kind} {name!r} of shape {list(tensor.shape)} is on the meta device, where it has no numbers; "
                    "give it some first: model.to_empty(device='cpu'), and then initialize or load it"
                )


def unexpanded(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of ``tensor`` that exist, each once: an expanded dimension is one long."""
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    for dim, stride in enumerate(strides):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


class _Extent(NamedTuple):
    """Where a tensor's numbers lie: in the bytes ``start .. stop - 1``, maybe with gaps."""

    start: int
    stop: int
    moved: bool
    name: str
    tensor: torch.Tensor

    @property
    def dense(self) -> bool:
        """Whether there are no gaps."""
        return self.stop - self.start == self.tensor.numel() * self.tensor.element_size()


def require_memory_of_their_own(what: str, model: torch.nn.Module, parameters: Sequence[NamedParameter]) -> None:
    """UsageError where a number of one of ``parameters`` is also a number of another parameter or buffer: ``what``
    moves parameters into other memory, and they would be tied no more. Costs a sort of the tensors by address; every
    number is looked at only where two tensors with gaps are mixed in one stretch of memory."""
    moved = {id(item.tensor) for item in parameters}
    extents: list[_Extent] = []
    for kind, tensors in (("parameter", parameters_by_name(model)), ("buffer", buffers_by_name(model))):
        for name, tensor in tensors:
            if tensor.layout is torch.strided and tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                start = tensor.data_ptr()
                stop = start + (last + 1) * tensor.element_size()
                extents.append(_Extent(start, stop, id(tensor) in moved, f"{kind} {name!r}", tensor.detach()))
    reaching: list[_Extent] = []
    for extent in sorted(extents, key=lambda extent: (extent.start, extent.stop)):
        reaching = [other for other in reaching if other.stop > extent.start]
        for other in reaching:
            if (extent.moved or other.moved) and _share_numbers(other, extent):
                raise UsageError(
                    f"{other.name} and {extent.name} share memory without being one tensor (by .data = , a view, or a "
                    f"transpose of the other), and {what} moves parameters into other memory, where they would be tied "
                    "no more; use one Parameter in both places (b.weight = a.weight), make the view in forward, or "
                    "use strategy allreduce"
                )
        reaching.append(extent)


def _share_numbers(a: _Extent, b: _Extent) -> bool:
    """Whether two tensors whose stretches of memory overlap have a byte in common: columns of one matrix do not."""
    if a.dense and b.dense:
        return True
    touched = []
    for tensor in (a.tensor, b.tensor):
        size = tensor.element_size()
        offsets = torch.zeros(tensor.shape, dtype=torch.int64, device="cpu")
        for dim, (count, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            offsets += (torch.arange(count, device="cpu") * (stride * size)).view([-1] + [1] * (tensor.dim() - dim - 1))
        touched.append((offsets.reshape(-1, 1) + torch.arange(size, device="cpu")).reshape(-1) + tensor.data_ptr())
    return bool(torch.isin(touched[0], touched[1]).any())


def adjoining(parameters: Iterable[NamedParameter]) -> list[Range]:
    """The range of each parameter in a flat buffer in which all of them lie side by side."""
    ranges, stop = [], 0
    for parameter in parameters:
        ranges.append(Range(stop, stop + parameter.tensor.numel()))
        stop = ranges[-1].stop
    return ranges
