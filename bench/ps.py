"""``mpirun -n P python -m bench.ps``: push and pull against parameter servers, one or several; the other ranks work.

A sample is a session of its own: a store is built on all ranks, the workers push a tensor and pull what it became,
clock after clock, and close it. Contestants alternate by round. Beside them: the same bytes to the server and back as
bare MPI messages, and the floor, which is every rank copying at once what it has to take in; between hosts that
bench.cluster made, the time that the busiest host's link needs for its bytes. Every number that came back is checked.

    mpirun -n 2 python -m bench.ps
    python -m bench.cluster --hosts 4 --ranks-per-host 2 -- python -m bench.ps --servers 1,2,4 --sizes 16MB --rounds 3
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from statistics import median

import commlab
from commlab.runtime.world import TRANSPORTS

from .contestants.parameter_server import PushPull, contestants
from .core import table
from .core.arguments import count, counts, names, sizes
from .core.program import RankProgram, Section, Session
from .core.ranks import Ranks, link_bytes_per_s, share_cores
from .core.results import Record
from .core.stats import format_bytes, format_ratio, format_us, percentile, ratio

SIZES = "4KB,64KB,1MB,4MB,16MB,64MB"
SAMPLE_S = 0.02
MAX_CLOCKS = 500
HEAD = ("contestant", "p50 us", "p99 us", "GB/s", "wrong", "/ floor", "/ messages")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=sizes, default=SIZES, metavar="LIST", help="bytes of the tensor")
    parser.add_argument(
        "--wires", type=names("none", "fp16", "bf16"), default="none,bf16", metavar="LIST", help="none: fp32"
    )
    parser.add_argument(
        "--servers",
        type=counts,
        default="1",
        metavar="LIST",
        help="the last ranks of the last nodes; as many others work, whatever the number of servers",
    )
    parser.add_argument("--rounds", type=count, default=7, help="samples per contestant, interleaved")
    parser.add_argument("--transport", choices=TRANSPORTS, default="mpi")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the contestants")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="of silence; then the job ends")


def connect(options: argparse.Namespace) -> commlab.Group:
    share_cores()
    return commlab.init(options.transport, timeout_s=options.timeout)


def measure(session: Session) -> Iterator[Section]:
    """A section per size."""
    options, group = session.options, session.group
    session.run["progress"] = group.progress_mode
    for at, size_bytes in enumerate(options.sizes):
        numel = max(1, size_bytes // 4)
        playing = contestants(group, numel, options)
        samples = samples_of(playing, session.ranks, options.rounds, options.seed + at)
        made = records(samples, playing, 4 * numel, group.nodes)
        title = f"push+pull of {format_bytes(4 * numel)} of float32, {made[0]['workers']} workers"
        yield Section(f"{title}\n{table.render(HEAD, [cells(record) for record in made])}\n", made)


def samples_of(
    playing: dict[str, PushPull], ranks: Ranks, rounds: int, seed: int
) -> dict[str, tuple[list[float], int]]:
    """The samples of every contestant, in seconds of the slowest rank, and how many numbers are wrong on all ranks.
    Collective."""
    clocks = {}
    for name, contestant in playing.items():
        [spent_s] = ranks.maximum([_rested(ranks, contestant.session(1))[0]])
        clocks[name] = min(MAX_CLOCKS, max(1, round(SAMPLE_S / max(spent_s, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in playing}
    wrong, order = dict.fromkeys(playing, 0), random.Random(seed)
    for _ in range(rounds):
        for name in order.sample(list(playing), len(playing)):
            ranks.barrier()
            spent_s, bad = _rested(ranks, playing[name].session(clocks[name]))
            samples[name] += ranks.maximum([spent_s])
            wrong[name] += int(ranks.total([bad])[0])
    return {name: (samples[name], wrong[name]) for name in playing}


def _rested(ranks: Ranks, value: tuple[float, int]) -> tuple[float, int]:
    """The value, once all ranks are here. Waiting leaves the cores to others, which MPI's own waiting does not."""
    ranks.rest()
    return value


def records(
    found: dict[str, tuple[list[float], int]],
    playing: dict[str, PushPull],
    size_bytes: int,
    nodes: Sequence[Sequence[int]],
) -> list[Record]:
    """A record per contestant. GB/s: the bytes of one worker to the servers and back, by the time."""
    link = link_bytes_per_s()
    copies = {name: median(samples) for name, (samples, _) in found.items() if playing[name].kind == "floor"}
    fastest = min(copies, key=copies.__getitem__)
    made = []
    for name, (samples, wrong) in found.items():
        p50_s, contestant = median(samples), playing[name]
        record: Record = {
            "type": "row",
            "op": "push+pull",
            "bytes": size_bytes,
            "dtype": "float32",
            "ranks": sum(map(len, nodes)),
            "nodes": len(nodes),
            "workers": len(contestant.who.workers),
            "servers": len(contestant.who.servers),
            "contestant": name,
            "kind": contestant.kind,
            "p50_us": round(p50_s * 1e6, 3),
            "p99_us": round(percentile(samples, 99) * 1e6, 3),
            "GBps": float(f"{2 * size_bytes / p50_s / 1e9:.4g}"),
            "wrong": wrong,
            "rounds": len(samples),
            "samples_us": [round(sample * 1e6, 3) for sample in samples],
        }
        link_bytes = contestant.who.link_bytes(nodes, size_bytes * contestant.wire_bytes)
        if name in copies:
            pass
        elif link and link_bytes:
            # Both ways at once: what is pulled travels while the rest is pushed.
            floor_s = link_bytes / link
            record |= {"floor": "link", "link_bytes": link_bytes, "floor_us": round(1e6 * floor_s, 1)}
            record["ratio_floor"] = float(f"{p50_s / floor_s:.4g}")
        else:
            record |= {"floor": fastest, "ratio_floor": float(f"{ratio(samples, found[fastest][0]).median:.4g}")}
        if contestant.kind == "commlab":
            against = ratio(samples, found["MPI messages, 1 server"][0])
            record["ratio_messages"] = [float(f"{value:.4g}") for value in against]
        made.append(record)
    return made


def cells(record: Record) -> list[str]:
    return [
        record["contestant"],
        format_us(record["p50_us"] / 1e6),
        format_us(record["p99_us"] / 1e6),
        f"{record['GBps']:.3g}",
        str(record["wrong"]),
        f"{record['ratio_floor']:.3g}" if "ratio_floor" in record else "",
        format_ratio(record.get("ratio_messages")),
    ]


PROGRAM = RankProgram("bench.ps", __doc__, arguments, measure, connect, alone="one rank has no server to talk to")


def main() -> int:
    return PROGRAM.main()


if __name__ == "__main__":
    sys.exit(main())
