"""``python -m bench.train``: the paper's six strategies, ``allreduce`` and ``ddp``, on the same model, data, seed and
global batch.

Every run is a job of its own (``python -m commlab.train``), and runs alternate: each round has all of them once, in a
new order. Figures are medians over rounds; ``of single`` is the median of per-round ratios. A row that cannot run says
why. Exit code 1: some row ended with another loss than ``single``.

    python -m bench.train                                         gpt2-tiny, 2 ranks: some 5 minutes on 2 cores
    python -m bench.train --ranks 2,4,8 --rounds 1
    python -m bench.train --model gpt2-100m --batch-size 4 --seq-len 64 --steps 8
    python -m bench.train --hosts 4 --rate 200mbit                4 emulated hosts, as bench.cluster makes them
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from typing import Any

from commlab.errors import UsageError
from commlab.trainer.config import Config

from .core import results as records
from .core import table
from .core.arguments import count, counts, names
from .core.mpirun import MPI_KINDS, LauncherError, find_mpi
from .hosts.plan import ClusterError
from .training.jobs import JobFailed, Launcher, Measured, launcher, train
from .training.rows import HEAD, REFERENCE, ROWS, cells, missing, reduced

_COMPUTING = ("dps", "allreduce", "ps")
"""Whose computation stands for that of the peers, the first that has run."""

Runs = dict[tuple[str, int], list[Measured]]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m bench.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--rows", type=_rows, default=list(ROWS), metavar="LIST", help=", ".join(ROWS))
    found.add_argument("--ranks", type=counts, default=None, metavar="LIST", help="default 2; with --hosts all of them")
    found.add_argument("--rounds", type=count, default=3, help="runs of each row (default %(default)s)")
    found.add_argument("--model", default="gpt2-tiny", help="default %(default)s; gpt2-100m is the paper's")
    found.add_argument("--data", help="default: this Python's own library sources")
    found.add_argument("--batch-size", type=count, default=32, help="global, in sequences (default %(default)s)")
    found.add_argument("--seq-len", type=count, help="default: the model's")
    found.add_argument("--steps", type=count, default=30, help="of each run (default %(default)s)")
    found.add_argument("--precision-16", choices=("fp16", "apex"), default="fp16", help="of the two 16-bit rows")
    found.add_argument("--seed", type=int, default=0, help="of the model, the data and the order of the runs")
    found.add_argument("--hosts", type=int, default=0, metavar="N", help="emulated hosts; default: this machine")
    found.add_argument("--rate", default="200mbit", help="each host's link, each way (default %(default)s)")
    found.add_argument("--delay", default="none", help="one way, as 5ms")
    found.add_argument("--ranks-per-host", type=count, default=1)
    found.add_argument("--mpi", choices=("auto", *MPI_KINDS), default="auto", help="must be this environment's")
    found.add_argument("--flags", default="", metavar="TEXT", help="more flags of commlab.train, for all rows")
    found.add_argument("--timeout", type=float, default=900.0, metavar="S", help="for one run (default %(default)s)")
    found.add_argument("--json", metavar="FILE", help="add the results to this file of JSON lines")
    return found


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
    given = [text for flag, value in shared.items() if value is not None for text in (flag, str(value))]
    return [
        *given,
        *(flag.format(**{"16-bit": options.precision_16}) for flag in ROWS[name].flags),
        *options.flags.split(),
    ]


def measure(where: Launcher, options: argparse.Namespace) -> tuple[Runs, dict[tuple[str, int], str]]:
    """All rounds: what every row and number of ranks measured, and why the others did not."""
    cases = [(name, 1) for name in options.rows if name == REFERENCE]
    cases += [(name, ranks) for ranks in options.ranks for name in options.rows if name != REFERENCE]
    order, runs, reasons = random.Random(options.seed), {case: [] for case in cases}, {}
    for turn in range(options.rounds):
        shuffled = [case for case in cases if case not in reasons]
        order.shuffle(shuffled)
        for at, case in enumerate(shuffled):
            _show(f"round {turn + 1} of {options.rounds}, run {at + 1} of {len(shuffled)}: {case[0]}, {case[1]} ranks")
            try:
                runs[case].append(train(where, case[1], flags_of(case[0], options)))
            except JobFailed as failed:
                # A row that fails later than in its first round has no full set of rounds to compare.
                reasons[case] = str(failed)
                runs[case].clear()
    _show("")
    return runs, reasons


def results(runs: Runs, reasons: dict[tuple[str, int], str]) -> list[dict[str, Any]]:
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


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    options.ranks = options.ranks or [options.hosts * options.ranks_per_host or 2]
    try:
        for name in options.rows:
            Config.from_argv(flags_of(name, options))  # a wrong flag is told before the first run, not as a missing row
        mpi = find_mpi(options.mpi)
        place = (options.hosts, options.rate, options.delay, options.ranks_per_host)
        with launcher(mpi, options.timeout, *place) as where:
            runs, reasons = measure(where, options)
    except (UsageError, LauncherError, ClusterError) as error:
        print(f"bench.train: {error}", file=sys.stderr)
        return 2
    found = results(runs, reasons)
    versions = next((rounds[-1].versions for rounds in runs.values() if rounds), {})
    run = records.run_line("bench.train", "", f"{'MPICH' if mpi.kind == 'mpich' else 'Open MPI'} {mpi.version}")
    run["versions"] |= {"torch": versions.get("torch"), "native": versions.get("arithmetic")}
    run["training"] = {
        "model": options.model,
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "steps": options.steps,
        "hosts": options.hosts,
        "rate": options.rate if options.hosts else None,
    }
    where_text = f"{options.hosts} hosts at {options.rate}" if options.hosts else "this machine"
    print(f"{options.model}, {options.batch_size} sequences a step, {options.steps} steps, on {where_text}")
    print(table.render(HEAD, [cells(record) for record in found]))
    if options.json:
        records.append(options.json, [run, *found])
    return 1 if any(record.get("wrong") for record in found) else 0


if __name__ == "__main__":
    sys.exit(main())
