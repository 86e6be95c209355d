"""commlab: a gradient-communication engine for data-parallel PyTorch.

The public names, loaded when first used, so that importing one part loads no other.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .job.dynamo import leave_alone
from .job.version import __version__

_HOME = {
    "init": "runtime.world",
    "shutdown": "runtime.world",
    "allreduce": "collectives.allreduce",
    "allreduce_async": "collectives.allreduce",
    "reduce_scatter": "collectives.operations",
    "allgather": "collectives.operations",
    "broadcast": "collectives.operations",
    "reduce": "collectives.operations",
    "alltoall": "collectives.exchanges",
    "gather": "collectives.exchanges",
    "scatter": "collectives.exchanges",
    "allgather_parts": "collectives.exchanges",
    "grouped_allreduce": "collectives.grouped",
    "send": "collectives.messages",
    "send_async": "collectives.messages",
    "recv": "collectives.messages",
    "recv_async": "collectives.messages",
    "broadcast_object": "checkpoint.objects",
    "allgather_object": "checkpoint.objects",
    "barrier": "collectives.operations",
    "empty": "collectives.operations",
    "Group": "runtime.group",
    "Handle": "runtime.handle",
    "ParameterServer": "ps.store",
    "strategy": "strategies",
    "CommlabError": "errors",
    "UsageError": "errors",
    "DisagreementError": "errors",
    "NotFiniteError": "errors",
    "PeerLostError": "errors",
    "PeerTimeoutError": "errors",
    "RefusedError": "errors",
    "SharedMemoryError": "errors",
}

__all__ = [
    "CommlabError",
    "DisagreementError",
    "Group",
    "Handle",
    "NotFiniteError",
    "ParameterServer",
    "PeerLostError",
    "PeerTimeoutError",
    "RefusedError",
    "SharedMemoryError",
    "UsageError",
    "__version__",
    "allgather",
    "allgather_object",
    "allgather_parts",
    "allreduce",
    "allreduce_async",
    "alltoall",
    "barrier",
    "broadcast",
    "broadcast_object",
    "empty",
    "gather",
    "grouped_allreduce",
    "init",
    "recv",
    "recv_async",
    "reduce",
    "reduce_scatter",
    "scatter",
    "send",
    "send_async",
    "shutdown",
    "strategy",
]

if TYPE_CHECKING:
    from .checkpoint.objects import allgather_object, broadcast_object
    from .collectives.allreduce import allreduce, allreduce_async
    from .collectives.exchanges import allgather_parts, alltoall, gather, scatter
    from .collectives.grouped import grouped_allreduce
    from .collectives.messages import recv, recv_async, send, send_async
    from .collectives.operations import allgather, barrier, broadcast, empty, reduce, reduce_scatter
    from .errors import (
        CommlabError,
        DisagreementError,
        NotFiniteError,
        PeerLostError,
        PeerTimeoutError,
        RefusedError,
        SharedMemoryError,
        UsageError,
    )
    from .ps.store import ParameterServer
    from .runtime.group import Group
    from .runtime.handle import Handle
    from .runtime.world import init, shutdown
    from .strategies import strategy

leave_alone()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'commlab' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
