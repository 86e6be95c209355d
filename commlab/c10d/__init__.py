"""torch.distributed's backend ``commlab``: ``init_process_group("commlab")``, and nothing else changes.

This file is loaded by every ``import torch`` of an environment in which commlab is installed (the entry points
``torch.backends`` and ``torch.distributed.backends``), so it loads nothing, and never raises.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ddp_hook import DDPHook

__all__ = ["DDPHook", "make_default", "register", "replace_gloo"]

NAME = "commlab"


def __getattr__(name: str) -> Any:
    if name != "DDPHook":
        raise AttributeError(f"module 'commlab.c10d' has no attribute {name!r}")
    from .ddp_hook import DDPHook

    return DDPHook


def register() -> None:
    """Tell torch.distributed of the backend. Called by torch itself; a second call does nothing. Never raises, because
    torch would fail to import."""
    try:
        import torch.distributed as dist

        if not dist.is_available() or NAME.upper() in dist.Backend._plugins:
            return
        dist.Backend.register_backend(NAME, _create, devices=["cpu"])
        from .rendezvous import meet_under_mpirun

        meet_under_mpirun()
    except Exception:
        import logging

        logging.getLogger("commlab").warning("torch.distributed has no backend 'commlab'", exc_info=True)


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """What init_process_group and new_group call, on members alone."""
    import torch.distributed as dist

    from .connect import Member
    from .process_group import CommlabProcessGroup
    from .stand_in import call_of, refuse_mixed

    call = call_of()
    refuse_mixed(call, rank)
    here = Member(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Member(rank, size)
    return CommlabProcessGroup(store, rank, size, timeout, call.name, here)


def make_default() -> None:
    """From now on ``init_process_group()`` without a backend means commlab for CPU tensors; programs that name one are
    left alone."""
    import torch.distributed as dist

    register()
    dist.Backend.default_device_backend_map["cpu"] = NAME


def replace_gloo() -> None:
    """From now on groups of the backend ``"gloo"`` are commlab's, and still answer to that name. For programs that
    can't be changed: it patches torch.distributed. ``"cpu:gloo,cuda:nccl"`` stays what it is."""
    from .stand_in import install

    register()
    install()
