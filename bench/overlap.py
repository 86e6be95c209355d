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
from collections.abc import Iterable, Iterator, Sequence
from statistics import median

import commlab
from commlab.trainer.model import describe_model

from .contestants.training_step import Computing, Task, TrainingStep
from .core import table
from .core.arguments import count, names
from .core.harness import progress_line
from .core.program import AsWritten, RankProgram, Section, Session
from .core.ranks import Ranks, link_bytes_per_s, share_cores
from .core.results import Record
from .core.stats import ratio

CONTESTANTS = ("allreduce", "allreduce:fp16", "allreduce:bf16", "dps", "dps:fp16", "dps:bf16")
HEAD = ("contestant", "overlap", "step ms", "compute", "update", "exposed", "floor", "late", "hidden", "wrong")
Variant = tuple[str, bool]
"""A contestant, and whether its buckets travel during backward."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="gpt2-tiny", help="gpt2-100m is the paper's (default: %(default)s)")
    parser.add_argument("--batch-size", type=count, help="sequences per rank (default: 16 for gpt2-tiny, otherwise 1)")
    parser.add_argument("--seq-len", type=count, help="tokens (default: the model's)")
    parser.add_argument(
        "--contestants",
        type=names(*CONTESTANTS),
        default="allreduce,allreduce:fp16,dps",
        metavar="LIST",
        help=f"{', '.join(CONTESTANTS)} (default: %(default)s)",
    )
    parser.add_argument("--bucket-mb", type=float, help="of 2^20 bytes (default: 0.5 for gpt2-tiny, otherwise 25)")
    parser.add_argument("--rounds", type=count, default=5, help="steps of each, interleaved (default: %(default)s)")
    parser.add_argument("--threads", type=count, help="torch threads per rank (default: this machine's cores / ranks)")
    parser.add_argument("--seed", type=int, default=0, help="of the model, the tokens and the order of the turns")


def connect(options: argparse.Namespace) -> commlab.Group:
    share_cores(options.threads)
    return commlab.init()


def measure(session: Session) -> Iterator[Section]:
    import torch

    options, group, ranks = session.options, session.group, session.ranks
    tiny = options.model == "gpt2-tiny"
    seq_len = options.seq_len or describe_model(options.model).seq_len
    task = Task(options.model, options.batch_size or (16 if tiny else 1), seq_len, group, ranks, options.seed)
    bucket_bytes = round((options.bucket_mb or (0.5 if tiny else 25.0)) * 2**20)
    steps = {name: TrainingStep(name, task, bucket_bytes) for name in options.contestants}
    computing = Computing(next(iter(steps.values())))
    threads = torch.get_num_threads()
    session.run |= {"progress": group.progress_mode, "threads": threads, "bucket_bytes": bucket_bytes}
    samples = samples_of(steps, computing, ranks, options.rounds, options.seed)
    for training_step in steps.values():
        training_step.wrong = int(ranks.total([training_step.wrong])[0])
    # Ranks of one host share its link, and some of what they send does not go there.
    link = link_bytes_per_s() if len(group.nodes) == ranks.size else 0.0
    made = records(samples, steps, computing, task, link)
    hosts = f"{len(group.nodes)} host{'s' * (len(group.nodes) > 1)}"
    title = f"a step of {options.model}, {task.tokens} tokens per rank, {ranks.size} ranks on {hosts}"
    shown = table.render(HEAD, [cells(record) for record in made], left=(0, 1))
    yield Section(f"{title}\n{shown}", made, failed=sum(training_step.wrong for training_step in steps.values()))


def exposed_s(samples_s: Sequence[tuple[float, float]], computing_s: Sequence[float]) -> list[float]:
    """The exposed seconds, round by round, from (step, update) and from computing alone: a delay that slows a whole
    round slows computing too."""
    return [step - update - alone for (step, update), alone in zip(samples_s, computing_s, strict=True)]


def samples_of(
    steps: dict[str, TrainingStep], computing: Computing, ranks: Ranks, rounds: int, seed: int
) -> dict[Variant, list[tuple[float, float]]]:
    """(step, update) of every variant and round, in seconds of the slowest rank. Collective."""
    variants: list[Variant | None] = [None, *((name, overlap) for name in steps for overlap in (True, False))]
    found: dict[Variant, list[tuple[float, float]]] = {variant: [] for variant in variants if variant}
    show, order = progress_line(ranks, "bench.overlap"), random.Random(seed)
    computing.measure()
    for training_step in steps.values():  # makes what is made on first use
        show(f"warming up: {training_step.name}")
        training_step.step(overlap=True)
    computing.samples_s.clear()
    for round_ in range(rounds):
        for variant in order.sample(variants, len(variants)):
            show(f"round {round_ + 1} of {rounds}: {'computing alone' if variant is None else variant[0]}")
            if variant is None:
                computing.measure()
            else:
                step_s, update_s = ranks.maximum(steps[variant[0]].step(overlap=variant[1]))
                found[variant].append((step_s, update_s))
    show("")
    return found


def records(
    found: dict[Variant, list[tuple[float, float]]],
    steps: dict[str, TrainingStep],
    computing: Computing,
    task: Task,
    link: float,
) -> list[Record]:
    """A record per variant. ``link``: bytes per second that a rank's own link carries each way; 0 where it has none."""
    alone_s = [forward_s + backward_s for forward_s, backward_s in computing.samples_s]
    exposed = {variant: exposed_s(samples, alone_s) for variant, samples in found.items()}
    made = []
    for (name, overlap), samples in found.items():
        training_step = steps[name]
        record: Record = {
            "type": "row",
            "op": "overlap",
            "model": task.model_name,
            "tokens": task.tokens,
            "ranks": task.size,
            "contestant": name,
            "kind": "commlab",
            "overlap": overlap,
            "step_ms": _ms(step_s for step_s, _ in samples),
            "compute_ms": _ms(alone_s),
            "backward_ms": _ms(backward_s for _, backward_s in computing.samples_s),
            "update_ms": _ms(update_s for _, update_s in samples),
            "exposed_ms": _ms(exposed[name, overlap]),
            "bytes_sent": training_step.bytes_sent,
            "wrong": training_step.wrong,
            "rounds": len(samples),
            "step_samples_ms": [round(1e3 * step_s, 1) for step_s, _ in samples],
            "exposed_samples_ms": [round(1e3 * each, 1) for each in exposed[name, overlap]],
        }
        if link:
            record["floor_ms"] = round(1e3 * training_step.bytes_sent / link, 1)
            record["late_ms"] = round(1e3 * training_step.late_bytes / link, 1)
        if overlap and min(exposed[name, False]) > 0:
            middle, low, high = ratio(exposed[name, True], exposed[name, False])
            record["hidden"] = [round(1 - share, 4) for share in (middle, high, low)]
        made.append(record)
    return made


def _ms(samples_s: Iterable[float]) -> float:
    return round(1e3 * float(median(samples_s)), 1)


def cells(record: Record) -> list[str]:
    times = [f"{record[f'{phase}_ms']:,.0f}" for phase in ("step", "compute", "update", "exposed")]
    link = [f"{record[f'{column}_ms']:,.0f}" if f"{column}_ms" in record else "" for column in ("floor", "late")]
    hidden = "{:.0%} ({:.0%} to {:.0%})".format(*record["hidden"]) if "hidden" in record else ""
    return [record["contestant"], "on" if record["overlap"] else "off", *times, *link, hidden, str(record["wrong"])]


PROGRAM = RankProgram(
    "bench.overlap",
    __doc__,
    arguments,
    measure,
    connect,
    alone="one rank sends nothing",
    failure="results are wrong",
    formatter=AsWritten,
)


def main() -> int:
    return PROGRAM.main()


if __name__ == "__main__":
    sys.exit(main())
