"""The rows of the paper's table, and the records that their training runs become."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from ..core.results import Record
from ..core.stats import ratio
from .jobs import Measured


class PaperRow(NamedTuple):
    """One strategy of the table: the paper's name for it, and the trainer's flags."""

    paper: str
    flags: tuple[str, ...]
    kind: str = "commlab"
    """``commlab`` or ``peer``."""


REFERENCE = "single"

_16_BIT = ("--precision", "{16-bit}", "--loss-scale", "4096")
"""The flags of the 16-bit rows. From the default scale of 65536 some of a short run's first steps overflow and are
skipped, and the rows would differ in their numbers of steps."""

ROWS = {
    REFERENCE: PaperRow("Single GPU", ("--strategy", "single")),
    "ps": PaperRow("Single Parameter Server", ("--strategy", "ps")),
    "dps": PaperRow("Distributed Parameter Server", ("--strategy", "dps")),
    "horovod": PaperRow("Horovod", ("--strategy", "horovod"), "peer"),
    "dps 16-bit": PaperRow("Distributed Parameter Server + Apex", ("--strategy", "dps", *_16_BIT)),
    "horovod 16-bit": PaperRow("Horovod + Apex", ("--strategy", "horovod", *_16_BIT), "peer"),
    "allreduce": PaperRow("-", ("--strategy", "allreduce")),
    "ddp": PaperRow("-", ("--strategy", "ddp"), "peer"),
}
"""The rows by their names on the command line. ``{16-bit}`` stands for the value of ``--precision-16``."""

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
"""How far a loss may be from ``single``'s, as a share of the latter. Ranks add gradients in another order, and AdamW
makes of a rounding error in a gradient near 0 a whole step; 16-bit wires round besides."""


def reduced(
    name: str,
    ranks: int,
    rounds: Sequence[Measured],
    reference: Sequence[Measured],
    computing: Sequence[Measured],
) -> Record:
    """The record of a row. ``rounds``: the row's own runs; ``reference``: the runs of ``single``; ``computing``: the
    runs of a strategy whose exchange and computation are measured apart. All are of the same rounds; the latter two may
    be empty."""
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
            _round(1e3 * (exchange_s + update_s)) for exchange_s, update_s in zip(exchange, update, strict=True)
        ],
    }
    if reference:
        speedup = ratio([each.step_s for each in reference], [each.step_s for each in rounds])
        found["speed_of_single"] = [_round(value) for value in speedup]
        found["wrong"] = int(abs(last.loss - reference[-1].loss) > LOSS_TOLERANCE * reference[-1].loss)
    return found


def missing(name: str, ranks: int, reason: str) -> Record:
    """The record of a row that cannot run."""
    return {**_head(name, ranks), "missing": reason}


def _head(name: str, ranks: int) -> Record:
    row = ROWS[name]
    return {
        "type": "row",
        "op": "train",
        "contestant": name,
        "kind": row.kind,
        "paper": row.paper,
        "ranks": ranks,
    }


def cells(record: Record) -> list[str]:
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
