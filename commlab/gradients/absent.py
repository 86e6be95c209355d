"""Gradients that are on their way. Where others update the parameters, there is nothing in ``p.grad`` between backward
and step to read or to edit; what stands there says so, to whoever touches it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..errors import UsageError

_HARMLESS = {
    getattr(torch.Tensor, name).__get__
    for name in (
        *("shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf"),
        *("is_sparse", "is_cpu", "is_cuda", "is_mps", "is_quantized"),
    )
} | {
    getattr(torch.Tensor, name)
    for name in ("size", "dim", "numel", "stride", "element_size", "is_floating_point", "__len__", "__hash__")
}
"""What may be asked of a gradient that is not here."""

_CONVERSIONS = {
    getattr(torch.Tensor, name) for name in ("to", "float", "double", "half", "bfloat16", "cpu", "cuda")
} | {torch._has_compatible_shallow_copy_type}
"""What leaves it absent: ``model.double()`` converts the gradients too, and is to be told of the parameters."""


class AbsentGradient(torch.Tensor):
    """The gradient of a parameter, of the parameter's shape, strides, dtype and device, without memory. Every operation
    on it raises UsageError with ``text``; printing shows the text."""

    text: str

    @staticmethod
    def __new__(cls, parameter: torch.Tensor, text: str, device: torch.device | None = None) -> AbsentGradient:
        made: AbsentGradient = torch.Tensor._make_wrapper_subclass(
            cls, parameter.shape, strides=parameter.stride(), dtype=parameter.dtype, device=device or parameter.device
        )
        object.__setattr__(made, "text", text)
        return made

    def __init__(self, parameter: torch.Tensor, text: str, device: torch.device | None = None):
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<{self.text}>"

    __str__ = __repr__

    def __format__(self, _: str) -> str:
        return repr(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What never reaches the dispatcher too: data_ptr(), numpy(), p.grad.data = ...
        if func in _HARMLESS or func in _CONVERSIONS:
            return super().__torch_function__(func, types, args, kwargs or {})
        if func == torch.Tensor.data.__set__ and isinstance(args[1], AbsentGradient):  # type: ignore[attr-defined]
            return None  # by model.double(), which has converted this one
        raise UsageError(_text_of(args, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._to_copy.default:
            own, given = args[0], kwargs or {}
            dtype, device = given.get("dtype") or own.dtype, given.get("device") or own.device
            like = torch.empty_strided(own.size(), own.stride(), dtype=dtype, device="meta")
            return AbsentGradient(like, own.text, device)
        raise UsageError(_text_of(args, kwargs))


def _text_of(*arguments: Any) -> str:
    """The text of the first absent gradient among the arguments of an operation."""
    for value in arguments:
        if isinstance(value, AbsentGradient):
            return value.text
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
        if found := _text_of(*inner):
            return found
    return ""


class AbsentGradients:
    """What stands in ``p.grad`` of all parameters of a strategy while their gradients are on their way.

    ``tensors``: (name, tensor): parameters, and what the optimizer has for them. ``strategy``: its name; ``instead``:
    what the user is to do.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]], strategy: str, instead: str):
        self._strategy, self._instead = strategy, instead
        self.entries = [(name, tensor, AbsentGradient(tensor, self._text(name))) for name, tensor in tensors]
        """The name of each parameter, the tensor, and what stands in its ``grad``."""

    def _text(self, name: str) -> str:
        return (
            f"strategy {self._strategy}: the gradient of parameter {name!r} is on its way to whoever updates the "
            "parameter, and is not here between backward() and step(), neither to be read nor to be edited, nor can "
            f"another backward pass add to it. {self._instead}"
        )

    def complaint(self, rank: int, names: Sequence[str]) -> str:
        """What to say of parameters ``names``, whose ``p.grad`` was no longer what stands there."""
        more = f" (and of {len(names) - 1} more)" if len(names) > 1 else ""
        return (
            f"rank {rank}: p.grad of {names[0]!r}{more} was set to something else between backward() and step(), which "
            f"has no effect under strategy {self._strategy}: the gradient is on its way to whoever updates the "
            f"parameter. {self._instead}"
        )
