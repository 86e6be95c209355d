"""``mpirun -n P python -m bench.step``: a training step without its forward and backward passes.

Gradients that are there already are packed, exchanged and clipped, the optimizer (fused AdamW) updates, and every rank
has the new parameters. commlab's strategies, by their public calls, against DDP, Horovod, and gloo with everything by
hand at its best: one allreduce of one flat buffer that needs no packing, torch's clip_grad_norm_, fused AdamW. What
autograd costs to hand over gradients that nobody computes (a few 100 us) is in the time of all but gloo. Horovod's
thread wakes in everybody's steps: give it a launch with ``dps`` alone.

Memory: the model four to five times per rank and contestant. Where that is too much, name one contestant a launch and
alternate the launches.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

import commlab
from commlab.trainer.model import build_model, describe_model

from .contestants import gloo
from .contestants.known_gradients import LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Parameters, Reference, Work
from .core import results, table
from .core.arguments import count, names
from .core.harness import progress_line
from .core.ranks import Ranks, share_cores
from .core.stats import format_ratio, ratio

HEAD = ("contestant", "p50 ms", "wrong", "/ best peer")
STRATEGIES = ("dps", "allreduce", "ps", "ddp", "horovod")
PEERS = ("gloo", "ddp", "horovod")


class Side:
    """One contestant: a model, and what makes a step of it."""

    def __init__(self, work: Work):
        self.work, self.model, self.reference = work, Parameters(work.shapes), Reference(work)
        self.samples_s: list[float] = []
        self.bad = 0

    def fill(self) -> None:
        """Put the gradients of the next step in place; not timed."""
        self.work.fill(self.reference.steps)

    def step(self) -> float:
        """Exchange, clip, update; returns the norm of the reduced gradient."""
        raise NotImplementedError

    def check(self, norm: float) -> None:
        self.bad += self.reference.wrong(norm, list(self.model.parameters()))


class Engine(Side):
    def __init__(self, work: Work, strategy: str, wire: str | None):
        super().__init__(work)
        optimizer = adamw(self.model)
        self.engine = commlab.strategy(strategy, self.model, optimizer, max_grad_norm=MAX_GRAD_NORM, wire=wire)
        # DDP and Horovod write the mean into the gradients that they were given.
        self.overwrites = strategy in PEERS
        self.given = [torch.empty_like(each) for each in work.gradients] if self.overwrites else work.gradients

    def fill(self) -> None:
        super().fill()
        if self.overwrites:
            torch._foreach_copy_(self.given, self.work.gradients)

    def step(self) -> float:
        self.engine.backward(self.engine.model(self.given))
        self.engine.step()
        self.engine.zero_grad()
        assert self.engine.grad_norm is not None
        return self.engine.grad_norm


class Gloo(Side):
    def __init__(self, work: Work, size: int):
        super().__init__(work)
        gloo.connect()
        self.size, self.optimizer = size, adamw(self.model)
        numels = [shape.numel() for shape in work.shapes]
        self.flat = torch.empty(sum(numels))
        self.views = [part.view(shape) for part, shape in zip(self.flat.split(numels), work.shapes, strict=True)]
        for parameter, view in zip(self.model.parameters(), self.views, strict=True):
            parameter.grad = view

    def fill(self) -> None:
        super().fill()
        torch._foreach_copy_(self.views, self.work.gradients)

    def step(self) -> float:
        dist.all_reduce(self.flat)
        self.flat.div_(self.size)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM, foreach=True)
        self.optimizer.step()
        return float(norm)


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


def rows(sides: dict[str, Side], ranks: Ranks, model: str, numel: int) -> list[dict[str, Any]]:
    found = []
    peers = {name: side.samples_s for name, side in sides.items() if name in PEERS and not side.bad}
    best = min(peers, key=lambda name: median(peers[name])) if peers else None
    for name, side in sides.items():
        kind, _, wire = name.partition(":")
        row: dict[str, Any] = {
            "type": "row",
            "op": "step",
            "model": model,
            "bytes": 4 * numel,
            "ranks": ranks.size,
            "contestant": name,
            "kind": "peer" if kind in PEERS else "commlab",
            "wire": wire or None,
            "p50_us": round(median(side.samples_s) * 1e6, 1),
            "wrong": side.bad,
            "rounds": len(side.samples_s),
            "samples_us": [round(sample * 1e6, 1) for sample in side.samples_s],
        }
        if best and name != best:
            row["best_peer"] = best
            row["ratio_best_peer"] = [round(value, 4) for value in ratio(side.samples_s, peers[best])]
        found.append(row)
    return found


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", default="gpt2-100m", help="whose shapes the tensors have (default: %(default)s)")
    found.add_argument(
        "--contestants",
        type=names("gloo", *(name + wire for name in STRATEGIES for wire in ("", ":fp16", ":bf16"))),
        default="dps,allreduce,gloo",
        metavar="LIST",
        help=f"gloo, {', '.join(STRATEGIES)}; with :fp16 or :bf16 for the wire (default: %(default)s)",
    )
    found.add_argument("--rounds", type=count, default=7, help="steps of each, interleaved (default: %(default)s)")
    found.add_argument("--json", metavar="FILE", help="add the results to this file of JSON lines")
    return found


def main() -> int:
    options = parser().parse_args()
    share_cores()
    commlab.init()
    ranks = Ranks()
    shape = describe_model(options.model)
    with torch.device("meta"):
        meta = build_model(options.model, seq_len=shape.seq_len, vocab_size=shape.vocab_size or 257)
    work = Work([parameter.shape for parameter in meta.parameters()], ranks)
    numel = sum(shape.numel() for shape in work.shapes)
    sides: dict[str, Side] = {}
    for name in options.contestants:
        kind, _, wire = name.partition(":")
        sides[name] = Gloo(work, ranks.size) if kind == "gloo" else Engine(work, kind, wire or None)
    run = results.describe(ranks, "bench.step")
    order = random.Random(0)
    show = progress_line(ranks, "bench.step")
    for turn in range(-1, options.rounds):
        for name in order.sample(options.contestants, len(options.contestants)):
            show(f"round {max(0, turn) + 1} of {options.rounds}: {name}")
            side = sides[name]
            side.fill()
            ranks.barrier()
            started_s = time.perf_counter()
            norm = side.step()
            spent_s = ranks.maximum([time.perf_counter() - started_s])[0]
            if turn >= 0:  # the first makes what is made on first use
                side.samples_s.append(spent_s)
            side.check(norm)
    show("")
    for side in sides.values():
        side.bad = int(ranks.total([side.bad])[0])
    found = rows(sides, ranks, options.model, numel)
    if ranks.rank == 0:
        print(f"a step of {options.model} ({numel:,} numbers in {len(work.shapes)} tensors), {ranks.size} ranks")
        print(table.render(HEAD, [cells(row) for row in found]))
        if options.json:
            results.append(options.json, [run, *found])
    commlab.shutdown()
    return 1 if any(side.bad for side in sides.values()) else 0


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    compared = f"{format_ratio(row['ratio_best_peer'])} {row['best_peer']}" if "best_peer" in row else ""
    return row["contestant"], f"{row['p50_us'] / 1e3:.1f}", str(row["wrong"]), compared


if __name__ == "__main__":
    sys.exit(main())
