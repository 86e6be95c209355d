"""``mpirun -n P python -m bench.accuracy``: how far a mean over ranks on a 16-bit wire is from the mean in float64.

Ours by algorithm, beside gloo and Horovod as their own 16-bit gradient compressions call them. Rank r contributes
numbers drawn from seed r, so every rank knows all of them and adds them up in float64 by itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import commlab
from commlab.errors import UsageError
from commlab.native.dtypes import WIRES

from .contestants import commlab as ours
from .contestants import gloo
from .core import results, table
from .core.harness import Unavailable
from .core.ranks import Ranks

LARGE = 60_000.0
"""fp16 ends at 65,504: a sum of two of these does not fit, their mean does."""


class Way(NamedTuple):
    """One way to a mean: ``mean(tensor)`` returns it as fp32 and may change ``tensor``. Collective."""

    name: str
    labels: dict[str, Any]
    mean: Callable[[torch.Tensor], torch.Tensor]
    start: Callable[[], Any] = lambda: None
    stop: Callable[[], Any] = lambda: None


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m bench.accuracy", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    found.add_argument("--numel", type=int, default=1_000_003, help="numbers per rank")
    found.add_argument("--wires", nargs="+", choices=("fp16", "bf16"), default=["fp16", "bf16"])
    found.add_argument("--timeout", type=float, default=300.0, metavar="S")
    found.add_argument("--json", metavar="FILE", help="add the results to this file of JSON lines")
    return found


def contribution(rank: int, numel: int) -> torch.Tensor:
    """What a gradient looks like: both signs, sizes over some powers of ten. fp32."""
    drawn = torch.Generator().manual_seed(rank)
    return torch.randn(numel, generator=drawn) * torch.randn(numel, generator=drawn).exp()


def ways(groups: ours.Groups, wire: str) -> Iterator[Way]:
    for name in ours.NAMES:
        if name == "auto" or (name == "window" and groups.world.window is None):
            continue
        group = groups.world if name == "window" else groups.messages
        yield Way(f"commlab {name}", {"kind": "commlab", "algorithm": name}, _ours(group, name, wire))
    yield Way("gloo, as in DDP's compress hook", {"kind": "peer", "peer": "gloo"}, _gloo(wire), start=gloo.connect)
    try:
        import horovod.torch as hvd
    except ImportError:
        return
    if wire == "fp16":
        labels = {"kind": "peer", "peer": "horovod"}
        yield Way("Horovod, Compression.fp16", labels, _horovod(hvd), start=hvd.init, stop=hvd.shutdown)


def _ours(group: commlab.Group, algorithm: str, wire: str) -> Callable[[torch.Tensor], torch.Tensor]:
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
                raise Unavailable(str(error).splitlines()[0]) from error
            raise
        return sent.float()

    return mean


def _horovod(hvd: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: hvd.allreduce(tensor, op=hvd.Average, name="mean", compression=hvd.Compression.fp16)


def compared(way: Way, ranks: Ranks, wire: str, numel: int) -> dict[str, Any]:
    """The row of one way. Collective."""
    row: dict[str, Any] = {"type": "row", "contestant": way.name, "wire": wire, "numel": numel, **way.labels}
    exact = torch.stack([contribution(rank, numel).double() for rank in range(ranks.size)]).mean(0)
    dtype = WIRES[wire]
    assert dtype is not None
    reason, squares, large = "", 0.0, 0.0
    way.start()
    try:
        squares = float((way.mean(contribution(ranks.rank, numel)).double() - exact).square().sum())
        large = float(way.mean(torch.full((1000,), LARGE)).max())
    except Unavailable as unavailable:
        reason = str(unavailable)
    finally:
        way.stop()
    reason = ranks.first(reason)
    if reason:
        return {**row, "missing": reason}
    squares, large = ranks.maximum([squares, large])
    once = float((exact.float().to(dtype).double() - exact).square().sum())
    return {
        **row,
        "relative_error": (squares / float(exact.square().sum())) ** 0.5,
        "error_over_one_rounding": (squares / once) ** 0.5,
        "mean_of_60000s": large,
    }


HEAD = ("contestant", "relative error", "/ one rounding", "/ commlab direct", "mean of 60000s")


def rendered(rows: list[dict[str, Any]]) -> str:
    direct = next(row["relative_error"] for row in rows if row["contestant"] == "commlab direct")
    cells = []
    for row in rows:
        if "missing" in row:
            cells.append((f"{row['contestant']}: {row['missing']}",))
            continue
        error = row["relative_error"]
        figures = f"{error:.3g}", f"{row['error_over_one_rounding']:.2f}", f"{error / direct:.2f}"
        cells.append((row["contestant"], *figures, f"{row['mean_of_60000s']:g}"))
    return table.render(HEAD, cells)


def main() -> int:
    options = parser().parse_args()
    torch.set_num_threads(1)
    groups = ours.connect("mpi", "auto", options.timeout, 8)
    ranks = Ranks()
    if ranks.size == 1:
        raise UsageError("one rank has no mean to form: start it with mpirun -n 2, or more")
    run = results.describe(ranks, "bench.accuracy")
    failed = 0
    for at, wire in enumerate(options.wires):
        rows = [compared(way, ranks, wire, options.numel) for way in ways(groups, wire)]
        # Rounded at most once on the way in and once on each hop.
        allowed = ranks.size * torch.finfo(WIRES[wire] or torch.float32).eps
        failed += sum(row["kind"] == "commlab" and abs(row["mean_of_60000s"] / LARGE - 1) > allowed for row in rows)
        if ranks.rank == 0:
            print(f"mean of {options.numel} numbers on {ranks.size} ranks, wire {wire}\n{rendered(rows)}\n", flush=True)
            if options.json:
                results.append(options.json, [run, *rows] if at == 0 else rows)
    return ranks.end(failed, f"means of {LARGE:g}s are wrong")


if __name__ == "__main__":
    sys.exit(main())
