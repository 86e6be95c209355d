"""``mpirun -n P python -m bench.hvd``: Horovod's API on commlab against Horovod, where that is built.

Each side is up only while it is measured, because Horovod's thread takes time from all else in its process; the sides
follow each other in every round. Three tables: allreduce in place by size; what a computation loses to an
``hvd.init()`` that nobody uses; a step of a small convolutional net under DistributedOptimizer, in images per second.
Horovod is built by ``python -m bench.horovod_build``; without it commlab's rows stand alone.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import nn

import commlab
from commlab.errors import UsageError

from .core import table
from .core.arguments import count, sizes
from .core.harness import progress_line
from .core.program import AsWritten, RankProgram, Section, Session
from .core.ranks import Ranks, share_cores
from .core.results import row_beside
from .core.stats import format_bytes, format_ratio, format_us

SIDES = {"commlab": "commlab.horovod.torch", "Horovod": "horovod.torch"}
HEAD = ("contestant", "p50 us", "wrong", "/ Horovod")
IDLE_HEAD = ("what is up", "p50 ms", "loses")
STEP_HEAD = ("contestant", "images/s", "wrong", "/ Horovod")
_SAMPLE_S = 20e-3
_STEPS_S = 300e-3
"""A sample of steps."""
_WARM_UP = 6
"""Operations, or steps, before those that are measured: in them both sides learn what comes again and again."""
_IMAGE = (3, 32, 32)

Samples = dict[str, list[float]]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=sizes, default="4B,64KB,1MB,100MB", metavar="LIST", help="of allreduce")
    parser.add_argument("--rounds", type=count, default=9, help="rounds of each side (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=16, help="images of a rank's step (default: %(default)s)")


def connect(options: argparse.Namespace) -> commlab.Group:
    share_cores()
    return commlab.init()


def importable(ranks: Ranks) -> tuple[dict[str, Any], str]:
    """The modules that all ranks can import, by side, and why one is missing. Collective."""
    found, missing = {}, ""
    for name, module in SIDES.items():
        reason = ""
        try:
            found[name] = importlib.import_module(module)
        except (ImportError, UsageError) as error:
            reason = f"{name} can't be had ({error}): python -m bench.horovod_build"
        reason = ranks.first(reason)
        if reason:
            found.pop(name, None)
            missing = reason
    return found, missing


class Alternation:
    """The sides of a benchmark, one of them up at a time."""

    def __init__(self, session: Session, found: dict[str, Any]):
        self.ranks, self.count, self.found = session.ranks, session.options.rounds, found

    def take(self, what: str, body: Callable[[str, Any], None]) -> None:
        """``body(name, hvd)`` for each side, so often as there are rounds, and once more to begin with."""
        show = progress_line(self.ranks, what)
        for round_ in range(-1, self.count):
            for name, hvd in self.found.items():
                show(f"round {max(0, round_) + 1} of {self.count}: {name}")
                hvd.init()
                try:
                    body(name if round_ >= 0 else "", hvd)
                finally:
                    hvd.shutdown()
                self.ranks.barrier()
        show("")

    def seconds(self, work: Callable[[], object], sample_s: float = _SAMPLE_S) -> float:
        """Of one call of ``work``, of the slowest rank; of so many in a row that they last ``sample_s``."""
        self.ranks.barrier()
        started_s = time.perf_counter()
        work()
        once_s = self.ranks.maximum([time.perf_counter() - started_s])[0]
        repeats = max(1, min(200, int(sample_s / max(once_s, 1e-7))))
        self.ranks.barrier()
        started_s = time.perf_counter()
        for _ in range(repeats):
            work()
        return self.ranks.maximum([time.perf_counter() - started_s])[0] / repeats


def allreduce(alternation: Alternation, size_bytes: int) -> Section:
    numel, size = max(1, size_bytes // 4), alternation.ranks.size
    whole = torch.empty(numel)
    samples: Samples = {name: [] for name in alternation.found}
    wrong = dict.fromkeys(alternation.found, 0)

    def body(name: str, hvd: Any) -> None:
        def work() -> None:
            hvd.allreduce_(whole, op=hvd.Sum, name="whole")

        for _ in range(_WARM_UP):
            work()
        whole.fill_(1.0)
        work()
        differs = int(alternation.ranks.total([float((whole != size).any())])[0])
        whole.zero_()
        spent_s = alternation.seconds(work)
        if name:
            wrong[name] += differs
            samples[name].append(spent_s)

    alternation.take(f"allreduce {format_bytes(4 * numel)}", body)
    found = [
        row_beside("Horovod", "allreduce", name, samples, wrong[name], alternation.ranks, bytes=4 * numel)
        for name in samples
    ]
    cells = [
        [
            each["contestant"],
            format_us(each["p50_us"] / 1e6),
            str(each["wrong"]),
            format_ratio(each.get("ratio_horovod")),
        ]
        for each in found
    ]
    title = f"allreduce_, {format_bytes(4 * numel)} of float32, {size} ranks"
    return Section(f"{title}\n{table.render(HEAD, cells)}\n", found)


def idle(alternation: Alternation) -> Section:
    """A product of matrices, in every rank, while nobody uses what is up."""
    left, right = torch.ones(384, 384), torch.ones(384, 384)
    out = torch.empty(384, 384)
    samples: Samples = {"nothing": [], **{name: [] for name in alternation.found}}

    def body(name: str, hvd: Any) -> None:
        spent_s = alternation.seconds(lambda: torch.mm(left, right, out=out))
        if name:
            samples[name].append(spent_s)

    class Nothing:
        """Nothing is up."""

        @staticmethod
        def init() -> None: ...

        shutdown = init

    alternation.found = {"nothing": Nothing, **alternation.found}
    try:
        alternation.take("an idle init()", body)
    finally:
        del alternation.found["nothing"]
    found, cells = [], []
    for name in samples:
        # Of measurements that follow each other: what else runs on the machine changes more slowly.
        pairs = zip(samples[name], samples["nothing"], strict=True)
        loss = median(with_s / without_s for with_s, without_s in pairs) - 1
        found.append(row_beside("Horovod", "idle init", name, samples, 0, alternation.ranks, loses=round(loss, 4)))
        cells.append([name, f"{median(samples[name]) * 1e3:.2f}", "" if name == "nothing" else f"{100 * loss:.1f} %"])
    title = f"a product of matrices beside an idle hvd.init(), {alternation.ranks.size} ranks"
    return Section(f"{title}\n{table.render(IDLE_HEAD, cells)}\n", found)


def small_net() -> nn.Module:
    """0.6 million parameters, the same on all ranks."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(64 * 8 * 8, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def images(alternation: Alternation, batch: int) -> Section:
    """Horovod's synthetic benchmark: random images, the same again in every step."""
    samples: Samples = {name: [] for name in alternation.found}
    wrong = dict.fromkeys(alternation.found, 0)
    generator = torch.Generator().manual_seed(alternation.ranks.rank)
    data = torch.randn(batch, *_IMAGE, generator=generator)
    labels = torch.randint(0, 10, (batch,), generator=generator)

    def body(name: str, hvd: Any) -> None:
        net = small_net()
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(net.parameters(), lr=1e-3), named_parameters=net.named_parameters()
        )
        hvd.broadcast_parameters(net.state_dict(), root_rank=0)

        def work() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data), labels).backward()
            optimizer.step()

        for _ in range(_WARM_UP):
            work()
        spent_s = alternation.seconds(work, _STEPS_S)
        digest = float(sum(p.detach().double().sum() for p in net.parameters()))
        differs = alternation.ranks.maximum([digest])[0] != -alternation.ranks.maximum([-digest])[0]
        if name:
            wrong[name] += int(differs)
            samples[name].append(spent_s)

    alternation.take("a step of a small net", body)
    found, cells = [], []
    for name in samples:
        each = row_beside("Horovod", "step", name, samples, wrong[name], alternation.ranks, images=batch)
        rate = batch * alternation.ranks.size / (each["p50_us"] / 1e6)
        each["images_per_s"] = round(rate, 1)
        found.append(each)
        cells.append([name, f"{rate:.0f}", str(each["wrong"]), format_ratio(each.get("ratio_horovod"))])
    title = f"DistributedOptimizer, a small convolutional net, {batch} images a rank, {alternation.ranks.size} ranks"
    return Section(f"{title}\n{table.render(STEP_HEAD, cells)}\n", found)


def measure(session: Session) -> Iterator[Section]:
    found, missing = importable(session.ranks)
    if missing:
        yield Section(missing)
    alternation = Alternation(session, found)
    for size_bytes in session.options.sizes:
        yield allreduce(alternation, size_bytes)
    yield idle(alternation)
    yield images(alternation, session.options.batch)


PROGRAM = RankProgram(
    "bench.hvd", __doc__, arguments, measure, connect, "one rank exchanges nothing", "numbers are wrong", AsWritten
)


def main() -> int:
    return PROGRAM.main()


if __name__ == "__main__":
    sys.exit(main())
