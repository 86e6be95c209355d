"""``mpirun -n P python -m bench.step``: a training step without its forward and backward passes.

Gradients that are there already are packed, exchanged and clipped, the optimizer (fused AdamW) updates, and every rank
has the new parameters. commlab's strategies, by their public calls, against DDP, Horovod, and gloo with everything by
hand at its best: one allreduce of one flat buffer that needs no packing, torch's clip_grad_norm_, fused AdamW. What
autograd costs to hand over gradients that nobody computes (a few 100 us) is in the time of all but gloo. CPU and
switches (threads that went to sleep) are those of all ranks in one step, medians: where ranks share cores, they tell
more than the time. Horovod's thread wakes in everybody's steps: give it a launch with ``dps`` alone.

Memory: the model four to five times per rank and contestant. Where that is too much, name one contestant a launch and
alternate the launches.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

import commlab
from commlab.runtime.links import LINKS
from commlab.strategies.options import KNOWN
from commlab.trainer.model import build_model, describe_model

from .contestants import gloo
from .contestants.known_gradients import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    KnownGradients,
    Parameters,
    Reference,
)
from .core import table
from .core.arguments import count, names
from .core.harness import progress_line
from .core.program import AsWritten, RankProgram, Section, Session
from .core.ranks import Ranks, share_cores
from .core.results import Record
from .core.stats import format_ratio, ratio

HEAD = ("contestant", "p50 ms", "CPU ms", "switches", "wrong", "/ best peer")
STRATEGIES = ("dps", "dps-node", "dps-job", "allreduce", "ps", "ps-node", "ps-job", "ddp", "horovod")
"""dps-node, dps-job and those of ps: with ``shard`` of that name, to be compared in one launch."""
PEERS = ("gloo", "ddp", "horovod")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2-100m", help="whose shapes the tensors have (default: %(default)s)")
    parser.add_argument(
        "--contestants",
        type=names("gloo", *(name + wire for name in STRATEGIES for wire in ("", ":fp16", ":bf16"))),
        default="dps,allreduce,gloo",
        metavar="LIST",
        help=f"gloo, {', '.join(STRATEGIES)}; with :fp16 or :bf16 for the wire (default: %(default)s)",
    )
    parser.add_argument(
        "--shard", choices=KNOWN["shard"], default="auto", help="of dps and ps, on several nodes (default: %(default)s)"
    )
    parser.add_argument(
        "--links", choices=LINKS, default="auto", help="what joins several nodes (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=count, default=7, help="steps of each, interleaved (default: %(default)s)")


class Spent(NamedTuple):
    """What this process has taken of the cores so far: all its threads, user and system."""

    cpu_s: float
    switches: float
    """How often a thread has gone to sleep: to wait for a peer, or for another thread."""

    @classmethod
    def now(cls) -> Spent:
        return cls(time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw)


class Stepper:
    """One contestant: a model of known gradients, and a way to make a step of them."""

    def __init__(self, known: KnownGradients):
        self.known, self.model, self.reference = known, Parameters(known.shapes), Reference(known)
        self.samples_s: list[float] = []
        self.spent: list[Spent] = []
        """What each step took of all ranks' cores."""
        self.wrong = 0

    def fill(self) -> None:
        """Put the gradients of the next step in place; not timed."""
        self.known.fill(self.reference.steps)

    def step(self) -> float:
        """Exchange, clip and update; returns the norm of the reduced gradient."""
        raise NotImplementedError

    def check(self, norm: float) -> None:
        self.wrong += self.reference.wrong(norm, list(self.model.parameters()))


class EngineStepper(Stepper):
    """A strategy of commlab, by the public calls of its engine."""

    def __init__(self, known: KnownGradients, contestant: str, wire: str | None, shard: str):
        super().__init__(known)
        optimizer = adamw(self.model)
        strategy, _, named = contestant.partition("-")
        shard = (named or shard) if strategy in ("dps", "ps") else "auto"
        self.engine = commlab.strategy(
            strategy, self.model, optimizer, max_grad_norm=MAX_GRAD_NORM, wire=wire, shard=shard
        )
        # DDP and Horovod write the mean into the gradients that are handed to them.
        self.overwrites = strategy in PEERS
        self.gradients = [torch.empty_like(each) for each in known.gradients] if self.overwrites else known.gradients

    def fill(self) -> None:
        super().fill()
        if self.overwrites:
            torch._foreach_copy_(self.gradients, self.known.gradients)

    def step(self) -> float:
        self.engine.backward(self.engine.model(self.gradients))
        self.engine.step()
        self.engine.zero_grad()
        assert self.engine.grad_norm is not None
        return self.engine.grad_norm


class GlooStepper(Stepper):
    """gloo, with everything around the exchange written by hand."""

    def __init__(self, known: KnownGradients, size: int):
        super().__init__(known)
        gloo.connect()
        self.size, self.optimizer = size, adamw(self.model)
        numels = [shape.numel() for shape in known.shapes]
        self.flat = torch.empty(sum(numels))
        self.views = [flat.view(shape) for flat, shape in zip(self.flat.split(numels), known.shapes, strict=True)]
        for parameter, view in zip(self.model.parameters(), self.views, strict=True):
            parameter.grad = view

    def fill(self) -> None:
        super().fill()
        torch._foreach_copy_(self.views, self.known.gradients)

    def step(self) -> float:
        dist.all_reduce(self.flat)
        self.flat.div_(self.size)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM, foreach=True)
        self.optimizer.step()
        return float(norm)


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


def connect(options: argparse.Namespace) -> commlab.Group:
    share_cores()
    return commlab.init(links=options.links)


def measure(session: Session) -> Iterator[Section]:
    options, ranks = session.options, session.ranks
    shape = describe_model(options.model)
    with torch.device("meta"):
        meta = build_model(options.model, seq_len=shape.seq_len, vocab_size=shape.vocab_size or 257)
    known = KnownGradients([parameter.shape for parameter in meta.parameters()], ranks)
    steppers: dict[str, Stepper] = {}
    for name in options.contestants:
        kind, _, wire = name.partition(":")
        if kind == "gloo":
            steppers[name] = GlooStepper(known, ranks.size)
        else:
            steppers[name] = EngineStepper(known, kind, wire or None, options.shard)
    order = random.Random(0)
    show = progress_line(ranks, "bench.step")
    for round_ in range(-1, options.rounds):
        for name in order.sample(options.contestants, len(options.contestants)):
            show(f"round {max(0, round_) + 1} of {options.rounds}: {name}")
            stepper = steppers[name]
            stepper.fill()
            ranks.barrier()
            before, started_s = Spent.now(), time.perf_counter()
            norm = stepper.step()
            own_s, after = time.perf_counter() - started_s, Spent.now()
            # Whoever is done sleeps: a rank that spins in a barrier would take a core from those that are not.
            ranks.rest()
            spent_s = ranks.maximum([own_s])[0]
            spent = Spent(*ranks.total([now - then for now, then in zip(after, before, strict=True)]))
            if round_ >= 0:  # the first makes what is made on first use
                stepper.samples_s.append(spent_s)
                stepper.spent.append(spent)
            stepper.check(norm)
    show("")
    for stepper in steppers.values():
        stepper.wrong = int(ranks.total([stepper.wrong])[0])
    numel = sum(shape.numel() for shape in known.shapes)
    found = records(steppers, ranks, options.model, numel)
    title = f"a step of {options.model} ({numel:,} numbers in {len(known.shapes)} tensors), {ranks.size} ranks"
    yield Section(f"{title}\n{table.render(HEAD, [cells(record) for record in found])}", found)


def records(steppers: dict[str, Stepper], ranks: Ranks, model: str, numel: int) -> list[Record]:
    """A record per contestant; ratios are to the fastest peer whose steps are right."""
    found = []
    peers = {name: stepper.samples_s for name, stepper in steppers.items() if name in PEERS and not stepper.wrong}
    best = min(peers, key=lambda name: median(peers[name])) if peers else None
    for name, stepper in steppers.items():
        kind, _, wire = name.partition(":")
        record: Record = {
            "type": "row",
            "op": "step",
            "model": model,
            "bytes": 4 * numel,
            "ranks": ranks.size,
            "contestant": name,
            "kind": "peer" if kind in PEERS else "commlab",
            "wire": wire or None,
            "p50_us": round(median(stepper.samples_s) * 1e6, 1),
            "cpu_us": round(median(spent.cpu_s for spent in stepper.spent) * 1e6, 1),
            "switches": median(spent.switches for spent in stepper.spent),
            "wrong": stepper.wrong,
            "rounds": len(stepper.samples_s),
            "samples_us": [round(sample * 1e6, 1) for sample in stepper.samples_s],
        }
        if best and name != best:
            record["best_peer"] = best
            record["ratio_best_peer"] = [round(value, 4) for value in ratio(stepper.samples_s, peers[best])]
        found.append(record)
    return found


def cells(record: Record) -> tuple[str, ...]:
    compared = f"{format_ratio(record['ratio_best_peer'])} {record['best_peer']}" if "best_peer" in record else ""
    return (
        record["contestant"],
        f"{record['p50_us'] / 1e3:.1f}",
        f"{record['cpu_us'] / 1e3:.1f}",
        f"{record['switches']:.0f}",
        str(record["wrong"]),
        compared,
    )


PROGRAM = RankProgram("bench.step", __doc__, arguments, measure, connect, formatter=AsWritten)


def main() -> int:
    return PROGRAM.main()


if __name__ == "__main__":
    sys.exit(main())
