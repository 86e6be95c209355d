"""From results to rows: what a contestant took, beside the floor and the best peer of the same rounds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from .contestants.case import Case
from .core.harness import Result
from .core.stats import bus_factor, format_bytes, format_ratio, format_us, percentile, ratio

HEAD = ("contestant", "p50 us", "p99 us", "algbw", "busbw GB/s", "wrong", "/ floor", "/ best peer", "check us")


def rows(results: Sequence[Result], case: Case) -> list[dict[str, Any]]:
    """One record per contestant. Ratios are of times, ``[median, low, high]`` over the rounds: below 1 is faster."""
    return [_row(result, results, case) for result in results]


def _row(result: Result, results: Sequence[Result], case: Case) -> dict[str, Any]:
    labels = result.contestant.labels
    row: dict[str, Any] = {
        "type": "row",
        "op": case.op,
        "bytes": case.bytes,
        "dtype": str(case.dtype).removeprefix("torch."),
        "ranks": case.size,
        "contestant": result.contestant.name,
        **labels,
    }
    if result.missing:
        return {**row, "missing": result.missing}
    p50_s = median(result.samples_s)
    algbw = case.bytes / p50_s / 1e9
    row |= {
        "p50_us": round(p50_s * 1e6, 3),
        "p99_us": round(percentile(result.samples_s, 99) * 1e6, 3),
        "algbw_GBps": float(f"{algbw:.4g}"),
        "busbw_GBps": float(f"{algbw * bus_factor(case.op, case.size):.4g}"),
        "bytes_sent": result.bytes_sent,
        "wrong": result.wrong,
        "rounds": len(result.samples_s),
        "repeats": result.repeats,
        "samples_us": [round(sample * 1e6, 3) for sample in result.samples_s],
    }
    if labels["kind"] == "floor":
        del row["busbw_GBps"]  # nothing crosses a link
    else:
        row |= _against("floor", result, fastest(results, "floor"))
    if labels["kind"] == "commlab":
        row |= _against("best_peer", result, fastest(results, "peer", wires=(None, labels["wire"])))
        row |= _check_cost(result, results)
    return row


def fastest(results: Sequence[Result], kind: str, wires: Sequence[str | None] = (None,)) -> Result | None:
    """The contestant of this kind with the lowest median. On a 16-bit wire peers may use one too; else they may not."""
    able = [
        each
        for each in results
        if not each.missing
        and not each.wrong
        and each.contestant.labels["kind"] == kind
        and each.contestant.labels.get("wire") in wires
    ]
    return min(able, key=lambda each: median(each.samples_s), default=None)


def _against(column: str, result: Result, other: Result | None) -> dict[str, Any]:
    if other is None:
        return {}
    found = ratio(result.samples_s, other.samples_s)
    return {column: other.contestant.name, f"ratio_{column}": [float(f"{value:.4g}") for value in found]}


def _check_cost(result: Result, results: Sequence[Result]) -> dict[str, Any]:
    """What the agreement check adds: this contestant against itself without it, round by round."""
    labels = result.contestant.labels
    if not labels["check"]:
        return {}
    twin = next(
        (each for each in results if not each.missing and each.contestant.labels == {**labels, "check": False}), None
    )
    if twin is None:
        return {}
    cost_s = median(ours - bare for ours, bare in zip(result.samples_s, twin.samples_s, strict=True))
    return {"check_us": round(cost_s * 1e6, 3)}


def title(case: Case, records: Sequence[dict[str, Any]]) -> str:
    """What a table is about, and what its ratios are to."""
    text = f"{case.op}, {format_bytes(case.bytes)} of {str(case.dtype).removeprefix('torch.')}, {case.size} ranks"
    for column, said in (("floor", "floor"), ("best_peer", "best peer")):
        names = dict.fromkeys(record[column] for record in records if column in record)
        if names:
            text += f"; {said}: {' / '.join(names)}"
    return text


def cells(record: dict[str, Any]) -> list[str]:
    """The record as cells under HEAD; a missing contestant as one cell."""
    if "missing" in record:
        return [f"{record['contestant']}: missing: {record['missing']}"]
    return [
        record["contestant"],
        format_us(record["p50_us"] / 1e6),
        format_us(record["p99_us"] / 1e6),
        f"{record['algbw_GBps']:.3g}",
        f"{record['busbw_GBps']:.3g}" if "busbw_GBps" in record else "",
        str(record["wrong"]),
        f"{record['ratio_floor'][0]:.3g}" if "ratio_floor" in record else "",
        format_ratio(record.get("ratio_best_peer")),
        f"{record['check_us']:.1f}" if "check_us" in record else "",
    ]
