"""``python -m bench.pack [--device cuda]``: tensors to one 16-bit buffer with scale and finite check, and back.

commlab's fused pass against what others do: torch's own operations one after the other, a copy per tensor (Horovod's
way), and on a GPU Apex's multi_tensor_scale with flatten, where Apex is. The floor is a copy that moves as many bytes:
for n numbers of fp32 and n of fp16, one of 3 n bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from commlab.chunks import Range
from commlab.gradients import packer
from commlab.native import CudaPackPlan, PackPlan, cuda_backend

from .contestants import floor
from .core import results as records
from .core import table
from .core.harness import Block, Contestant, Result, Unavailable, measure, missing, progress_line
from .core.ranks import Ranks
from .core.stats import ratio

SCALE = 0.5
NUMELS = (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
WIRE = torch.float16


def gpt2_100m() -> list[tuple[int, ...]]:
    """Shapes of the parameters of commlab's preset gpt2-100m."""
    width = 768
    layer = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(26679, width), (1024, width), *(layer * 12), (width,), (width,)]


class Work:
    """The tensors, their flat buffer, and what must come out. ``calls``: how often the work is done in one run, before
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
            part.clone().view(shape) for part, shape in zip(self.numbers.split(numels), shapes, strict=True)
        ]
        self.targets = [torch.empty_like(tensor) for tensor in self.tensors]
        self.flat = torch.empty(self.numel, dtype=WIRE, device=device)
        stops = torch.tensor(numels).cumsum(0).tolist()
        self.ranges = [Range(stop - numel, stop) for stop, numel in zip(stops, numels, strict=True)]

    def wrong(self, got: Any) -> int:
        """How many numbers of a flat buffer, or of a list of tensors, are not what they must be."""
        if isinstance(got, torch.Tensor):
            return _different(got, self.expected, torch.int16)
        parts = [self.back[place.start : place.stop] for place in self.ranges]
        return sum(_different(tensor.view(-1), part, torch.int32) for tensor, part in zip(got, parts, strict=True))

    def contestant(self, name: str, do: Callable[[], Any], result: Any, kind: str, op: str) -> Block:
        """``result``: where ``do()`` leaves what it made, or None where it returns it."""

        def run() -> Any:
            for _ in range(self.calls):
                made = do()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            return made if result is None else result

        def fill() -> None:
            (self.flat.copy_(self.expected) if op == "unpack" else self.flat.zero_())
            for target in self.targets:
                target.zero_()

        # A floor copies other bytes than the work's.
        wrong = self.wrong if kind != "floor" else lambda _: 0
        return Block([Contestant(name, run, fill, wrong, {"kind": kind, "op": op})])


def _different(got: torch.Tensor, wanted: torch.Tensor, bits: torch.dtype) -> int:
    got, wanted = got.view(bits), wanted.view(bits)  # integers compare many times faster than 16-bit floats
    return 0 if torch.equal(got, wanted) else int((got != wanted).sum())


def _chained(work: Work) -> torch.Tensor:
    flat = torch.cat([tensor.reshape(-1) for tensor in work.tensors]).mul_(SCALE).to(WIRE)
    if work.device.type == "cpu":
        assert flat.isfinite().all()
    else:
        flat.isfinite().all()  # nobody looks at it, as nobody waits for the others' flags
    return flat


def _foreach(work: Work) -> torch.Tensor:
    scaled = torch._foreach_mul(work.tensors, SCALE)
    flat = torch.cat([tensor.reshape(-1) for tensor in scaled]).to(WIRE)
    flat.isfinite().all()
    return flat


def _per_tensor(work: Work) -> None:
    packer.pack(work.tensors, work.ranges, work.flat, SCALE)


def _back_per_tensor(work: Work) -> None:
    for target, place in zip(work.targets, work.ranges, strict=True):
        target.copy_(work.flat[place.start : place.stop].view(target.shape)).mul_(1 / SCALE)


def _copy(way: Callable[[int, int, int], None], target: torch.Tensor, source: torch.Tensor) -> None:
    way(target.data_ptr(), source.data_ptr(), source.numel())


def on_cpu(work: Work) -> list[Block]:
    packs, unpacks = PackPlan(work.tensors, WIRE), PackPlan(work.targets, WIRE)
    blocks = [
        work.contestant("commlab", lambda: packs.pack(work.flat, 0, SCALE), work.flat, "commlab", "pack"),
        work.contestant("commlab", lambda: unpacks.unpack(work.flat, 0, 1 / SCALE), work.targets, "commlab", "unpack"),
    ]
    source, target = (torch.zeros(3 * work.numel, dtype=torch.uint8) for _ in range(2))
    try:
        for name, way in floor.load().items():
            for op in ("pack", "unpack"):
                blocks.append(
                    work.contestant(f"copy, {name}", partial(_copy, way, target, source), target, "floor", op)
                )
    except Unavailable as unavailable:
        blocks.append(missing("copy", str(unavailable), kind="floor", op="pack"))
    return blocks


def on_cuda(work: Work) -> list[Block]:
    flag = torch.zeros(1, dtype=torch.int32, device=work.device)
    packs, unpacks = CudaPackPlan(work.tensors, WIRE), CudaPackPlan(work.targets, WIRE)
    source, target = (torch.zeros(3 * work.numel, dtype=torch.uint8, device=work.device) for _ in range(2))
    blocks = [
        work.contestant("commlab", lambda: packs.pack(work.flat, 0, SCALE, flag), work.flat, "commlab", "pack"),
        work.contestant("commlab", lambda: unpacks.unpack(work.flat, 0, 1 / SCALE), work.targets, "commlab", "unpack"),
        work.contestant("torch: _foreach_mul, cat, half, isfinite", lambda: _foreach(work), None, "peer", "pack"),
    ]
    blocks += [work.contestant("copy", lambda: target.copy_(source), target, "floor", op) for op in ("pack", "unpack")]
    try:
        import amp_C
        import apex_C
        from apex.multi_tensor_apply import multi_tensor_applier as apply
    except (ImportError, OSError) as error:
        return [
            *blocks,
            *(missing("Apex", f"not installed ({error})", kind="peer", op=op) for op in ("pack", "unpack")),
        ]
    halves = [torch.empty_like(tensor, dtype=WIRE) for tensor in work.tensors]

    def pack() -> torch.Tensor:
        apply(amp_C.multi_tensor_scale, flag, [work.tensors, halves], SCALE)
        flat: torch.Tensor = apex_C.flatten(halves)
        return flat

    def unpack() -> None:
        apply(amp_C.multi_tensor_scale, flag, [apex_C.unflatten(work.flat, halves), work.targets], 1 / SCALE)

    return [
        *blocks,
        work.contestant("Apex: multi_tensor_scale, flatten", pack, None, "peer", "pack"),
        work.contestant("Apex: unflatten, multi_tensor_scale", unpack, work.targets, "peer", "unpack"),
    ]


def contestants(work: Work) -> list[Block]:
    own = on_cuda(work) if work.device.type == "cuda" else on_cpu(work)
    return [
        *own,
        work.contestant("torch: cat, mul, half, isfinite", lambda: _chained(work), None, "peer", "pack"),
        work.contestant("torch: a copy per tensor", lambda: _per_tensor(work), work.flat, "peer", "pack"),
        work.contestant("torch: a copy per tensor", lambda: _back_per_tensor(work), work.targets, "peer", "unpack"),
    ]


def rows(results: Sequence[Result], work: Work) -> list[dict[str, Any]]:
    found = []
    for result in results:
        labels = result.contestant.labels
        row = {"type": "row", "work": work.name, "numel": work.numel, "tensors": work.tensor_count}
        row |= {"device": work.device.type, "contestant": result.contestant.name, **labels}
        if result.missing:
            found.append({**row, "missing": result.missing})
            continue
        p50_s = median(result.samples_s) / work.calls
        row |= {"p50_us": round(p50_s * 1e6, 3), "GBps": float(f"{6 * work.numel / p50_s / 1e9:.4g}")}
        row |= {"wrong": result.wrong, "rounds": len(result.samples_s)}
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
                row[name] = ratio(result.samples_s, best.samples_s)
        found.append(row)
    return found


HEAD = ("contestant", "us", "GB/s", "/ copy", "/ best other", "wrong")


def rendered(found: list[dict[str, Any]], op: str) -> str:
    cells = []
    for row in found:
        if row["op"] != op:
            continue
        if "missing" in row:
            cells.append((f"{row['contestant']}: {row['missing']}",))
            continue
        ratios = [f"{row[name][0]:.2f}" if name in row else "" for name in ("against_floor", "against_best_other")]
        cells.append((row["contestant"], f"{row['p50_us']:,.1f}", f"{row['GBps']:g}", *ratios, str(row["wrong"])))
    return table.render(HEAD, cells)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pack", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--numels", type=int, nargs="*", default=list(NUMELS), help="in one tensor; besides gpt2-100m's"
    )
    parser.add_argument("--no-model", action="store_true", help="without gpt2-100m")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", metavar="FILE", help="add the results to this file of JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks, device = Ranks(), torch.device(options.device)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else None
    run = records.describe(ranks, "bench.pack", gpu=hardware, cuda=cuda_backend())
    run["command"] = " ".join(run["command"].split()[3:])
    works = [] if options.no_model else [("gpt2-100m", gpt2_100m())]
    works += [(f"{numel:,} numbers", [(numel,)]) for numel in options.numels]
    wrong = 0
    for at, (name, shapes) in enumerate(works):
        work = Work(name, shapes, device)
        found = rows(measure(contestants(work), ranks, options.rounds, at, 300.0, progress_line(ranks, name)), work)
        wrong += sum(row.get("wrong", 0) for row in found)
        for op in ("pack", "unpack"):
            head = f"{op}, {name}: {work.numel:,} numbers in {work.tensor_count} tensors"
            print(f"{head}\n{rendered(found, op)}\n", flush=True)
        if options.json:
            records.append(options.json, [run, *found] if at == 0 else found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
