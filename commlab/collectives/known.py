"""Allreduces that were made before: native code finds such a call again by the tensor's dtype and shape and by which
objects its words are, and does all of it (kernels/bind_known.cpp). What a tensor is it asks torch's DLPack functions,
which torch has had since 2.10; with older ones every call is looked up in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..native import library
from ..native.versions import count_write
from ..runtime import world
from ..runtime.group import Group
from .plan import Plan
from .tensors import PAGE_BITS, may_write_at, writable_pages

_KNOWN_CALLS = 1024
"""Of a group. Programs that make up a new name for each call have no end of them."""


def _unknown(*call: Any) -> bool:
    return False


_exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
_native = library.built if _exchange is not None and hasattr(library.built, "know_torch") else None
if _native is not None:
    _classes, _pages = (torch.Tensor, torch.nn.Parameter), (writable_pages, PAGE_BITS, may_write_at)
    _native.know_torch(*_classes, *_pages, count_write, vars(world), _exchange)

at_once_where_known: Callable[..., bool] = _unknown if _native is None else _native.allreduce_at_once
"""``at_once_where_known(tensor, op, name, algorithm, wire, group)``: whether the call is known and was done. If not,
nothing was done."""


def know(group: Group, plan: Plan, tensor: torch.Tensor, op: str, name: str | None, algorithm: str) -> None:
    """The next call with these arguments, and numbers as they are, may go the same way as this one, which was done at
    once."""
    if _native is None:
        return
    words = op, name, algorithm, None
    key = _native.allreduce_key(tensor, *words)
    if key is None:
        return
    if len(group.known_calls) >= _KNOWN_CALLS:
        group.known_calls.clear()
    # With the words, so that no other object gets the place of one.
    group.known_calls[key] = plan.signature, plan.at_once, plan.few is not None, plan.shared is not None, words
