"""torch's process groups over gloo alone, beside the default one of the process: alike on every torch from 2.4 on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist


def set_default(group: Any, kind: Any) -> None:
    """Tell C++ which kind of backend ``group`` asks first. Up to torch 2.5 a group knows that since it was made."""
    if hasattr(group, "_set_default_backend"):
        group._set_default_backend(kind)


def group_of(gloo: dist.ProcessGroupGloo, store: dist.Store, devices: Iterable[str]) -> dist.ProcessGroup:
    """A process group that gives tensors on ``devices`` to ``gloo``, and has no other backend.

    The group is a ``ProcessGroup`` of exactly that type, whose methods let go of the GIL; those that a Python subclass
    inherits don't, and would lock out the thread that gloo needs.
    """
    make_group: Any = dist.ProcessGroup
    kind = make_group.BackendType.GLOO
    try:
        group = make_group(store, gloo.rank(), gloo.size())
    except TypeError:
        # Up to torch 2.5 a group is told its backend when it is made.
        group = make_group(store, gloo.rank(), gloo.size(), make_group.Options("gloo"))
    set_default(group, kind)
    for device in devices:
        group._register_backend(torch.device(device), kind, gloo)
    return group  # type: ignore[no-any-return]
