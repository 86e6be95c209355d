"""commlab under gloo's name, for programs that can't be changed; and what the call that makes a group looks like."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from ..errors import UsageError

_HELPER = "_new_process_group_helper"
_standing_in: list[str] = []
"""The names under which groups are being made; the innermost last."""


class GroupCall(NamedTuple):
    """How torch.distributed asks for a group."""

    name: str
    """The backend's name, by which the group answers."""
    devices: dict[str, str]
    """Which backend the caller wants for which kind of device."""


def call_of() -> GroupCall:
    """The call under way. A creator of a backend is not told the group's devices, so they are read off the
    caller's frame."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != _HELPER:
        frame = frame.f_back
    name = _standing_in[-1] if _standing_in else "commlab"
    if frame is None:
        return GroupCall(name, {})
    found = frame.f_locals
    config = found.get("backend_config")
    devices = dict(config.get_device_backend_map()) if config is not None else {}
    return GroupCall(name, {key: str(value) for key, value in devices.items()})


def refuse_mixed(call: GroupCall, rank: int) -> None:
    """UsageError where other devices have another backend: up to torch 2.13 a group written in Python is the whole
    group, so CUDA tensors would silently go another way than asked for."""
    others = {device: name for device, name in call.devices.items() if name != "commlab"}
    if others:
        asked = ",".join(f"{device}:{name}" for device, name in call.devices.items())
        names = ", ".join(sorted(set(others.values())))
        raise UsageError(
            f"rank {rank}: backend {asked!r}: commlab can't share a group with {names}"
            "; give each its own group: init_process_group for one, new_group(backend=...) for the other"
        )


def install() -> None:
    """Make commlab's groups where torch.distributed is asked for gloo's. A second call does nothing."""
    import torch.distributed.distributed_c10d as c10d

    original: Callable[..., Any] = getattr(c10d, _HELPER)
    if getattr(original, "commlab", False):
        return

    def helper(group_size: int, group_rank: int, ranks: Any, backend: Any, *more: Any, **options: Any) -> Any:
        if not _means_gloo(backend):
            return original(group_size, group_rank, ranks, backend, *more, **options)
        _standing_in.append("gloo")
        try:
            made = original(group_size, group_rank, ranks, c10d.Backend("commlab"), *more, **options)
        finally:
            _standing_in.pop()
        group = made[0]
        if group in c10d._world.pg_map:
            c10d._world.pg_map[group] = (c10d.Backend("gloo"), c10d._world.pg_map[group][1])
            c10d._world.pg_backend_config[group] = str(c10d.BackendConfig(c10d.Backend("gloo")))
        return made

    helper.commlab = True  # type: ignore[attr-defined]
    setattr(c10d, _HELPER, helper)


def _means_gloo(backend: Any) -> bool:
    import torch

    # torch.accelerator came with torch 2.6.
    device = getattr(torch, "accelerator", torch.cuda)
    name = str(backend).lower()
    return name in ("gloo", "cpu:gloo") or (name == "undefined" and not device.is_available())
