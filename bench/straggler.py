"""``python -m bench.straggler``: one worker of a parameter server is slow. What do the consistency models make of it?

The same training under bsp, ssp and asp, each run a job of its own, in a new order every round; worker 1's forward and
backward take ``--factor`` times as long (:mod:`bench.training.slowed`). All runs train on the same tokens. The numbers
are medians over rounds; ``of bsp`` is the median of per-round ratios. Exit code 1: asp ended with a held-out loss that
is more than 10 % above bsp's.

    python -m bench.straggler                            gpt2-tiny, 2 workers and 1 server
    python -m bench.straggler --ranks 4 --rounds 1
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

from .core import table
from .core.arguments import count, names
from .core.mpirun import MPI_KINDS, find_mpi
from .core.program import JobProgram, Section
from .core.results import Record
from .core.stats import ratio
from .training.jobs import Launcher, metrics, summary_of

ROWS = ("bsp alone", "bsp", "ssp:0", "ssp:1", "ssp:4", "asp")
"""The rows by their names on the command line. In ``bsp alone`` nobody is slow."""
HEAD = ("consistency", "tokens/s", "of bsp", "held-out bits/byte", "of bsp", "staleness", "steps of each worker")
SLOW_RANK = 1
"""The slow worker: rank 0 reports, and the last ranks serve."""
LOSS_TOLERANCE = 0.1


class Outcome(NamedTuple):
    """The end of one training run."""

    tokens_per_s: float
    held_out_bits: float
    staleness: str
    clocks: str


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=names(*ROWS), default=list(ROWS), metavar="LIST", help=", ".join(ROWS))
    parser.add_argument("--ranks", type=count, default=3, help="one of them serves (default %(default)s)")
    parser.add_argument("--factor", type=float, default=5.0, help="of worker 1's computing (default %(default)s)")
    parser.add_argument("--rounds", type=count, default=3, help="runs of each row (default %(default)s)")
    parser.add_argument("--model", default="gpt2-tiny", help="default %(default)s")
    parser.add_argument("--batch-size", type=count, default=8, help="global, in sequences (default %(default)s)")
    parser.add_argument("--steps", type=count, default=80, help="of the whole job (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the model, the data and the order of the runs")
    parser.add_argument("--mpi", choices=("auto", *MPI_KINDS), default="auto", help="must be this environment's")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for one run (default %(default)s)")


def measure(options: argparse.Namespace, run: Record) -> Iterator[Section]:
    mpi = find_mpi(options.mpi)
    run["versions"]["mpi"] = mpi.title
    made = records(runs_of(Launcher(mpi, options.timeout), options), options)
    title = (
        f"{options.model}, {options.batch_size} sequences a step, {options.steps} steps, {options.ranks - 1} workers, "
        f"worker {SLOW_RANK} {options.factor:g} times slower"
    )
    yield Section(f"{title}\n{table.render(HEAD, [cells(record) for record in made], left=(0, 5, 6))}", made)


def trained(starter: Launcher, row: str, options: argparse.Namespace) -> Outcome:
    """One training run. Clipping is off in all runs: ssp and asp can't have it."""
    flags = f"--strategy ps --servers 1 --consistency {row.split()[0]} --model {options.model} --threads 1 "
    flags += f"--batch-size {options.batch_size} --steps {options.steps} --seed {options.seed} "
    flags += "--max-grad-norm 0 --eval-every 0 --eval-batches 8 --sample 0"
    factor = 1.0 if row.endswith("alone") else options.factor
    slowed = ("bench.training.slowed", str(SLOW_RANK), str(factor))
    summary = summary_of(metrics(starter, options.ranks, flags.split(), slowed))
    return Outcome(
        summary["tokens_per_s"],
        summary["held_out_bits_per_byte"],
        summary["staleness"].split(" of ")[0],
        summary["clocks"].split(" (")[0],
    )


def runs_of(starter: Launcher, options: argparse.Namespace) -> dict[str, list[Outcome]]:
    """All rounds, each with all rows in a new order."""
    order = random.Random(options.seed)
    found: dict[str, list[Outcome]] = {row: [] for row in options.rows}
    for round_ in range(options.rounds):
        for row in order.sample(options.rows, len(options.rows)):
            print(f"round {round_ + 1} of {options.rounds}: {row}", file=sys.stderr, flush=True)
            found[row].append(trained(starter, row, options))
    return found


def records(found: dict[str, list[Outcome]], options: argparse.Namespace) -> list[Record]:
    """A record per row; ratios are to bsp in the same rounds."""
    made = []
    for row, runs in found.items():
        record: Record = {
            "type": "row",
            "op": "train",
            "contestant": row,
            "ranks": options.ranks,
            "rounds": len(runs),
            "tokens_per_s": float(f"{median(each.tokens_per_s for each in runs):.5g}"),
            "held_out_bits_per_byte": float(f"{median(each.held_out_bits for each in runs):.5g}"),
            "tokens_per_s_samples": [float(f"{each.tokens_per_s:.5g}") for each in runs],
            "held_out_samples": [float(f"{each.held_out_bits:.5g}") for each in runs],
            "staleness": runs[-1].staleness,
            "clocks": runs[-1].clocks,
        }
        if "bsp" in found:
            speeds, losses = (
                ratio([each[at] for each in runs], [each[at] for each in found["bsp"]])  # type: ignore[misc]
                for at in (0, 1)
            )
            record["speed_of_bsp"] = [float(f"{value:.4g}") for value in speeds]
            record["loss_of_bsp"] = float(f"{losses.median:.4g}")
            record["wrong"] = int(losses.median > 1 + LOSS_TOLERANCE)
        made.append(record)
    return made


def spread(histogram: str) -> str:
    """Half of the reads lack no more clocks than the first number; the second is the most that any lacked."""
    bars = [bar.rstrip("%").split(": ") for bar in histogram.split(", ")]
    shares = [(int(stale), float(share)) for stale, share in bars]
    half, seen = sum(share for _, share in shares) / 2, 0.0
    for stale, share in shares:
        seen += share
        if seen >= half:
            return f"median {stale}, most {shares[-1][0]}"
    return ""


def cells(record: Record) -> list[str]:
    return [
        record["contestant"],
        f"{record['tokens_per_s']:,.0f}",
        f"{record['speed_of_bsp'][0]:.2f}" if "speed_of_bsp" in record else "",
        f"{record['held_out_bits_per_byte']:.3f}" + (" WRONG" if record.get("wrong") else ""),
        f"{record['loss_of_bsp']:.3f}" if "loss_of_bsp" in record else "",
        spread(record["staleness"]),
        record["clocks"],
    ]


PROGRAM = JobProgram("bench.straggler", __doc__, arguments, measure)


def main(argv: Sequence[str] | None = None) -> int:
    return PROGRAM.main(argv)


if __name__ == "__main__":
    sys.exit(main())
