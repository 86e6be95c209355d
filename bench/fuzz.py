"""``python -m bench.fuzz``: random training programs, each against plain torch: what does a user's loop do to numbers?

A program (:mod:`bench.training.programs`) is a model, an optimizer, a scheduler, strategies one after the other, ragged
micro-batches, and events between steps: layers that are frozen or come in, learning rates set by hand, exceptions that
are caught, checkpoints restored by another strategy, engines closed and built anew, gradients edited. After each step
every parameter, buffer and gradient norm is compared with what plain torch makes of the same samples in one process; at
the end the optimizer's state too. Rounding alone may differ.

    python -m bench.fuzz --minutes 10 --seed 1                  ranks 2, 3 and 4 share the minutes
    python -m bench.fuzz --seed 1234 --ranks 3 --programs 1     one program once more

Exit code 1: a program ended with other numbers, or with an error. Its seed and its steps are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .core import table
from .core.arguments import count, counts
from .core.mpirun import MPI_KINDS, find_mpi
from .core.program import JobProgram, Section
from .core.results import Record
from .training.jobs import Launcher

HEAD = ("ranks", "programs", "first seed", "last seed", "steps", "strategies", "failed")
LAUNCH_S = 60.0
"""How much longer than its share of the minutes a launch may take: to start, and for the program that is under way."""


class LaunchOutcome(NamedTuple):
    """What one launch made of its share of the time."""

    programs: list[dict[str, Any]]
    """Those that ended with plain torch's numbers."""
    failed: dict[str, Any] | None
    """The program that did not."""
    output: str
    """What the ranks have printed."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=1.0, help="for all ranks together (default %(default)s)")
    parser.add_argument("--programs", type=count, help="so many programs for each number of ranks, in place of minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the first program (default %(default)s)")
    parser.add_argument("--ranks", type=counts, default=[2, 3, 4], metavar="LIST", help="default 2,3,4")
    parser.add_argument("--mpi", choices=("auto", *MPI_KINDS), default="auto", help="must be this environment's")


def measure(options: argparse.Namespace, run: Record) -> Iterator[Section]:
    mpi = find_mpi(options.mpi)
    run["versions"]["mpi"] = mpi.title
    launcher = Launcher(mpi, 60 * options.minutes / len(options.ranks))
    records = []
    for ranks in options.ranks:
        print(f"{ranks} ranks from seed {options.seed} on", file=sys.stderr, flush=True)
        record, failures = _record(ranks, outcomes(launcher, ranks, options.seed, options.programs), options.seed)
        records.append(record)
        for failed, output in failures:
            yield Section(f"seed {failed['seed']} on {ranks} ranks:\n{described(failed)}\n{output}", failed=0)
    rows = [cells(record) for record in records]
    yield Section(f"random training programs against plain torch\n{table.render(HEAD, rows, left=(5,))}", records)


def outcomes(launcher: Launcher, ranks: int, seed: int, programs: int | None) -> Iterator[LaunchOutcome]:
    """One launch after the other until the time is over, or so many programs are through: a program that fails ends its
    launch, and the next one begins with the next seed."""
    left_s = launcher.timeout_s
    while left_s > 0 and programs != 0:
        outcome, took_s = launch(launcher, ranks, seed, left_s, programs)
        yield outcome
        left_s -= took_s
        ended = len(outcome.programs) + (outcome.failed is not None)
        seed += ended
        programs = None if programs is None else programs - ended
        if not ended:
            return


def launch(
    launcher: Launcher, ranks: int, seed: int, seconds: float, programs: int | None
) -> tuple[LaunchOutcome, float]:
    """Run programs from ``seed`` on, on ``ranks`` ranks; returns what came out, and how many seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        written, printed = Path(folder, "programs.jsonl"), Path(folder, "output.txt")
        limits = [str(seconds), str(programs or 0)]
        python = [sys.executable, "-m", "bench.training.fuzzed", str(seed), *limits, str(written)]
        with open(printed, "wb") as output:
            job = launcher.start(ranks, python, output)
            try:
                job.wait(seconds + LAUNCH_S if programs is None else LAUNCH_S * (1 + programs))
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.pid, signal.SIGTERM)
                job.wait(30)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
        lines = [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []
        text = printed.read_text(errors="replace")
    if lines and "done" in lines[-1]:
        return LaunchOutcome(lines[:-1], None, text), lines[-1]["seconds"]
    return LaunchOutcome(lines[:-1], lines[-1] if lines else {"seed": seed, "steps": []}, text), seconds / 10


def _record(
    ranks: int, launches: Iterator[LaunchOutcome], seed: int
) -> tuple[Record, list[tuple[dict[str, Any], str]]]:
    """The record of all launches on so many ranks, and the programs that failed, with what their ranks printed."""
    right: list[dict[str, Any]] = []
    failures: list[tuple[dict[str, Any], str]] = []
    for outcome in launches:
        right += outcome.programs
        if outcome.failed is not None:
            failures.append((outcome.failed, outcome.output[-4000:]))
    events = Counter(event for program in right for step in program["steps"] for event in step["events"])
    strategies = Counter(_strategy_name(*each) for program in right for each in program["strategies"])
    record: Record = {
        "type": "row",
        "op": "fuzz",
        "contestant": "commlab",
        "ranks": ranks,
        "programs": len(right),
        "first_seed": seed,
        "last_seed": seed + len(right) + len(failures) - 1,
        "steps": sum(len(program["steps"]) for program in right),
        "strategies": dict(sorted(strategies.items())),
        "events": dict(sorted(events.items())),
        "failed_seeds": [failed["seed"] for failed, _ in failures],
        "wrong": len(failures),
    }
    return record, failures


def _strategy_name(name: str, options: dict[str, Any]) -> str:
    return f"{name} with servers" if "servers" in options else name


def described(program: dict[str, Any]) -> str:
    """A program, for people."""
    lines = [", ".join(f"{key} {value}" for key, value in program.items() if key not in ("steps", "strategies"))]
    lines += [f"  then {name} {options}" for name, options in program.get("strategies", [])]
    lines += [f"  step {number}: {step}" for number, step in enumerate(program["steps"])]
    return "\n".join(lines)


def cells(record: Record) -> list[str]:
    return [
        str(record["ranks"]),
        f"{record['programs']:,}",
        str(record["first_seed"]),
        str(record["last_seed"]),
        f"{record['steps']:,}",
        ", ".join(f"{name} {times}" for name, times in record["strategies"].items()),
        ", ".join(map(str, record["failed_seeds"])) or "none",
    ]


PROGRAM = JobProgram("bench.fuzz", __doc__, arguments, measure)


def main(argv: Sequence[str] | None = None) -> int:
    return PROGRAM.main(argv)


if __name__ == "__main__":
    sys.exit(main())
