"""The main of the benchmarks: arguments, ranks, tables, the result file, the exit code.

A command's own file says which arguments the command takes and what it measures, as a generator of sections.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import commlab
from commlab.errors import UsageError

from . import results
from .errors import BenchError
from .ranks import Ranks
from .results import Record

Formatter = type[argparse.HelpFormatter]
WithDefaults: Formatter = argparse.ArgumentDefaultsHelpFormatter
"""Help with the default of every argument after its text."""
AsWritten: Formatter = argparse.RawDescriptionHelpFormatter
"""Help that keeps the lines of the usage text."""


class Section(NamedTuple):
    """What a benchmark found out about one piece of its work: shown and written as soon as the piece is done."""

    text: str
    """What rank 0 prints; nothing is printed where the text is empty."""
    records: Sequence[Record] = ()
    failed: int | None = None
    """How many checks failed; None where the ``wrong`` of the records add up to that number."""


@dataclass
class Session:
    """One start of a benchmark on all ranks of a launch."""

    options: argparse.Namespace
    group: commlab.Group
    ranks: Ranks
    run: Record
    """The ``run`` line of the result file, to which a benchmark adds what only it knows."""


@dataclass(frozen=True)
class RankProgram:
    """A benchmark that every rank of a launch runs.

    ``arguments`` adds the benchmark's own arguments to the parser; ``--json`` comes last by itself. ``connect`` makes
    the group of all ranks. ``alone`` says why one rank alone has nothing to measure, and is empty where one rank has.
    ``failure`` ends the message about the number of failed checks.
    """

    name: str
    usage: str | None
    arguments: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[Session], Iterable[Section]]
    connect: Callable[[argparse.Namespace], commlab.Group] = lambda options: commlab.init()
    alone: str = ""
    failure: str = "numbers are wrong"
    formatter: Formatter = WithDefaults

    def parser(self) -> argparse.ArgumentParser:
        return _with_json(parser(self.name, self.usage, self.arguments, self.formatter))

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the benchmark on this rank; returns the exit code. Collective."""
        own_parser = self.parser()
        options = own_parser.parse_args(argv)
        group = self.connect(options)
        ranks = Ranks()
        if self.alone and ranks.size == 1:
            own_parser.error(f"{self.alone}: start it with mpirun -n 2, or more")
        session = Session(options, group, ranks, results.describe(ranks, self.name))
        failed = _publish(self.measure(session), session.run, options.json, speaks=ranks.rank == 0)
        if failed and ranks.rank == 0:
            print(f"{failed} {self.failure}", file=sys.stderr)
        commlab.shutdown()
        return 1 if failed else 0


@dataclass(frozen=True)
class JobProgram:
    """A benchmark that starts jobs of its own, one after the other. ``measure`` takes the options and the ``run`` line
    of the result file, to which the benchmark adds what only it knows."""

    name: str
    usage: str | None
    arguments: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace, Record], Iterable[Section]]
    formatter: Formatter = AsWritten

    def parser(self) -> argparse.ArgumentParser:
        return _with_json(parser(self.name, self.usage, self.arguments, self.formatter))

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the benchmark; returns the exit code."""
        options = self.parser().parse_args(argv)
        run = results.run_line(self.name)
        try:
            failed = _publish(self.measure(options, run), run, options.json, speaks=True)
        except (UsageError, BenchError) as error:
            return refuse(self.name, error)
        return 1 if failed else 0


def parser(
    name: str, usage: str | None, arguments: Callable[[argparse.ArgumentParser], None], formatter: Formatter = AsWritten
) -> argparse.ArgumentParser:
    """The parser of the command ``python -m name``."""
    made = argparse.ArgumentParser(prog=f"python -m {name}", description=usage, formatter_class=formatter)
    arguments(made)
    return made


def refuse(name: str, reason: object) -> int:
    """Print why the command ``name`` ends without having done its work; returns the exit code."""
    print(f"{name}: {reason!r}" if isinstance(reason, KeyError) else f"{name}: {reason}", file=sys.stderr)
    return 2


def _with_json(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    made.add_argument("--json", metavar="FILE", help="add the results to this file of JSON lines")
    return made


def _publish(sections: Iterable[Section], run: Record, path: str | None, speaks: bool) -> int:
    """Print and write every section once it is there; returns how many checks failed. Ranks that do not speak only
    take part in the measuring."""
    failed, opened = 0, False
    for text, records, failures in sections:
        failed += sum(record.get("wrong", 0) for record in records) if failures is None else failures
        if not speaks:
            continue
        if text:
            print(text, flush=True)
        if path and records:
            results.append(path, records if opened else [run, *records])
            opened = True
    return failed
