"""``mpirun -n P python -m bench.accuracy``: how far a mean over ranks on a 16-bit wire is from the mean in float64.

Ours by algorithm, beside gloo and Horovod as their own 16-bit gradient compressions call them. Rank r contributes
numbers drawn from seed r, so every rank knows all of them and adds them up in float64 by itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

import commlab
from commlab.native.dtypes import WIRES

from .contestants import gloo
from .contestants.commlab import NAMES, Groups, groups_of
from .core import table
from .core.harness import ContestantMissing
from .core.program import RankProgram, Section, Session
from .core.ranks import Ranks, share_cores
from .core.results import Record

LARGE = 60_000.0
"""fp16 ends at 65,504: a sum of two of these does not fit, their mean does."""


class Way(NamedTuple):
    """One way to a mean: ``mean(tensor)`` returns it as fp32 and may change ``tensor``. Collective."""

    name: str
    labels: dict[str, Any]
    mean: Callable[[torch.Tensor], torch.Tensor]
    start: Callable[[], Any] = lambda: None
    stop: Callable[[], Any] = lambda: None


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--numel", type=int, default=1_000_003, help="numbers per rank")
    parser.add_argument("--wires", nargs="+", choices=("fp16", "bf16"), default=["fp16", "bf16"])
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S")


def connect(options: argparse.Namespace) -> commlab.Group:
    share_cores(1)
    return commlab.init(timeout_s=options.timeout)


def measure(session: Session) -> Iterator[Section]:
    """A section per wire."""
    options, ranks = session.options, session.ranks
    groups = groups_of(session.group, largest_bytes=8)
    for wire in options.wires:
        records = [compared(way, ranks, wire, options.numel) for way in ways(groups, wire)]
        # Rounded at most once on the way in and once on each hop.
        allowed = ranks.size * torch.finfo(WIRES[wire] or torch.float32).eps
        own = [record for record in records if record["kind"] == "commlab"]
        failed = sum(abs(record["mean_of_60000s"] / LARGE - 1) > allowed for record in own)
        title = f"mean of {options.numel} numbers on {ranks.size} ranks, wire {wire}"
        yield Section(f"{title}\n{rendered(records)}\n", records, failed)


def contribution(rank: int, numel: int) -> torch.Tensor:
    """Numbers like those of a gradient: both signs, sizes over some powers of ten. fp32."""
    drawn = torch.Generator().manual_seed(rank)
    return torch.randn(numel, generator=drawn) * torch.randn(numel, generator=drawn).exp()


def ways(groups: Groups, wire: str) -> Iterator[Way]:
    for name in NAMES:
        if name == "auto" or (name == "window" and groups.world.window is None):
            continue
        group = groups.world if name == "window" else groups.messages
        yield Way(f"commlab {name}", {"kind": "commlab", "algorithm": name}, _commlab(group, name, wire))
    yield Way("gloo, as in DDP's compress hook", {"kind": "peer", "peer": "gloo"}, _gloo(wire), start=gloo.connect)
    try:
        import horovod.torch as hvd
    except ImportError:
        return
    if wire == "fp16":
        labels = {"kind": "peer", "peer": "horovod"}
        yield Way("Horovod, Compression.fp16", labels, _horovod(hvd), start=hvd.init, stop=hvd.shutdown)


def _commlab(group: commlab.Group, algorithm: str, wire: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: commlab.allreduce(tensor, "mean", algorithm=algorithm, wire=wire, group=group)


def _gloo(wire: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """torch.distributed.algorithms.ddp_comm_hooks.default_hooks: cast, divide, add up, cast back."""

    def mean(tensor: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        sent = tensor.to(WIRES[wire]).div_(dist.get_world_size())
        try:
            dist.all_reduce(sent)
        except RuntimeError as error:
            if "support" in str(error) or "Invalid scalar type" in str(error):
                raise ContestantMissing(str(error).splitlines()[0]) from error
            raise
        return sent.float()

    return mean


def _horovod(hvd: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: hvd.allreduce(tensor, op=hvd.Average, name="mean", compression=hvd.Compression.fp16)


def compared(way: Way, ranks: Ranks, wire: str, numel: int) -> Record:
    """The record of one way. Collective."""
    record: Record = {"type": "row", "contestant": way.name, "wire": wire, "numel": numel, **way.labels}
    exact = torch.stack([contribution(rank, numel).double() for rank in range(ranks.size)]).mean(0)
    dtype = WIRES[wire]
    assert dtype is not None
    reason, squares, large = "", 0.0, 0.0
    way.start()
    try:
        squares = float((way.mean(contribution(ranks.rank, numel)).double() - exact).square().sum())
        large = float(way.mean(torch.full((1000,), LARGE)).max())
    except ContestantMissing as missing:
        reason = str(missing)
    finally:
        way.stop()
    reason = ranks.first(reason)
    if reason:
        return {**record, "missing": reason}
    squares, large = ranks.maximum([squares, large])
    once = float((exact.float().to(dtype).double() - exact).square().sum())
    return {
        **record,
        "relative_error": (squares / float(exact.square().sum())) ** 0.5,
        "error_over_one_rounding": (squares / once) ** 0.5,
        "mean_of_60000s": large,
    }


HEAD = ("contestant", "relative error", "/ one rounding", "/ commlab direct", "mean of 60000s")


def rendered(records: Sequence[Record]) -> str:
    direct = next(record["relative_error"] for record in records if record["contestant"] == "commlab direct")
    cells: list[tuple[str, ...]] = []
    for record in records:
        if "missing" in record:
            cells.append((f"{record['contestant']}: {record['missing']}",))
            continue
        error = record["relative_error"]
        ratios = f"{error:.3g}", f"{record['error_over_one_rounding']:.2f}", f"{error / direct:.2f}"
        cells.append((record["contestant"], *ratios, f"{record['mean_of_60000s']:g}"))
    return table.render(HEAD, cells)


PROGRAM = RankProgram(
    "bench.accuracy",
    __doc__,
    arguments,
    measure,
    connect,
    alone="one rank has no mean to form",
    failure=f"means of {LARGE:g}s are wrong",
)


def main() -> int:
    return PROGRAM.main()


if __name__ == "__main__":
    sys.exit(main())
