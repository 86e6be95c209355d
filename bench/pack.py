"""``python -m bench.pack [--device cuda]``: tensors to one 16-bit buffer with scale and finite check, and back.

commlab's fused pass against what others do: torch's own operations one after the other, a copy per tensor (Horovod's
way), and on a GPU Apex's multi_tensor_scale with flatten, where Apex is. The floor is a copy that moves as many bytes:
for n numbers of fp32 and n of fp16, one of 3 n bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

import commlab
from commlab.chunks import Range
from commlab.gradients import packer
from commlab.native import CudaPackPlan, PackPlan, cuda_backend

from .contestants import floor
from .core import harness, table
from .core.harness import Block, Contestant, ContestantMissing, Result, missing, progress_line
from .core.program import RankProgram, Section, Session
from .core.ranks import share_cores
from .core.results import Record
from .core.stats import ratio

SCALE = 0.5
NUMELS = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
WIRE = torch.float16


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--numels", type=int, nargs="*", default=list(NUMELS), help="in one tensor; besides gpt2-100m's"
    )
    parser.add_argument("--no-model", action="store_true", help="without gpt2-100m")
    parser.add_argument("--rounds", type=int, default=11)


def connect(options: argparse.Namespace) -> commlab.Group:
    share_cores(1)
    return commlab.init()


def measure(session: Session) -> Iterator[Section]:
    """A section per list of shapes."""
    options, device = session.options, torch.device(session.options.device)
    session.run["gpu"] = torch.cuda.get_device_name() if device.type == "cuda" else None
    session.run["cuda"] = cuda_backend()
    named_shapes: list[tuple[str, list[tuple[int, ...]]]] = [] if options.no_model else [("gpt2-100m", gpt2_100m())]
    named_shapes += [(f"{numel:,} numbers", [(numel,)]) for numel in options.numels]
    for at, (name, shapes) in enumerate(named_shapes):
        data, show = TensorSet(name, shapes, device), progress_line(session.ranks, name)
        results = harness.measure(contestants(data), session.ranks, options.rounds, at, 300.0, show)
        found = records(results, data)
        size = f"{data.numel:,} numbers in {data.tensor_count} tensors"
        yield Section("\n".join(f"{op}, {name}: {size}\n{rendered(found, op)}\n" for op in ("pack", "unpack")), found)


def gpt2_100m() -> list[tuple[int, ...]]:
    """Shapes of the parameters of commlab's preset gpt2-100m."""
    width = 768
    layer = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(26679, width), (1024, width), *(layer * 12), (width,), (width,)]


class TensorSet:
    """The tensors, their flat buffer, and the right results. ``calls``: how often a contestant packs or unpacks before
    a GPU is waited for."""

    def __init__(self, name: str, shapes: Sequence[tuple[int, ...]], device: torch.device):
        self.name, self.device = name, device
        self.calls = 20 if device.type == "cuda" else 1
        numels = [torch.Size(shape).numel() for shape in shapes]
        self.numel, self.tensor_count = sum(numels), len(shapes)
        self.numbers = torch.arange(self.numel, device=device).remainder_(2039).sub_(1000).float()
        self.expected = self.numbers.mul(SCALE).to(WIRE)
        self.back = self.expected.float() / SCALE
        self.tensors = [
            numbers.clone().view(shape) for numbers, shape in zip(self.numbers.split(numels), shapes, strict=True)
        ]
        self.targets = [torch.empty_like(tensor) for tensor in self.tensors]
        self.flat = torch.empty(self.numel, dtype=WIRE, device=device)
        stops = torch.tensor(numels).cumsum(0).tolist()
        self.ranges = [Range(stop - numel, stop) for stop, numel in zip(stops, numels, strict=True)]

    def wrong(self, got: Any) -> int:
        """How many numbers of a flat buffer, or of a list of tensors, are wrong."""
        if isinstance(got, torch.Tensor):
            return _different(got, self.expected, torch.int16)
        right = [self.back[range_.start : range_.stop] for range_ in self.ranges]
        return sum(_different(tensor.view(-1), back, torch.int32) for tensor, back in zip(got, right, strict=True))

    def contestant(self, name: str, do: Callable[[], Any], result: Any, kind: str, op: str) -> Block:
        """``result``: where ``do()`` leaves its result, or None where ``do()`` returns the result."""

        def work() -> Any:
            for _ in range(self.calls):
                made = do()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return made if result is None else result

        def fill() -> None:
            self.flat.copy_(self.expected) if op == "unpack" else self.flat.zero_()
            for target in self.targets:
                target.zero_()

        # A floor copies other bytes than those of the tensors.
        wrong = self.wrong if kind != "floor" else lambda _: 0
        return Block([Contestant(name, work, fill, wrong, {"kind": kind, "op": op})])


def _different(got: torch.Tensor, wanted: torch.Tensor, bits: torch.dtype) -> int:
    got, wanted = got.view(bits), wanted.view(bits)  # integers compare many times faster than 16-bit floats
    return 0 if torch.equal(got, wanted) else int((got != wanted).sum())


def _chained(data: TensorSet) -> torch.Tensor:
    flat = torch.cat([tensor.reshape(-1) for tensor in data.tensors]).mul_(SCALE).to(WIRE)
    if data.device.type == "cpu":
        assert flat.isfinite().all()
    else:
        flat.isfinite().all()  # nobody looks at the flag, as nobody waits for the flags of the others
    return flat


def _foreach(data: TensorSet) -> torch.Tensor:
    scaled = torch._foreach_mul(data.tensors, SCALE)
    flat = torch.cat([tensor.reshape(-1) for tensor in scaled]).to(WIRE)
    flat.isfinite().all()
    return flat


def _per_tensor(data: TensorSet) -> None:
    packer.pack(data.tensors, data.ranges, data.flat, SCALE)


def _back_per_tensor(data: TensorSet) -> None:
    for target, range_ in zip(data.targets, data.ranges, strict=True):
        target.copy_(data.flat[range_.start : range_.stop].view(target.shape)).mul_(1 / SCALE)


def _copy(way: Callable[[int, int, int], None], target: torch.Tensor, source: torch.Tensor) -> None:
    way(target.data_ptr(), source.data_ptr(), source.numel())


def on_cpu(data: TensorSet) -> list[Block]:
    packs, unpacks = PackPlan(data.tensors, WIRE), PackPlan(data.targets, WIRE)
    blocks = [
        data.contestant("commlab", lambda: packs.pack(data.flat, 0, SCALE), data.flat, "commlab", "pack"),
        data.contestant("commlab", lambda: unpacks.unpack(data.flat, 0, 1 / SCALE), data.targets, "commlab", "unpack"),
    ]
    source, target = (torch.zeros(3 * data.numel, dtype=torch.uint8) for _ in range(2))
    try:
        for name, way in floor.load().items():
            for op in ("pack", "unpack"):
                blocks.append(
                    data.contestant(f"copy, {name}", partial(_copy, way, target, source), target, "floor", op)
                )
    except ContestantMissing as reason:
        blocks.append(missing("copy", str(reason), kind="floor", op="pack"))
    return blocks


def on_cuda(data: TensorSet) -> list[Block]:
    flag = torch.zeros(1, dtype=torch.int32, device=data.device)
    packs, unpacks = CudaPackPlan(data.tensors, WIRE), CudaPackPlan(data.targets, WIRE)
    source, target = (torch.zeros(3 * data.numel, dtype=torch.uint8, device=data.device) for _ in range(2))
    blocks = [
        data.contestant("commlab", lambda: packs.pack(data.flat, 0, SCALE, flag), data.flat, "commlab", "pack"),
        data.contestant("commlab", lambda: unpacks.unpack(data.flat, 0, 1 / SCALE), data.targets, "commlab", "unpack"),
        data.contestant("torch: _foreach_mul, cat, half, isfinite", lambda: _foreach(data), None, "peer", "pack"),
    ]
    blocks += [data.contestant("copy", lambda: target.copy_(source), target, "floor", op) for op in ("pack", "unpack")]
    try:
        import amp_C
        import apex_C
        from apex.multi_tensor_apply import multi_tensor_applier as apply
    except (ImportError, OSError) as error:
        return [
            *blocks,
            *(missing("Apex", f"not installed ({error})", kind="peer", op=op) for op in ("pack", "unpack")),
        ]
    halves = [torch.empty_like(tensor, dtype=WIRE) for tensor in data.tensors]

    def pack() -> torch.Tensor:
        apply(amp_C.multi_tensor_scale, flag, [data.tensors, halves], SCALE)
        flat: torch.Tensor = apex_C.flatten(halves)
        return flat

    def unpack() -> None:
        apply(amp_C.multi_tensor_scale, flag, [apex_C.unflatten(data.flat, halves), data.targets], 1 / SCALE)

    return [
        *blocks,
        data.contestant("Apex: multi_tensor_scale, flatten", pack, None, "peer", "pack"),
        data.contestant("Apex: unflatten, multi_tensor_scale", unpack, data.targets, "peer", "unpack"),
    ]


def contestants(data: TensorSet) -> list[Block]:
    own = on_cuda(data) if data.device.type == "cuda" else on_cpu(data)
    return [
        *own,
        data.contestant("torch: cat, mul, half, isfinite", lambda: _chained(data), None, "peer", "pack"),
        data.contestant("torch: a copy per tensor", lambda: _per_tensor(data), data.flat, "peer", "pack"),
        data.contestant("torch: a copy per tensor", lambda: _back_per_tensor(data), data.targets, "peer", "unpack"),
    ]


def records(results: Sequence[Result], data: TensorSet) -> list[Record]:
    """A record per contestant; ratios are of times, to the fastest floor and to the fastest peer."""
    found = []
    for result in results:
        labels = result.contestant.labels
        record: Record = {"type": "row", "work": data.name, "numel": data.numel, "tensors": data.tensor_count}
        record |= {"device": data.device.type, "contestant": result.contestant.name, **labels}
        if result.missing:
            found.append({**record, "missing": result.missing})
            continue
        p50_s = median(result.samples_s) / data.calls
        record |= {"p50_us": round(p50_s * 1e6, 3), "GBps": float(f"{6 * data.numel / p50_s / 1e9:.4g}")}
        record |= {"wrong": result.wrong, "rounds": len(result.samples_s)}
        for name, kind in (("against_floor", "floor"), ("against_best_other", "peer")):
            others = [
                each
                for each in results
                if not each.missing
                and each is not result
                and (each.contestant.labels["kind"], each.contestant.labels["op"]) == (kind, labels["op"])
            ]
            if others and labels["kind"] != "floor":
                best = min(others, key=lambda each: median(each.samples_s))
                record[name] = ratio(result.samples_s, best.samples_s)
        found.append(record)
    return found


HEAD = ("contestant", "us", "GB/s", "/ copy", "/ best other", "wrong")


def rendered(records: Sequence[Record], op: str) -> str:
    """The records of ``op`` as a table."""
    cells: list[tuple[str, ...]] = []
    for record in records:
        if record["op"] != op:
            continue
        if "missing" in record:
            cells.append((f"{record['contestant']}: {record['missing']}",))
            continue
        ratios = [
            f"{record[name][0]:.2f}" if name in record else "" for name in ("against_floor", "against_best_other")
        ]
        cells.append(
            (record["contestant"], f"{record['p50_us']:,.1f}", f"{record['GBps']:g}", *ratios, str(record["wrong"]))
        )
    return table.render(HEAD, cells)


PROGRAM = RankProgram("bench.pack", __doc__, arguments, measure, connect, formatter=argparse.HelpFormatter)


def main() -> int:
    return PROGRAM.main()


if __name__ == "__main__":
    sys.exit(main())
