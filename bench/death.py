"""``python -m bench.death``: one rank is killed in the middle of an allreduce. How long until all others know of it?

Ranks joined by links, each on a node of its own, reduce without an end; each has torch, and has written to
``--memory``. One of them, by turns, is sent SIGKILL at a random moment: every other rank must raise PeerLostError that
names it. The time runs from just before the signal until the last of them has raised. Each round kills once in every
row, in a new order: with the process that keeps a killed rank's memory until its connections are closed
(docs/links.md), and, with ``--rows keeper,none``, without it. Exit code 1: a rank raised nothing, or named another one.

    python -m bench.death                                     4 ranks of this host, over loopback
    python -m bench.death --hosts --rate 10gbit --rounds 7    on emulated hosts
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any, NamedTuple

from commlab.transport.tcp import KEEPER

from .core import table
from .core.arguments import count, names
from .core.errors import BenchError
from .core.mpirun import python_path
from .core.program import JobProgram, Section
from .core.results import Record
from .core.stats import parse_bytes
from .hosts.namespaces import Cluster
from .hosts.plan import INTERFACE, HostLink
from .training.killed import RankRequest

ROWS = {"keeper": "on", "none": "off"}
"""The rows by their names on the command line; what KEEPER is set to."""
HEAD = ("row", "kills", "p50 ms", "p90 ms", "most ms", "within 50 ms", "named by", "load")
GOAL_MS = 50.0
LIMIT_S = 60.0
"""How long a host may take for each of its answers."""


class Kill(NamedTuple):
    """What one kill led to."""

    last_ms: float
    """Until the last survivor had raised; infinite where one did not."""
    named: int
    """So many survivors named the rank that was killed."""
    misnamed: tuple[str, ...]
    """What the others said."""
    load: float
    """The machine's, when the rank was killed."""


class Host:
    """Forks the ranks of one host, one after the other: :mod:`bench.training.killed`."""

    def __init__(self, command: Sequence[str]):
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": python_path()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._unread = b""

    def ask(self, **request: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self, *expected: str) -> Record:
        """The next thing that the host says; BenchError where it is none of those that are expected."""
        assert self._process.stdout is not None
        stop_s = time.monotonic() + LIMIT_S
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, stop_s - time.monotonic()))
            found = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            if not found:
                raise BenchError(f"a host said nothing for {LIMIT_S:.0f} s where it should say {' or '.join(expected)}")
            self._unread += found
        line, _, self._unread = self._unread.partition(b"\n")
        said: Record = json.loads(line)
        if said["event"] not in expected:
            raise BenchError(f"a host said {said} where it should say {' or '.join(expected)}")
        return said

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=names(*ROWS), default=["keeper"], metavar="LIST", help=", ".join(ROWS))
    parser.add_argument("--ranks", type=count, default=4, help="default %(default)s")
    parser.add_argument("--size", type=parse_bytes, default="25MB", help="of float32, reduced (default %(default)s)")
    parser.add_argument("--memory", type=parse_bytes, default="1GB", help="of each rank (default %(default)s)")
    parser.add_argument("--rounds", type=count, default=50, help="kills in each row (default %(default)s)")
    parser.add_argument("--limit", type=float, default=math.inf, metavar="S", help="begin no round later than that")
    parser.add_argument("--hosts", action="store_true", help="a host for each rank, as by bench.cluster")
    parser.add_argument("--rate", default="10gbit", help="of the hosts' links (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, and of the order of the rows")


def measure(options: argparse.Namespace, run: Record) -> Iterator[Section]:
    chance = random.Random(options.seed)
    found: dict[str, list[Kill]] = {row: [] for row in options.rows}
    stop_s = time.monotonic() + options.limit
    with hosts(options) as (made, variables):
        for round_ in range(options.rounds):
            if round_ and time.monotonic() > stop_s:
                break
            for row in chance.sample(options.rows, len(options.rows)):
                kill = killed(made, round_ % len(made), {**variables, KEEPER: ROWS[row]}, options, chance)
                print(f"round {round_ + 1} of {options.rounds}, {row}: {kill.last_ms:.1f} ms", file=sys.stderr)
                found[row].append(kill)
    records = [record(row, kills, options) for row, kills in found.items()]
    where = f"{options.rate} between hosts" if options.hosts else "loopback"
    title = f"one of {options.ranks} ranks is killed while they reduce {options.size / 1e6:g} MB, {where}; "
    title += f"{options.memory / 1e9:g} GB a rank"
    yield Section(f"{title}\n{table.render(HEAD, [cells(each) for each in records])}", records)


@contextlib.contextmanager
def hosts(options: argparse.Namespace) -> Iterator[tuple[list[Host], dict[str, str]]]:
    """A host for each rank, and the variables that all ranks need to meet."""
    python = [sys.executable, "-m", "bench.training.killed"]
    with contextlib.ExitStack() as opened:
        if options.hosts:
            cluster = opened.enter_context(Cluster(options.ranks, HostLink.parse(options.rate)))
            commands = [cluster.on(rank, python) for rank in range(options.ranks)]
            variables = {"MASTER_ADDR": cluster.addresses[0], "GLOO_SOCKET_IFNAME": INTERFACE}
        else:
            commands, variables = [python] * options.ranks, {"MASTER_ADDR": "127.0.0.1"}
        made = [Host(command) for command in commands]
        for host in made:
            opened.callback(host.close)
        for host in made:
            host.answer("up")
        yield made, variables


def killed(
    made: Sequence[Host],
    victim: int,
    variables: Mapping[str, str],
    options: argparse.Namespace,
    chance: random.Random,
) -> Kill:
    """Start a job, kill the rank ``victim``, and hear the others."""
    launch = {"WORLD_SIZE": str(len(made)), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for rank, host in enumerate(made):
        request = RankRequest(rank, len(made), {**variables, **launch, "RANK": str(rank)}, options.size, options.memory)
        host.ask(begin=asdict(request))
        if rank == 0:
            launch["MASTER_PORT"] = str(host.answer("listening")["port"])
    for host in made:
        host.answer("ready")
    time.sleep(chance.uniform(0.05, 0.25))
    load = os.getloadavg()[0]
    made[victim].ask(end="kill")
    at_s = made[victim].answer("killed")["at_s"]
    raised = [host.answer("raised") for host in made if host is not made[victim]]
    made[victim].answer("ended")
    for host in made:
        if host is not made[victim]:
            host.ask(end="wait")
            host.answer("ended")
    texts = [said["text"] for said in raised]
    misnamed = tuple(
        f"rank {victim} was killed: {text}"
        for text in texts
        if not re.search(rf"\brank {victim}\b", text.partition(": ")[2])
    )
    last_ms = 1e3 * max(said["at_s"] - at_s for said in raised)
    return Kill(last_ms, len(texts) - len(misnamed), misnamed, load)


def record(row: str, kills: Sequence[Kill], options: argparse.Namespace) -> Record:
    ordered = sorted(kill.last_ms for kill in kills)
    return {
        "type": "row",
        "op": "death",
        "contestant": row,
        "ranks": options.ranks,
        "bytes": options.size,
        "memory_bytes": options.memory,
        "link_bits_per_s": HostLink.parse(options.rate).bits_per_s if options.hosts else None,
        "kills": len(kills),
        "p50_ms": round(median(ordered), 2),
        "p90_ms": round(ordered[math.ceil(0.9 * len(ordered)) - 1], 2),
        "most_ms": round(ordered[-1], 2),
        "within_goal": sum(each <= GOAL_MS for each in ordered),
        "named": sum(kill.named for kill in kills),
        "wrong": sum(options.ranks - 1 - kill.named for kill in kills),
        "misnamed": [text for kill in kills for text in kill.misnamed],
        "samples_ms": [round(kill.last_ms, 2) for kill in kills],
        "load": [round(kill.load, 2) for kill in kills],
    }


def cells(found: Record) -> list[str]:
    return [
        found["contestant"],
        str(found["kills"]),
        f"{found['p50_ms']:.1f}",
        f"{found['p90_ms']:.1f}",
        f"{found['most_ms']:.1f}",
        f"{found['within_goal']} of {found['kills']}",
        f"{found['named']} of {found['kills'] * (found['ranks'] - 1)}",
        f"{min(found['load']):.1f} to {max(found['load']):.1f}",
    ]


PROGRAM = JobProgram("bench.death", __doc__, arguments, measure)


def main(argv: Sequence[str] | None = None) -> int:
    return PROGRAM.main(argv)


if __name__ == "__main__":
    sys.exit(main())
