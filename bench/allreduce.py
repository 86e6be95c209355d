"""``mpirun -n P python -m bench.allreduce``: commlab's collectives against MPI, gloo and Horovod, on the same bytes."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from commlab.errors import UsageError
from commlab.job import launch
from commlab.runtime.world import TRANSPORTS, WINDOWS

from .contestants import PEERS, commlab, floor
from .contestants.case import DTYPES, EXACT_UP_TO, OPS, Case
from .core import results, table
from .core.arguments import count, names, sizes
from .core.harness import Block, measure, progress_line
from .core.ranks import Ranks, share_cores
from .core.stats import format_bytes
from .rows import HEAD, cells, rows, title

SIZES = "4B,64B,1KB,16KB,64KB,256KB,1MB,4MB,16MB,100MB,256MB"
CHECKS = {"both": (True, False), "on": (True,), "off": (False,)}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m bench.allreduce", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    found.add_argument("--op", choices=OPS, default="allreduce")
    found.add_argument(
        "--sizes", type=sizes, default=SIZES, metavar="LIST", help="bytes of the whole buffer, as 4B,64KiB,100MB"
    )
    found.add_argument("--dtype", choices=DTYPES, default="float32")
    found.add_argument("--algorithms", type=names(*commlab.NAMES), default=",".join(commlab.NAMES), metavar="LIST")
    found.add_argument(
        "--wires", type=names("none", "fp16", "bf16"), default="none,fp16", metavar="LIST", help="for allreduce"
    )
    found.add_argument("--peers", type=names("none", *PEERS), default=",".join(PEERS), metavar="LIST", help="or none")
    found.add_argument("--rounds", type=count, default=11, help="samples per contestant, interleaved")
    found.add_argument(
        "--sample-ms",
        type=count,
        default=2,
        metavar="MS",
        help="how long a sample lasts at least; on a shaped link longer than its burst, or small sizes never meet it",
    )
    found.add_argument(
        "--check", choices=CHECKS, default="both", help="commlab with its agreement check, without it, or both"
    )
    found.add_argument("--transport", choices=TRANSPORTS, default="mpi")
    found.add_argument("--window", choices=WINDOWS, default="auto", help="off: the ranks of a node send messages too")
    found.add_argument("--seed", type=int, default=0, help="of the order of the contestants")
    found.add_argument("--timeout", type=float, default=300.0, metavar="S", help="for one turn; then the job ends")
    found.add_argument("--json", metavar="FILE", help="add the results to this file of JSON lines")
    return found


def contestants(case: Case, groups: commlab.Groups, options: argparse.Namespace) -> list[Block]:
    wires = [None if wire == "none" else wire for wire in options.wires]
    blocks = floor.blocks(case) + commlab.blocks(case, groups, options.algorithms, wires, CHECKS[options.check])
    for peer in options.peers:
        blocks += PEERS[peer](case) if peer != "none" else []
    return blocks


def exact_up_to(options: argparse.Namespace) -> int:
    """The precision that the numbers must fit: that of the narrowest dtype or wire of the run."""
    wires = {"fp16": "float16", "bf16": "bfloat16"}
    return min(
        EXACT_UP_TO.get(name, 2**11) for name in (options.dtype, *(wires.get(wire, "") for wire in options.wires))
    )


def one_size(
    size_bytes: int, at: int, groups: commlab.Groups, ranks: Ranks, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure, and on rank 0 print the table. Its memory is given back before the next size asks for more."""
    numel = max(1, size_bytes // DTYPES[options.dtype].itemsize)
    case = Case(options.op, numel, DTYPES[options.dtype], ranks.rank, ranks.size, exact_up_to(options))
    show = progress_line(ranks, f"{options.op} {format_bytes(case.bytes)} ({at + 1} of {len(options.sizes)})")
    blocks = contestants(case, groups, options)
    found = rows(
        measure(blocks, ranks, options.rounds, options.seed + at, options.timeout, show, options.sample_ms / 1e3), case
    )
    if ranks.rank == 0:
        print(f"{title(case, found)}\n{table.render(HEAD, [cells(record) for record in found])}\n", flush=True)
    return found


def main() -> int:
    options = parser().parse_args()
    share_cores()
    largest_bytes = max(options.sizes) + DTYPES[options.dtype].itemsize * launch.detect().size
    groups = commlab.connect(options.transport, options.window, options.timeout, largest_bytes)
    ranks = Ranks()
    if ranks.size == 1:
        raise UsageError("one rank exchanges nothing: start it with mpirun -n 2, or more")
    run = results.describe(ranks, "bench.allreduce", progress=groups.world.progress_mode)
    wrong = 0
    for at, size_bytes in enumerate(options.sizes):
        found = one_size(size_bytes, at, groups, ranks, options)
        wrong += sum(record.get("wrong", 0) for record in found)
        if ranks.rank == 0 and options.json:
            results.append(options.json, [run, *found] if at == 0 else found)
    return ranks.end(wrong, "numbers are wrong")


if __name__ == "__main__":
    sys.exit(main())
