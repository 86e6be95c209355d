"""``mpirun -n P python -m bench.c10d``: torch.distributed on commlab's backend against torch.distributed on gloo.

Both backends live in one process, in groups of their own; their operations are interleaved by round. Tables: each of
``--operations`` by the size of its largest tensor, a step of DistributedDataParallel, and how long a new group takes to
its first operation.

Operations: ``p50`` is the time of each of those that a sample calls in a row, for 20 ms; ``first`` is the time of the
sample's first one, before which the ranks have done something else, as they have in most programs.

A step is forward, backward with the exchange, and SGD; ``exposed`` is what the exchange adds to a step without one
(no_sync), and ``cpu`` the CPU time that it adds, of all threads of a rank. The floor is DDP whose hook sends nothing.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import commlab
import commlab.c10d
from commlab.trainer.model import build_model, loss_sum

from .contestants import gloo
from .contestants.torch_operations import OPERATIONS, operation
from .core import table
from .core.arguments import count, names, sizes
from .core.harness import progress_line
from .core.program import AsWritten, RankProgram, Section, Session
from .core.ranks import Ranks, share_cores
from .core.results import row_beside
from .core.stats import format_bytes, format_ratio, format_us, ratio

HEAD = ("contestant", "p50 us", "wrong", "/ gloo")
REDUCE_HEAD = ("contestant", "p50 us", "first us", "wrong", "/ gloo", "first / gloo's")
STEP_HEAD = ("contestant", "p50 ms", "exposed ms", "cpu ms", "wrong", "/ gloo", "exposed / gloo's")
_SAMPLE_S = 20e-3
_MOST_IN_A_ROW = 1000
_VOCABULARY = 257


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes", type=sizes, default="4B,64KB,1MB,100MB", metavar="LIST", help="of the largest tensor"
    )
    parser.add_argument(
        "--operations",
        type=names(*OPERATIONS),
        default=["all_reduce"],
        metavar="LIST",
        help=f"of {', '.join(OPERATIONS)} (default: all_reduce)",
    )
    parser.add_argument("--rounds", type=count, default=15, help="samples of each, interleaved (default: %(default)s)")
    parser.add_argument("--model", default="gpt2-tiny", help="of the DDP step, or none (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=4, help="sequences of a rank's step (default: %(default)s)")
    parser.add_argument("--seq-len", type=count, default=64, help="tokens of a sequence (default: %(default)s)")


def connect(options: argparse.Namespace) -> commlab.Group:
    share_cores()
    return commlab.init()


Seconds = dict[str, list[float]]
"""Of each way, by round."""


class Samples(NamedTuple):
    """What was measured, by round: of the slowest rank; of CPU time the mean of the ranks."""

    each: Seconds
    """Of one call among those of a sample."""
    first: Seconds
    """Of the sample's first call."""
    cpu: Seconds
    """Of one call, all threads."""


def interleaved(
    ranks: Ranks, ways: dict[str, Callable[[], object]], rounds: int, show: Callable[[str], None]
) -> Samples:
    """Measure each way, so often in a row that a sample lasts 20 ms."""
    samples = Samples(defaultdict(list), defaultdict(list), defaultdict(list))
    repeats = dict.fromkeys(ways, 1)
    order = random.Random(0)
    for round_ in range(-3, rounds):
        for name in order.sample(list(ways), len(ways)):
            show(f"round {max(0, round_) + 1} of {rounds}: {name}")
            way, count = ways[name], repeats[name]
            ranks.barrier()
            cpu_s, started_s = time.process_time(), time.perf_counter()
            way()
            first_s = time.perf_counter() - started_s
            for _ in range(count - 1):
                way()
            each_s, cpu_s = (time.perf_counter() - started_s) / count, (time.process_time() - cpu_s) / count
            each_s, first_s = ranks.maximum([each_s, first_s])
            if round_ >= 0:
                samples.each[name].append(each_s)
                samples.first[name].append(first_s)
                samples.cpu[name].append(ranks.total([cpu_s])[0] / ranks.size)
            elif round_ > -3:
                # The first round makes what is made on first use, the second one's calls are too few to go by.
                repeats[name] = max(1, min(_MOST_IN_A_ROW, int(_SAMPLE_S / max(each_s, 1e-7))))
    return samples


def one_size(kind: str, size_bytes: int, groups: dict[str, Any], session: Session) -> Section:
    ranks = session.ranks
    ways: dict[str, Callable[[], object]] = {}
    wrong: dict[str, int] = {}
    for name, group in groups.items():
        made = operation(kind, size_bytes, group, ranks.rank, ranks.size)
        made.call()
        wrong[name] = int(ranks.total([made.wrong()])[0])
        ways[name] = operation(kind, size_bytes, group, ranks.rank, ranks.size, zeros=True).call
        size_bytes = made.size_bytes
    show = progress_line(ranks, f"{kind} {format_bytes(size_bytes)}")
    samples = interleaved(ranks, ways, session.options.rounds, show)
    show("")
    found, cells = [], []
    for name in groups:
        row = row_beside("gloo", kind, name, samples.each, wrong[name], ranks, bytes=size_bytes)
        row["first_us"] = round(median(samples.first[name]) * 1e6, 2)
        first = None
        if name != "gloo":
            first = row["ratio_first"] = [
                float(f"{value:.4g}") for value in ratio(samples.first[name], samples.first["gloo"])
            ]
        found.append(row)
        cells.append(
            [
                name,
                format_us(row["p50_us"] / 1e6),
                format_us(row["first_us"] / 1e6),
                str(row["wrong"]),
                format_ratio(row.get("ratio_gloo")),
                format_ratio(first),
            ]
        )
    title = f"{kind}{f', {format_bytes(size_bytes)} of float32' if size_bytes else ''}, {ranks.size} ranks"
    return Section(f"{title}\n{table.render(REDUCE_HEAD, cells)}\n", found)


class DDPStepper:
    """A model under DDP, from the same parameters on all ranks, and its own batch on each."""

    def __init__(self, options: argparse.Namespace, group: Any, hook: Any, ranks: Ranks):
        model = build_model(options.model, seq_len=options.seq_len, vocab_size=_VOCABULARY, dropout=0.0, seed=0)
        self.model = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
        if hook is not None:
            hook.attach(self.model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(ranks.rank)
        self.ids = torch.randint(0, _VOCABULARY, (options.batch, options.seq_len), generator=generator)
        self.labels = self.ids.roll(-1, dims=1)

    def step(self) -> None:
        loss, tokens = loss_sum(self.model, self.ids, self.labels)
        (loss / tokens).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step_alone(self) -> None:
        """The same without an exchange."""
        with self.model.no_sync():
            self.step()


class SendsNothing:
    """A hook of DDP that leaves every rank its own gradients: what is left is DDP itself."""

    def attach(self, model: Any) -> None:
        # DDP compares a hook's annotations, which are texts in this file; a lambda has none.
        model.register_comm_hook(None, lambda state, bucket: self._complete(bucket))

    def _complete(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future


def steps(groups: dict[str, Any], session: Session) -> Section:
    options, ranks = session.options, session.ranks
    ddp_hook = commlab.c10d.DDPHook
    steppers = {
        "gloo": DDPStepper(options, groups["gloo"], None, ranks),
        "commlab": DDPStepper(options, groups["commlab"], None, ranks),
        "commlab, DDPHook": DDPStepper(options, groups["commlab"], ddp_hook(), ranks),
        "commlab, DDPHook(bf16)": DDPStepper(options, groups["commlab"], ddp_hook("bf16"), ranks),
        "the floor": DDPStepper(options, groups["commlab"], SendsNothing(), ranks),
    }
    ways: dict[str, Callable[[], object]] = {name: stepper.step for name, stepper in steppers.items()}
    ways["alone"] = steppers["gloo"].step_alone
    show = progress_line(ranks, "DDP step")
    samples = interleaved(ranks, ways, options.rounds, show)
    show("")
    found = []
    for name, stepper in steppers.items():
        # All ranks must hold the same numbers after all those steps; not where the steps had no exchange.
        digest = float(sum(p.detach().double().sum() for p in stepper.model.parameters()))
        differs = ranks.maximum([digest])[0] != -ranks.maximum([-digest])[0]
        wrong = int(differs and name not in ("gloo", "the floor"))
        row = row_beside("gloo", "ddp step", name, samples.each, wrong, ranks)
        row["exposed_us"] = _added_us(samples.each, name)
        row["cpu_us"] = _added_us(samples.cpu, name)
        found.append(row)
    cells = [
        [
            row["contestant"],
            f"{row['p50_us'] / 1e3:.1f}",
            f"{row['exposed_us'] / 1e3:.1f}",
            f"{row['cpu_us'] / 1e3:.1f}",
            str(row["wrong"]),
            format_ratio(row.get("ratio_gloo")),
            f"{row['exposed_us'] / found[0]['exposed_us']:.2f}" if row is not found[0] else "",
        ]
        for row in found
    ]
    title = f"a DDP step of {options.model}, {options.batch} x {options.seq_len} tokens a rank, {ranks.size} ranks"
    alone_ms = median(samples.each["alone"]) * 1e3
    return Section(f"{title}; {alone_ms:.1f} ms without exchange\n{table.render(STEP_HEAD, cells)}\n", found)


def _added_us(seconds: Seconds, name: str) -> float:
    """What a step has more than one without an exchange; the median of the rounds."""
    return round(median(mine - alone for mine, alone in zip(seconds[name], seconds["alone"], strict=True)) * 1e6, 1)


def new_groups(session: Session) -> Section:
    """From new_group to the end of its first all_reduce."""
    ranks = session.ranks
    ones = torch.ones(4)

    def first(backend: str) -> Callable[[], None]:
        def make() -> None:
            group = dist.new_group(backend=backend)
            dist.all_reduce(ones.fill_(1.0), group=group)
            made.append(group)

        return make

    made: list[Any] = []
    samples: Seconds = {"gloo": [], "commlab": []}
    for _ in range(min(9, session.options.rounds)):
        for backend in samples:
            ranks.barrier()
            started_s = time.perf_counter()
            first(backend)()
            samples[backend].append(ranks.maximum([time.perf_counter() - started_s])[0])
            dist.destroy_process_group(made.pop())
    found = [row_beside("gloo", "new_group", name, samples, int(ones[0] != ranks.size), ranks) for name in samples]
    cells = [
        [each["contestant"], format_us(each["p50_us"] / 1e6), str(each["wrong"]), format_ratio(each.get("ratio_gloo"))]
        for each in found
    ]
    return Section(f"new_group and a first all_reduce, {ranks.size} ranks\n{table.render(HEAD, cells)}\n", found)


def measure(session: Session) -> Iterator[Section]:
    gloo.connect()
    commlab.c10d.register()
    groups: dict[str, Any] = {"gloo": dist.group.WORLD, "commlab": dist.new_group(backend="commlab")}
    for kind in session.options.operations:
        for size_bytes in session.options.sizes if kind != "barrier" else session.options.sizes[:1]:
            yield one_size(kind, size_bytes, groups, session)
    yield new_groups(session)
    if session.options.model != "none":
        yield steps(groups, session)
    dist.destroy_process_group()


PROGRAM = RankProgram(
    "bench.c10d", __doc__, arguments, measure, connect, "one rank exchanges nothing", formatter=AsWritten
)


def main() -> int:
    return PROGRAM.main()


if __name__ == "__main__":
    sys.exit(main())
