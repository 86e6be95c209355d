"""The summary of a run over all steps and ranks: gathered once, at the end, and shown as the closing table."""

from __future__ import annotations

import platform
import resource
import struct
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..runtime.control import exchange_records
from ..runtime.group import Group
from ..strategies.engine import Engine
from .config import Config

_RECORD = struct.Struct("<6qd")
"""One rank's sums, as :func:`gather` exchanges them."""


@dataclass
class Totals:
    """This rank's sums over steps, in seconds, tokens and bytes. The first step, which warms everything up, is left
    out, and so is the second, in which memory is measured, unless there are no other steps."""

    steps: int = 0
    bytes_sent: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    forward_s: float = 0.0
    backward_s: float = 0.0
    exchange_s: float = 0.0
    waited_s: float = 0.0
    """Seconds of ``exchange_s`` in which this rank waited for ranks that computed longer."""
    update_s: float = 0.0


class Summary(NamedTuple):
    """The results of all ranks. A field ``..._per_rank`` has one number for each rank."""

    tokens_per_s: float
    servers: dict[str, str]
    """What servers report at the end: rows of the table."""
    step_ms: dict[str, float]
    """Means over this rank's steps, by the phases of a step."""
    bytes_sent_per_rank: tuple[int, ...]
    bytes_sent_per_rank_and_step: tuple[int, ...]
    node_bytes_moved_per_rank: tuple[int, ...]
    peak_bytes_per_rank: tuple[int, ...]
    memory_bytes_per_rank: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """For the metrics file."""
        flat = self._asdict()
        return {**flat.pop("servers"), **{f"{phase}_ms": ms for phase, ms in flat.pop("step_ms").items()}, **flat}


def exchanges_by_library(engine: Engine) -> bool:
    """Whether torch or Horovod exchanges the gradients, inside backward, where the time of the exchange can't be
    separated from that of the computation."""
    return not engine.buckets.buckets and engine.group.size > 1


def gather(group: Group, engine: Engine, totals: Totals, memory_bytes: int) -> Summary:
    """Exchange all ranks' sums. ``memory_bytes``: this rank's memory, the most that was measured. Collective."""
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    moved_bytes, steps = group.node_bytes_read + group.node_bytes_written, max(1, totals.steps)
    mine = (group.bytes_sent, totals.bytes_sent // steps, moved_bytes, peak_bytes, memory_bytes, totals.tokens)
    records = exchange_records(group, _RECORD.pack(*mine, totals.wall_s), "summary")
    *counted, tokens, walls_s = zip(*(_RECORD.unpack(record) for record in records), strict=True)
    # In lockstep every rank counts the tokens of all ranks; under ssp and asp only its own.
    speed = (totals.tokens if engine.averages else sum(tokens)) / max(*walls_s, 1e-9)
    times = {name.removesuffix("_s"): value for name, value in asdict(totals).items() if name.endswith("_s")}
    step_ms = {phase: 1e3 * total_s / steps for phase, total_s in times.items()}
    return Summary(speed, engine.serving_report(), step_ms, *counted)


def rows(
    config: Config,
    engine: Engine,
    summary: Summary,
    learned: dict[str, float | None],
    took_s: float,
    folder: str,
) -> dict[str, str]:
    """The closing table: titles and texts. ``learned``: ``first_loss`` and ``last_loss``, None where no step was made,
    and ``held_out_bits_per_byte``. ``took_s``: seconds since the start of the process.
    ``folder``: where the model is, "" where it is nowhere."""
    ranks, ms = engine.group.size, summary.step_ms
    hidden = exchanges_by_library(engine)
    known = ranks > 1 and engine.averages and not hidden
    waited = f" ({ms['waited']:.1f} of it for ranks that computed longer)" if known else ""
    sent, moved = summary.bytes_sent_per_rank, summary.node_bytes_moved_per_rank
    table = {
        "strategy": f"{config.strategy}, {ranks} ranks",
        **summary.servers,
        "speed": f"{summary.tokens_per_s:,.0f} tokens/s",
        "step": f"{ms['wall']:.1f} ms = forward {ms['forward']:.1f} + backward {ms['backward']:.1f} + "
        f"exchange {ms['exchange']:.1f}{waited} + update {ms['update']:.1f} + rest"
        + (" (its exchange hides in backward)" if hidden else ""),
        "sent per rank": "by torch or Horovod, not counted here"
        if hidden
        else f"{min(sent) / 1e6:.1f} .. {max(sent) / 1e6:.1f} MB"
        if ranks > 1
        else "nothing",
    }
    if any(moved):
        table["through the window"] = f"{max(moved) / 1e6:.1f} MB read and written by the busiest rank"
    table |= {
        "memory": f"{sum(summary.memory_bytes_per_rank) / 2**20:.0f} MiB in all, what ranks share counted once; at "
        f"most {max(summary.peak_bytes_per_rank) / 2**20:.0f} MiB of addresses in use by a rank",
    }
    if learned["first_loss"] is not None:  # a resumed run may have had nothing left to do
        table["loss"] = f"{learned['first_loss']:.4f} -> {learned['last_loss']:.4f} nats per token"
    if engine.precision.loss_scale is not None:
        table["skipped steps"] = f"{engine.skipped_steps}, loss scale {engine.precision.scale:g} at the end"
    return table | {
        "held-out": f"{learned['held_out_bits_per_byte']:.3f} bits per byte",
        "model": f"{folder} (transformers.GPT2LMHeadModel.from_pretrained opens it)" if folder else "NOT SAVED",
        "time": f"{took_s:.1f} s in all",
    }
