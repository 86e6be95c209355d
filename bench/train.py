"""``python -m bench.train``: the paper's six strategies, ``allreduce`` and ``ddp``, on the same model, data, seed and
global batch.

Every run is a job of its own (``python -m commlab.train``), and runs alternate: each round has all of them once, in a
new order. The numbers are medians over rounds; ``of single`` is the median of per-round ratios. A row that cannot run
says why. Exit code 1: some row ended with another loss than ``single``.

    python -m bench.train                                         gpt2-tiny, 2 ranks: some 5 minutes on 2 cores
    python -m bench.train --ranks 2,4,8 --rounds 1
    python -m bench.train --model gpt2-100m --batch-size 4 --seq-len 64 --steps 8
    python -m bench.train --hosts 4 --rate 200mbit                4 emulated hosts, as bench.cluster makes them
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence

from commlab.strategies.options import KNOWN
from commlab.trainer.config import Config

from .core import table
from .core.arguments import count, counts, names
from .core.mpirun import MPI_KINDS, find_mpi
from .core.program import JobProgram, Section
from .core.results import Record
from .training.jobs import JobFailed, Launcher, Measured, launcher, train
from .training.rows import HEAD, REFERENCE, ROWS, cells, missing, reduced

_COMPUTING = ("dps", "allreduce", "ps")
"""The strategies whose computation stands for that of the peers; the first that has run counts."""

Runs = dict[tuple[str, int], list[Measured]]
"""The reports of the training runs, a list of rounds for every row and number of ranks."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=_rows, default=list(ROWS), metavar="LIST", help=", ".join(ROWS))
    parser.add_argument(
        "--ranks", type=counts, default=None, metavar="LIST", help="default 2; with --hosts all of them"
    )
    parser.add_argument("--rounds", type=count, default=3, help="runs of each row (default %(default)s)")
    parser.add_argument("--model", default="gpt2-tiny", help="default %(default)s; gpt2-100m is the paper's")
    parser.add_argument("--data", help="default: this Python's own library sources")
    parser.add_argument("--batch-size", type=count, default=32, help="global, in sequences (default %(default)s)")
    parser.add_argument("--seq-len", type=count, help="default: the model's")
    parser.add_argument("--steps", type=count, default=30, help="of each run (default %(default)s)")
    parser.add_argument("--precision-16", choices=("fp16", "apex"), default="fp16", help="of the two 16-bit rows")
    parser.add_argument("--seed", type=int, default=0, help="of the model, the data and the order of the runs")
    parser.add_argument("--hosts", type=int, default=0, metavar="N", help="emulated hosts; default: this machine")
    parser.add_argument("--rate", default="200mbit", help="each host's link, each way (default %(default)s)")
    parser.add_argument("--delay", default="none", help="one way, as 5ms")
    parser.add_argument("--ranks-per-host", type=count, default=1)
    parser.add_argument("--mpi", choices=("auto", *MPI_KINDS), default="auto", help="must be this environment's")
    parser.add_argument("--flags", default="", metavar="TEXT", help="more flags of commlab.train, for all rows")
    parser.add_argument(
        "--shard", choices=KNOWN["shard"], default="auto", help="of the rows of dps, on several nodes (%(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S", help="for one run (default %(default)s)")


def measure(options: argparse.Namespace, run: Record) -> Iterator[Section]:
    options.ranks = options.ranks or [options.hosts * options.ranks_per_host or 2]
    for name in options.rows:
        Config.from_argv(flags_of(name, options))  # a wrong flag ends all before the first run, not in a missing row
    mpi = find_mpi(options.mpi)
    hosts = (options.hosts, options.rate, options.delay, options.ranks_per_host)
    with launcher(mpi, options.timeout, *hosts) as starter:
        runs, reasons = runs_of(starter, options)
    found = records(runs, reasons)
    versions = next((rounds[-1].versions for rounds in runs.values() if rounds), {})
    run["versions"] |= {"mpi": mpi.title, "torch": versions.get("torch"), "native": versions.get("arithmetic")}
    run["training"] = {
        "model": options.model,
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "steps": options.steps,
        "hosts": options.hosts,
        "rate": options.rate if options.hosts else None,
    }
    machines = f"{options.hosts} hosts at {options.rate}" if options.hosts else "this machine"
    title = f"{options.model}, {options.batch_size} sequences a step, {options.steps} steps, on {machines}"
    yield Section(f"{title}\n{table.render(HEAD, [cells(record) for record in found])}", found)


def _rows(text: str) -> list[str]:
    return names(*ROWS)(",".join(name.strip() for name in text.split(",")))


def flags_of(name: str, options: argparse.Namespace) -> list[str]:
    """The trainer's flags for a row: the same for all but for the strategy and the precision."""
    shared = {
        "--model": options.model,
        "--data": options.data,
        "--batch-size": options.batch_size,
        "--seq-len": options.seq_len,
        "--steps": options.steps,
        "--seed": options.seed,
        "--eval-every": 0,
        "--eval-batches": 2,
        "--sample": 0,
    }
    flags = [text for flag, value in shared.items() if value is not None for text in (flag, str(value))]
    return [
        *flags,
        *(flag.format(**{"16-bit": options.precision_16}) for flag in ROWS[name].flags),
        *(("--shard", options.shard) if "dps" in ROWS[name].flags and options.shard != "auto" else ()),
        *options.flags.split(),
    ]


def runs_of(starter: Launcher, options: argparse.Namespace) -> tuple[Runs, dict[tuple[str, int], str]]:
    """All rounds: the reports of every row and number of ranks, and the reasons why the others have none."""
    pairs = [(name, 1) for name in options.rows if name == REFERENCE]
    pairs += [(name, ranks) for ranks in options.ranks for name in options.rows if name != REFERENCE]
    order = random.Random(options.seed)
    runs: Runs = {pair: [] for pair in pairs}
    reasons: dict[tuple[str, int], str] = {}
    for round_ in range(options.rounds):
        shuffled = [pair for pair in pairs if pair not in reasons]
        order.shuffle(shuffled)
        for at, (name, ranks) in enumerate(shuffled):
            _show(f"round {round_ + 1} of {options.rounds}, run {at + 1} of {len(shuffled)}: {name}, {ranks} ranks")
            try:
                runs[name, ranks].append(train(starter, ranks, flags_of(name, options)))
            except JobFailed as failed:
                # A row that fails later than in its first round has no full set of rounds to compare.
                reasons[name, ranks] = str(failed)
                runs[name, ranks].clear()
    _show("")
    return runs, reasons


def records(runs: Runs, reasons: dict[tuple[str, int], str]) -> list[Record]:
    """A record per row and number of ranks."""
    found = []
    for (name, ranks), rounds in runs.items():
        if not rounds:
            found.append(missing(name, ranks, reasons[name, ranks]))
            continue
        computing = next((runs[other, ranks] for other in _COMPUTING if runs.get((other, ranks))), [])
        found.append(reduced(name, ranks, rounds, runs.get((REFERENCE, 1), []), computing))
    return found


def _show(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
    elif text:
        sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


PROGRAM = JobProgram("bench.train", __doc__, arguments, measure)


def main(argv: Sequence[str] | None = None) -> int:
    return PROGRAM.main(argv)


if __name__ == "__main__":
    sys.exit(main())
