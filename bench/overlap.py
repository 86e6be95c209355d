"""``mpirun -n P python -m bench.overlap``: how much of the exchange a backward pass hides.

Each contestant makes real training steps (forward, backward, update) twice: with overlap, where buckets travel while
backward goes on, and without, where the same buckets leave once it has ended. Beside them forward and backward alone,
with nothing sent. All alternate by round. Exposed is what a step takes longer than computing and updating.

    python -m bench.cluster --hosts 2 --rate 200mbit -- python -m bench.overlap
    python -m bench.cluster --hosts 2 --rate 200mbit -- python -m bench.overlap --model gpt2-100m --seq-len 512

Memory: the model twice per rank and contestant, and three times beside.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

import commlab
from commlab.trainer.model import describe_model

from .contestants.training_step import Computing, Side, Work
from .core import results, table
from .core.arguments import count, names
from .core.harness import progress_line
from .core.ranks import Ranks, link_bytes_per_s, share_cores
from .core.stats import ratio

CONTESTANTS = ("allreduce", "allreduce:fp16", "allreduce:bf16", "dps", "dps:fp16", "dps:bf16")
HEAD = ("contestant", "overlap", "step ms", "compute", "update", "exposed", "floor", "late", "hidden", "wrong")
Turn = tuple[str, bool]
"""A contestant, and whether buckets travel during backward."""


def exposed_s(samples_s: Sequence[tuple[float, float]], computing_s: Sequence[float]) -> list[float]:
    """Of (step, update) and computing alone, round by round: what slows a whole round, slows computing too."""
    return [step - update - alone for (step, update), alone in zip(samples_s, computing_s, strict=True)]


def measure(
    sides: dict[str, Side], computing: Computing, ranks: Ranks, rounds: int, seed: int
) -> dict[Turn, list[tuple[float, float]]]:
    """(step, update) of every turn and round, in seconds, the slowest rank's. Collective."""
    turns: list[Turn | None] = [None, *((name, overlap) for name in sides for overlap in (True, False))]
    found: dict[Turn, list[tuple[float, float]]] = {turn: [] for turn in turns if turn}
    show, order = progress_line(ranks, "bench.overlap"), random.Random(seed)
    computing.run()
    for side in sides.values():  # makes what is made on first use
        show(f"warming up: {side.name}")
        side.step(overlap=True)
    computing.samples_s.clear()
    for round_ in range(rounds):
        for turn in order.sample(turns, len(turns)):
            show(f"round {round_ + 1} of {rounds}: {'computing alone' if turn is None else turn[0]}")
            if turn is None:
                computing.run()
            else:
                step_s, update_s = ranks.maximum(sides[turn[0]].step(overlap=turn[1]))
                found[turn].append((step_s, update_s))
    show("")
    return found


def rows(
    found: dict[Turn, list[tuple[float, float]]],
    sides: dict[str, Side],
    computing: Computing,
    work: Work,
    link: float,
) -> list[dict[str, Any]]:
    """A record per turn. ``link``: bytes per second that a rank's own link carries each way; 0 where it has none."""
    alone_s = [forward_s + backward_s for forward_s, backward_s in computing.samples_s]
    exposed = {turn: exposed_s(samples, alone_s) for turn, samples in found.items()}
    made = []
    for (name, overlap), samples in found.items():
        side = sides[name]
        row: dict[str, Any] = {
            "type": "row",
            "op": "overlap",
            "model": work.model_name,
            "tokens": work.tokens,
            "ranks": work.size,
            "contestant": name,
            "kind": "commlab",
            "overlap": overlap,
            "step_ms": _ms(step_s for step_s, _ in samples),
            "compute_ms": _ms(alone_s),
            "backward_ms": _ms(backward_s for _, backward_s in computing.samples_s),
            "update_ms": _ms(update_s for _, update_s in samples),
            "exposed_ms": _ms(exposed[name, overlap]),
            "bytes_sent": side.bytes_sent,
            "wrong": side.wrong,
            "rounds": len(samples),
            "step_samples_ms": [round(1e3 * step_s, 1) for step_s, _ in samples],
            "exposed_samples_ms": [round(1e3 * each, 1) for each in exposed[name, overlap]],
        }
        if link:
            row["floor_ms"] = round(1e3 * side.bytes_sent / link, 1)
            row["late_ms"] = round(1e3 * side.late_bytes / link, 1)
        if overlap and min(exposed[name, False]) > 0:
            middle, low, high = ratio(exposed[name, True], exposed[name, False])
            row["hidden"] = [round(1 - share, 4) for share in (middle, high, low)]
        made.append(row)
    return made


def _ms(samples_s: Iterable[float]) -> float:
    return round(1e3 * float(median(samples_s)), 1)


def cells(row: dict[str, Any]) -> list[str]:
    times = [f"{row[f'{part}_ms']:,.0f}" for part in ("step", "compute", "update", "exposed")]
    link = [f"{row[f'{part}_ms']:,.0f}" if f"{part}_ms" in row else "" for part in ("floor", "late")]
    hidden = "{:.0%} ({:.0%} to {:.0%})".format(*row["hidden"]) if "hidden" in row else ""
    return [row["contestant"], "on" if row["overlap"] else "off", *times, *link, hidden, str(row["wrong"])]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m bench.overlap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", default="gpt2-tiny", help="gpt2-100m is the paper's (default: %(default)s)")
    found.add_argument("--batch-size", type=count, help="sequences per rank (default: 16 for gpt2-tiny, otherwise 1)")
    found.add_argument("--seq-len", type=count, help="tokens (default: the model's)")
    found.add_argument(
        "--contestants",
        type=names(*CONTESTANTS),
        default="allreduce,allreduce:fp16,dps",
        metavar="LIST",
        help=f"{', '.join(CONTESTANTS)} (default: %(default)s)",
    )
    found.add_argument("--bucket-mb", type=float, help="of 2^20 bytes (default: 0.5 for gpt2-tiny, otherwise 25)")
    found.add_argument("--rounds", type=count, default=5, help="steps of each, interleaved (default: %(default)s)")
    found.add_argument("--threads", type=count, help="torch threads per rank (default: this machine's cores / ranks)")
    found.add_argument("--seed", type=int, default=0, help="of the model, the tokens and the order of the turns")
    found.add_argument("--json", metavar="FILE", help="add the results to this file of JSON lines")
    return found


def main() -> int:
    options = parser().parse_args()
    import torch

    group = commlab.init()
    ranks = Ranks()
    if ranks.size == 1:
        parser().error("one rank sends nothing: start it with mpirun -n 2, or more")
    share_cores(options.threads)
    tiny = options.model == "gpt2-tiny"
    seq_len = options.seq_len or describe_model(options.model).seq_len
    work = Work(options.model, options.batch_size or (16 if tiny else 1), seq_len, group, ranks, options.seed)
    bucket_bytes = round((options.bucket_mb or (0.5 if tiny else 25.0)) * 2**20)
    sides = {name: Side(name, work, bucket_bytes) for name in options.contestants}
    computing = Computing(next(iter(sides.values())))
    run = results.describe(ranks, "bench.overlap")
    run |= {"progress": group.progress_mode, "threads": torch.get_num_threads(), "bucket_bytes": bucket_bytes}
    found = measure(sides, computing, ranks, options.rounds, options.seed)
    for side in sides.values():
        side.wrong = int(ranks.total([side.wrong])[0])
    # Ranks of one host share its link, and some of what they send does not go there.
    link = link_bytes_per_s() if len(group.nodes) == ranks.size else 0.0
    made = rows(found, sides, computing, work, link)
    if ranks.rank == 0:
        hosts = f"{len(group.nodes)} host{'s' * (len(group.nodes) > 1)}"
        print(f"a step of {options.model}, {work.tokens} tokens per rank, {ranks.size} ranks on {hosts}")
        print(table.render(HEAD, [cells(row) for row in made], left=(0, 1)))
        if options.json:
            results.append(options.json, [run, *made])
    return ranks.end(sum(side.wrong for side in sides.values()), "results are wrong")


if __name__ == "__main__":
    sys.exit(main())
