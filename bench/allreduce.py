"""``mpirun -n P python -m bench.allreduce``: commlab's collectives against MPI, gloo and Horovod, on the same bytes.

CPU is what a call takes of all ranks' cores together, user and system time, waits that spin included: where ranks share
cores with each other, or with computing, it tells more than the time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from statistics import median

import commlab
from commlab.job import launch
from commlab.runtime.links import LINKS
from commlab.runtime.world import TRANSPORTS, WINDOWS

from .contestants import PEERS, floor
from .contestants.case import DTYPES, EXACT_UP_TO, OPS, Case
from .contestants.commlab import NAMES, Groups, commlab_blocks, groups_of
from .contestants.products import Products
from .core import harness, table
from .core.arguments import count, names, sizes
from .core.harness import Block, Result, progress_line
from .core.program import RankProgram, Section, Session
from .core.ranks import share_cores
from .core.results import Record
from .core.stats import bus_factor, format_bytes, format_ratio, format_us, percentile, ratio

SIZES = "4B,64B,1KB,16KB,64KB,256KB,1MB,4MB,16MB,100MB,256MB"
CHECKS = {"both": (True, False), "on": (True,), "off": (False,)}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", choices=OPS, default="allreduce")
    parser.add_argument(
        "--sizes", type=sizes, default=SIZES, metavar="LIST", help="bytes of the whole buffer, as 4B,64KiB,100MB"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--algorithms", type=names(*NAMES), default=",".join(NAMES), metavar="LIST")
    parser.add_argument(
        "--wires", type=names("none", "fp16", "bf16"), default="none,fp16", metavar="LIST", help="for allreduce"
    )
    parser.add_argument("--peers", type=names("none", *PEERS), default=",".join(PEERS), metavar="LIST", help="or none")
    parser.add_argument("--rounds", type=count, default=11, help="samples per contestant, interleaved")
    parser.add_argument(
        "--sample-ms",
        type=count,
        metavar="MS",
        help="how long a sample lasts at least (default: 2; with --computing 300); on a shaped link longer than its"
        " burst, or small sizes never meet it",
    )
    parser.add_argument(
        "--check", choices=CHECKS, default="both", help="commlab with its agreement check, without it, or both"
    )
    parser.add_argument("--transport", choices=TRANSPORTS, default="mpi")
    parser.add_argument("--window", choices=WINDOWS, default="auto", help="off: the ranks of a node send messages too")
    parser.add_argument("--links", choices=LINKS, default="auto", help="what joins several nodes")
    parser.add_argument(
        "--computing",
        action="store_true",
        help="beside a thread of matrix products in every rank (its CPU counts)",
    )
    parser.add_argument("--links-check", choices=("on", "off"), default="on", help="off: frames carry no checksum")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the contestants")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="for one turn; then the job ends")


def contestants(case: Case, groups: Groups, options: argparse.Namespace) -> list[Block]:
    wires = [None if wire == "none" else wire for wire in options.wires]
    blocks = floor.blocks(case) + commlab_blocks(case, groups, options.algorithms, wires, CHECKS[options.check])
    for peer in options.peers:
        blocks += PEERS[peer](case) if peer != "none" else []
    return blocks


def exact_up_to(options: argparse.Namespace) -> int:
    """The largest integer of the data, which the narrowest dtype or wire of the command line must hold exactly."""
    wires = {"fp16": "float16", "bf16": "bfloat16"}
    return min(
        EXACT_UP_TO.get(name, 2**11) for name in (options.dtype, *(wires.get(wire, "") for wire in options.wires))
    )


def connect(options: argparse.Namespace) -> commlab.Group:
    share_cores()
    return commlab.init(
        options.transport,
        timeout_s=options.timeout,
        window=options.window,
        links=options.links,
        links_check=options.links_check == "on",
    )


def measure(session: Session) -> Iterator[Section]:
    """A section per size. The memory of a size is given back before the next size asks for more."""
    options, group = session.options, session.group
    largest_bytes = max(options.sizes) + DTYPES[options.dtype].itemsize * launch.detect().size
    groups = groups_of(group, largest_bytes)
    session.run["progress"] = group.progress_mode
    for at, size_bytes in enumerate(options.sizes):
        yield one_size(size_bytes, at, groups, session)


def one_size(size_bytes: int, at: int, groups: Groups, session: Session) -> Section:
    options, ranks = session.options, session.ranks
    numel = max(1, size_bytes // DTYPES[options.dtype].itemsize)
    case = Case(options.op, numel, DTYPES[options.dtype], ranks.rank, ranks.size, exact_up_to(options))
    show = progress_line(ranks, f"{options.op} {format_bytes(case.bytes)} ({at + 1} of {len(options.sizes)})")
    blocks = contestants(case, groups, options)
    # Where others compute, ranks leave the barrier before a sample up to 10 ms apart: a short one would measure that.
    sample_s = (options.sample_ms or (300 if options.computing else 2)) / 1e3
    with Products() if options.computing else nullcontext():
        results = harness.measure(blocks, ranks, options.rounds, options.seed + at, options.timeout, show, sample_s)
    found = records(results, case)
    return Section(f"{title(case, found)}\n{table.render(HEAD, [cells(record) for record in found])}\n", found)


HEAD = (
    "contestant", "p50 us", "p99 us", "algbw", "busbw GB/s", "CPU us", "wrong", "/ floor", "/ best peer", "check us",
)  # fmt: skip


def records(results: Sequence[Result], case: Case) -> list[Record]:
    """One record per contestant. Ratios are of times, ``[median, low, high]`` over the rounds: below 1 is faster."""
    return [_record(result, results, case) for result in results]


def _record(result: Result, results: Sequence[Result], case: Case) -> Record:
    labels = result.contestant.labels
    record: Record = {
        "type": "row",
        "op": case.op,
        "bytes": case.bytes,
        "dtype": str(case.dtype).removeprefix("torch."),
        "ranks": case.size,
        "contestant": result.contestant.name,
        **labels,
    }
    if result.missing:
        return {**record, "missing": result.missing}
    p50_s = median(result.samples_s)
    algbw = case.bytes / p50_s / 1e9
    record |= {
        "p50_us": round(p50_s * 1e6, 3),
        "p99_us": round(percentile(result.samples_s, 99) * 1e6, 3),
        "algbw_GBps": float(f"{algbw:.4g}"),
        "busbw_GBps": float(f"{algbw * bus_factor(case.op, case.size):.4g}"),
        "cpu_us": round(median(result.cpu_s) * 1e6, 3),
        "bytes_sent": result.bytes_sent,
        "wrong": result.wrong,
        "rounds": len(result.samples_s),
        "repeats": result.repeats,
        "samples_us": [round(sample * 1e6, 3) for sample in result.samples_s],
    }
    if labels["kind"] == "floor":
        del record["busbw_GBps"]  # nothing crosses a link
    else:
        record |= _against("floor", result, fastest(results, "floor"))
    if labels["kind"] == "commlab":
        record |= _against("best_peer", result, fastest(results, "peer", wires=(None, labels["wire"])))
        record |= _check_cost(result, results)
    return record


def fastest(results: Sequence[Result], kind: str, wires: Sequence[str | None] = (None,)) -> Result | None:
    """The contestant of this kind with the lowest median. Peers with a 16-bit wire count only
    where ``wires`` has that wire."""
    able = [
        each
        for each in results
        if not each.missing
        and not each.wrong
        and each.contestant.labels["kind"] == kind
        and each.contestant.labels.get("wire") in wires
    ]
    return min(able, key=lambda each: median(each.samples_s), default=None)


def _against(column: str, result: Result, other: Result | None) -> Record:
    if other is None:
        return {}
    found = ratio(result.samples_s, other.samples_s)
    return {column: other.contestant.name, f"ratio_{column}": [float(f"{value:.4g}") for value in found]}


def _check_cost(result: Result, results: Sequence[Result]) -> Record:
    """The time that the agreement check adds: this contestant against its twin without the check, round by round."""
    labels = result.contestant.labels
    if not labels["check"]:
        return {}
    twin = next(
        (each for each in results if not each.missing and each.contestant.labels == {**labels, "check": False}), None
    )
    if twin is None:
        return {}
    cost_s = median(checked - bare for checked, bare in zip(result.samples_s, twin.samples_s, strict=True))
    return {"check_us": round(cost_s * 1e6, 3)}


def title(case: Case, records: Sequence[Record]) -> str:
    """The headline of a table: the operation, and the contestants that the ratios are to."""
    text = f"{case.op}, {format_bytes(case.bytes)} of {str(case.dtype).removeprefix('torch.')}, {case.size} ranks"
    for column, title_word in (("floor", "floor"), ("best_peer", "best peer")):
        names = dict.fromkeys(record[column] for record in records if column in record)
        if names:
            text += f"; {title_word}: {' / '.join(names)}"
    return text


def cells(record: Record) -> list[str]:
    """The record as cells under HEAD; a missing contestant as one cell."""
    if "missing" in record:
        return [f"{record['contestant']}: missing: {record['missing']}"]
    return [
        record["contestant"],
        format_us(record["p50_us"] / 1e6),
        format_us(record["p99_us"] / 1e6),
        f"{record['algbw_GBps']:.3g}",
        f"{record['busbw_GBps']:.3g}" if "busbw_GBps" in record else "",
        format_us(record["cpu_us"] / 1e6),
        str(record["wrong"]),
        f"{record['ratio_floor'][0]:.3g}" if "ratio_floor" in record else "",
        format_ratio(record.get("ratio_best_peer")),
        f"{record['check_us']:.1f}" if "check_us" in record else "",
    ]


PROGRAM = RankProgram("bench.allreduce", __doc__, arguments, measure, connect, alone="one rank exchanges nothing")


def main() -> int:
    return PROGRAM.main()


if __name__ == "__main__":
    sys.exit(main())
