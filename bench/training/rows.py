"""The rows of the paper's table, and what is made of their runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from ..core.stats import ratio
from .jobs import Measured


class Row(NamedTuple):
    """One strategy of the table: the paper's name for it, and the trainer's flags."""

    paper: str
    flags: tuple[str, ...]
    kind: str = "commlab"
    """``commlab`` or ``peer``."""


REFERENCE = "single"

_16_BIT = ("--precision", "{16-bit}", "--loss-scale", "4096")
"""From the default scale of 65536 some of a short run's first steps overflow and are skipped, and what would be
compared then is how training goes on after that."""

ROWS = {
    REFERENCE: Row("Single GPU", ("--strategy", "single")),
    "ps": Row("Single Parameter Server", ("--strategy", "ps")),
    "dps": Row("Distributed Parameter Server", ("--strategy", "dps")),
    "horovod": Row("Horovod", ("--strategy", "horovod"), "peer"),
    "dps 16-bit": Row("Distributed Parameter Server + Apex", ("--strategy", "dps", *_16_BIT)),
    "horovod 16-bit": Row("Horovod + Apex", ("--strategy", "horovod", *_16_BIT), "peer"),
    "allreduce": Row("-", ("--strategy", "allreduce")),
    "ddp": Row("-", ("--strategy", "ddp"), "peer"),
}
"""By the names of the command line. {16-bit}: ``--precision-16``."""

HEAD = (
    "row",
    "ranks",
    "tokens/s",
    "of single",
    "step ms",
    "compute",
    "exchange",
    "update",
    "sent MB",
    "link MB",
    "memory MiB",
    "loss",
    "bits/byte",
)
"""``sent``: by the rank that sends most, counted by commlab. ``link``: by rank 0's host, counted by its interfaces,
headers included. ``exchange`` of rows with a ~ is what their step takes longer than another strategy's computation."""

LOSS_TOLERANCE = 0.02
"""Share of ``single``'s loss. Ranks add gradients in another order, and AdamW makes of a rounding error in a gradient
near 0 a whole step; 16-bit wires round besides."""


def reduced(
    name: str,
    ranks: int,
    rounds: Sequence[Measured],
    reference: Sequence[Measured],
    computing: Sequence[Measured],
) -> dict[str, Any]:
    """One line of results. ``rounds``: the row's own, ``reference``: those of ``single``, ``computing``: of a strategy
    whose exchange and computation are told apart, all in the same rounds; either may be empty."""
    row, last = ROWS[name], rounds[-1]
    hides = row.kind == "peer"
    compute = [each.compute_s for each in (computing if hides and computing else rounds)]
    update = [each.update_s for each in rounds]
    exchange = [
        max(0.0, each.step_s - compute_s - update_s) if hides else each.exchange_s
        for each, compute_s, update_s in zip(rounds, compute, update, strict=True)
    ]
    found = {
        **_head(name, ranks),
        "nodes": last.nodes,
        "rounds": len(rounds),
        "tokens_per_s": _round(median(each.tokens_per_step / each.step_s for each in rounds)),
        "step_ms": _round(1e3 * median(each.step_s for each in rounds)),
        "compute_ms": _round(1e3 * median(compute)),
        "exchange_ms": _round(1e3 * median(exchange)),
        "update_ms": _round(1e3 * median(update)),
        "exchange_is": "step - update - computation of another strategy" if hides else "measured",
        "bytes_sent": None if hides else last.bytes_sent,
        "interface_bytes": last.interface_bytes,
        "memory_bytes": int(median(each.memory_bytes for each in rounds)),
        "loss": last.loss,
        "held_out_bits_per_byte": last.held_out_bits,
        "step_samples_ms": [_round(1e3 * each.step_s) for each in rounds],
        "exchange_update_samples_ms": [
            _round(1e3 * (mine + other)) for mine, other in zip(exchange, update, strict=True)
        ],
    }
    if reference:
        speedup = ratio([each.step_s for each in reference], [each.step_s for each in rounds])
        found["speed_of_single"] = [_round(value) for value in speedup]
        found["wrong"] = int(abs(last.loss - reference[-1].loss) > LOSS_TOLERANCE * reference[-1].loss)
    return found


def missing(name: str, ranks: int, reason: str) -> dict[str, Any]:
    return {**_head(name, ranks), "missing": reason}


def _head(name: str, ranks: int) -> dict[str, Any]:
    row = ROWS[name]
    return {
        "type": "row",
        "op": "train",
        "contestant": name,
        "kind": row.kind,
        "paper": row.paper,
        "ranks": ranks,
    }


def cells(record: dict[str, Any]) -> list[str]:
    """A record under HEAD; a missing one as one cell."""
    if "missing" in record:
        return [f"{record['contestant']}, {record['ranks']} ranks: missing: {record['missing']}"]
    mark = "" if record["exchange_is"] == "measured" else "~"
    sent, on_link = record["bytes_sent"], record["interface_bytes"]
    return [
        record["contestant"],
        str(record["ranks"]),
        f"{record['tokens_per_s']:,.0f}",
        f"{record['speed_of_single'][0]:.2f}" if "speed_of_single" in record else "",
        f"{record['step_ms']:.1f}",
        f"{mark}{record['compute_ms']:.1f}",
        f"{mark}{record['exchange_ms']:.1f}",
        f"{record['update_ms']:.1f}",
        "" if sent is None else f"{sent / 1e6:.3g}",
        "" if on_link is None else f"{on_link / 1e6:.3g}",
        f"{record['memory_bytes'] / 2**20:,.0f}",
        f"{record['loss']:.4f}" + (" WRONG" if record.get("wrong") else ""),
        f"{record['held_out_bits_per_byte']:.3f}",
    ]


def _round(value: float) -> float:
    return float(f"{value:.5g}")
