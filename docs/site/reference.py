"""The API pages: which names are on which. A test holds them to the public names."""

from __future__ import annotations

REFERENCE = {
    "start": ("Start and end", ["runtime.world.init", "runtime.world.shutdown", "runtime.group.Group"]),
    "collectives": (
        "Collectives",
        [
            *("collectives.allreduce.allreduce", "collectives.allreduce.allreduce_async", "runtime.handle.Handle"),
            *(f"collectives.operations.{name}" for name in ("reduce_scatter", "allgather", "broadcast", "reduce")),
            *(f"collectives.exchanges.{name}" for name in ("alltoall", "gather", "scatter", "allgather_parts")),
            *(f"collectives.messages.{name}" for name in ("send", "send_async", "recv", "recv_async")),
            *("collectives.grouped.grouped_allreduce", "checkpoint.objects.broadcast_object"),
            *("checkpoint.objects.allgather_object", "collectives.operations.barrier", "collectives.operations.empty"),
        ],
    ),
    "training": (
        "Training",
        ["strategies.strategy", "strategies.engine.Engine", "checkpoint.checkpoints.Checkpoints", "apex.fused_adam"],
    ),
    "parameter-server": ("Parameter server", ["ps.store.ParameterServer"]),
    "c10d": ("torch.distributed", ["c10d.make_default", "c10d.replace_gloo", "c10d.register", "c10d.ddp_hook.DDPHook"]),
    "errors": (
        "Errors",
        [
            *("errors.CommlabError", "errors.UsageError", "errors.DisagreementError", "errors.RefusedError"),
            *("errors.NotFiniteError", "errors.PeerLostError", "errors.PeerTimeoutError", "errors.SharedMemoryError"),
        ],
    ),
}
"""Each API page: its title, and the names on it."""
