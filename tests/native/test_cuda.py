"""The CUDA pack. Its kernel's code, run by the host where nvcc is but no GPU, and on the GPU where one is: against the
CPU's pack, bit for bit (any NaN equals any NaN)."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from packed import EDGES, SHAPES, same_bits
from torch import Tensor

from commlab import native
from commlab.native import CudaPackPlan, PackPlan
from commlab.native.cuda import chunk_table
from commlab.native.dtypes import DTYPES

ROOT = Path(__file__).parents[2]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
pairs = pytest.mark.parametrize(("dtype", "wire"), list(itertools.product(FLOATS, FLOATS)), ids=str)
# Besides those of the CPU's tests: one number more and less than a chunk, and several chunks.
NUMELS = [torch.Size(shape).numel() for shape in SHAPES[:-1]] + [4095, 4096, 4097, 20_001]

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and a torch built for CUDA")
needs_kernels = pytest.mark.skipif(
    not native.cuda_backend().startswith("native"), reason=f"needs the CUDA kernels: {native.cuda_backend()}"
)


def tensors_of(dtype: torch.dtype, edges: bool, shifts: tuple[int, ...] = (0,)) -> list[Tensor]:
    """One tensor per length, its numbers distinct, each so many numbers behind a border of 16 bytes."""
    generator = torch.Generator().manual_seed(9)
    tensors = []
    for numel, shift in zip(NUMELS, itertools.cycle(shifts)):
        flat = torch.randn(numel, dtype=torch.float64, generator=generator)
        if edges:
            places = torch.arange(0, numel, 5)
            flat[places] = torch.tensor(EDGES, dtype=torch.float64)[torch.arange(len(places)) % len(EDGES)]
        memory = torch.zeros(numel + 24, dtype=dtype)
        start = -(memory.data_ptr() // memory.element_size()) % (16 // memory.element_size()) + shift
        tensors.append(memory[start : start + numel].copy_(flat))
    return tensors


class Host:
    """The kernel's functions of block and thread, called for all of them in turn."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._library.chunk_numel.restype = ctypes.c_uint32
        pointer = ctypes.c_void_p
        self._library.move_all.argtypes = [pointer, pointer, pointer, ctypes.c_uint32, pointer, ctypes.c_int]
        self._library.move_all.argtypes += [ctypes.c_float, pointer, ctypes.c_bool]

    def move(self, tensors: list[Tensor], wire: Tensor, starts: list[int], scale: float, packs: bool) -> bool:
        """Whether all that was written is finite."""
        addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
        places = torch.tensor(
            [[tensor.numel(), start, DTYPES[tensor.dtype][0]] for tensor, start in zip(tensors, starts, strict=True)],
            dtype=torch.int64,
        )
        chunks = chunk_table([tensor.numel() for tensor in tensors], self._library.chunk_numel())
        flag = torch.zeros(1, dtype=torch.int32)
        code = DTYPES[wire.dtype][0]
        table = addresses.data_ptr(), places.data_ptr(), chunks.data_ptr(), len(chunks)
        self._library.move_all(*table, wire.data_ptr(), code, scale, flag.data_ptr(), packs)
        return not flag.item()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if nvcc is None:
        pytest.skip("needs nvcc")
    library = tmp_path_factory.mktemp("cuda") / "on_host.so"
    warnings = ["-Werror", "all-warnings", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Wno-unknown-pragmas,-Werror"]
    command = [nvcc, "-std=c++17", "-O1", "-arch=sm_90", *warnings, f"-I{ROOT / 'kernels'}", "-shared", "-o", library]
    done = subprocess.run(
        [*command, ROOT / "tests/helpers/cuda_on_host.cu"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return Host(library)


def starts_of(tensors: list[Tensor], gaps: tuple[int, ...]) -> tuple[list[int], int]:
    """Where tensors begin on the wire with these gaps in between, and where the last ends."""
    starts, at = [], 0
    for tensor, gap in zip(tensors, itertools.cycle(gaps)):
        starts.append(at + gap)
        at = starts[-1] + tensor.numel()
    return starts, at


LAYOUTS = [((0,), (0,)), ((0, 1, 3, 5), (0,)), ((0,), (1, 0, 2, 7)), ((2, 7, 1), (3, 8, 0, 1, 4))]


@pairs
@pytest.mark.parametrize(("shifts", "gaps"), LAYOUTS, ids=["adjoining", "shifted", "with gaps", "both"])
def test_the_kernels_code(
    host: Host, dtype: torch.dtype, wire: torch.dtype, shifts: tuple[int, ...], gaps: tuple[int, ...]
) -> None:
    for edges, scale in ((False, 1 / 3), (True, 1024.0)):
        tensors = tensors_of(dtype, edges, shifts)
        starts, end = starts_of(tensors, gaps)
        want, got = (torch.full((end + 9,), 42.0, dtype=wire) for _ in range(2))
        finite = PackPlan(tensors, wire, starts).pack(want, 0, scale)
        assert host.move(tensors, got, starts, scale, packs=True) is finite
        assert same_bits(got, want)

        back, wanted = ([torch.full_like(tensor, 42.0) for tensor in tensors] for _ in range(2))
        PackPlan(wanted, wire, starts).unpack(want, 0, 1 / scale)
        host.move(back, want, starts, 1 / scale, packs=False)
        assert all(same_bits(mine, theirs) for mine, theirs in zip(back, wanted, strict=True))


@pytest.mark.parametrize("wire", FLOATS, ids=str)
def test_the_kernels_code_sees_one_bad_number(host: Host, wire: torch.dtype) -> None:
    """Wherever it lies; and what overflows on the wire, only there, exactly from the tie on."""
    for numel in (1, 9, 4101):
        for shift in (0, 1):
            tensor, part = torch.ones(numel + 1)[shift : shift + numel], torch.empty(numel, dtype=wire)
            assert host.move([tensor], part, [0], 1.0, packs=True)
            for place in {0, numel // 2, numel - 1}:
                for bad in (torch.inf, -torch.inf, torch.nan):
                    tensor[place] = bad
                    assert not host.move([tensor], part, [0], 1.0, packs=True), f"{bad} at {place} went unseen"
                tensor[place] = 1.0
    largest = torch.tensor([torch.finfo(wire).max], dtype=torch.float64)
    for factor in torch.arange(0.99, 1.01, 2.0**-13, dtype=torch.float64):
        tensor, part = (largest * factor).float(), torch.empty(1, dtype=wire)
        assert host.move([tensor], part, [0], 1.0, packs=True) is bool(part.isfinite().all())
        assert same_bits(part, tensor.to(wire))


def test_every_16_bit_pattern_goes_through_the_kernels_code(host: Host) -> None:
    for wire in FLOATS[1:]:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(wire)
        part, back = torch.empty_like(every), torch.empty(2**16)
        host.move([every.float()], part, [0], 1.0, packs=True)
        host.move([back], part, [0], 1.0, packs=False)
        assert same_bits(part, every) and same_bits(back, every.float())


def test_chunk_table() -> None:
    assert chunk_table([5, 0, 4, 9], 4).tolist() == [[0, 0], [0, 1], [2, 0], [3, 0], [3, 1], [3, 2]]
    assert chunk_table([0, 0], 4).shape == (0, 2) and chunk_table([], 4).shape == (0, 2)
    table = chunk_table([1] * 100_000 + [4 * 70_000], 4)
    assert len(table) == 170_000 and table[-1].tolist() == [100_000, 69_999]


def test_the_module_tells_what_packs_on_gpus() -> None:
    assert native.cuda_backend().startswith(("native: nvcc", "torch: "))
    if native.cuda_backend().startswith("native"):
        for architecture in ("sm_75", "80", "90"):
            assert architecture in native.cuda_backend()


# On a GPU.

gpu = [needs_gpu, needs_kernels]


def bound(tensors: list[Tensor], shifts: tuple[int, ...] = (0,)) -> list[Tensor]:
    """The same numbers on the GPU, each tensor so many numbers behind a border of 16 bytes."""
    moved = []
    for tensor, shift in zip(tensors, itertools.cycle(shifts)):
        memory = torch.zeros(tensor.numel() + shift, dtype=tensor.dtype, device="cuda")
        moved.append(memory[shift:].copy_(tensor))
    return moved


def flag() -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device="cuda")


class TestOnGpu:
    pytestmark = gpu

    @pairs
    @pytest.mark.parametrize(("shifts", "gaps"), LAYOUTS, ids=["adjoining", "shifted", "with gaps", "both"])
    def test_equals_the_cpu(
        self, dtype: torch.dtype, wire: torch.dtype, shifts: tuple[int, ...], gaps: tuple[int, ...]
    ) -> None:
        for edges, scale in ((False, 1 / 3), (True, 1024.0)):
            tensors = tensors_of(dtype, edges)
            starts, end = starts_of(tensors, gaps)
            want = torch.full((end + 9,), 42.0, dtype=wire)
            part, seen = want.cuda(), flag()
            finite = PackPlan(tensors, wire, starts).pack(want, 0, scale)
            CudaPackPlan(bound(tensors, shifts), wire, starts).pack(part, 0, scale, seen)
            assert same_bits(part.cpu(), want)
            assert bool(seen.item()) is not finite

            back, wanted = bound(tensors, shifts), [torch.full_like(tensor, 42.0) for tensor in tensors]
            PackPlan(wanted, wire, starts).unpack(want, 0, 1 / scale)
            CudaPackPlan(back, wire, starts).unpack(part, 0, 1 / scale)
            assert all(same_bits(mine.cpu(), theirs) for mine, theirs in zip(back, wanted, strict=True))

    @pytest.mark.parametrize("count", [1, 20_000])
    def test_any_number_of_tensors_in_one_launch(self, count: int) -> None:
        mixed = [torch.full((1 + index % 37,), float(index % 2000), device="cuda") for index in range(count)]
        mixed = [tensor.to(FLOATS[index % 2]) for index, tensor in enumerate(mixed)]
        part = torch.empty(sum(tensor.numel() for tensor in mixed), dtype=torch.float16, device="cuda")
        plan = CudaPackPlan(mixed, torch.float16)
        plan.pack(part)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the profiler's, about itself
            with torch.profiler.profile(activities=activities) as profile:
                plan.pack(part)
                torch.cuda.synchronize()
        kernels = [event for event in profile.events() if "move_chunks" in event.name]
        assert len(kernels) == 1
        assert torch.equal(part.cpu(), torch.cat([tensor.cpu().half() for tensor in mixed]))

    def test_nothing_is_allocated_and_nobody_waits(self) -> None:
        tensors = bound(tensors_of(torch.float32, edges=False))
        plan = CudaPackPlan(tensors, torch.float16)
        part, seen = torch.empty(plan.end, dtype=torch.float16, device="cuda"), flag()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan.pack(part, 0, 0.5, seen)
            plan.unpack(part, 0, 2.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before

    def test_on_the_callers_stream(self) -> None:
        """The pack comes after a long wait on its stream, so it sees what is written there after the call began."""
        source = torch.zeros(100_000, device="cuda")
        plan = CudaPackPlan([source], torch.float16)
        part = torch.empty(100_000, dtype=torch.float16, device="cuda")
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            source.fill_(3.0)
            plan.pack(part)
        assert not stream.query()
        stream.synchronize()
        assert bool((part == 3.0).all())

    def test_in_a_graph(self) -> None:
        """Replays see other numbers, and another scale where that lies on the device."""
        tensors = bound(tensors_of(torch.float32, edges=False))
        plan = CudaPackPlan(tensors, torch.float16)
        part, seen = torch.zeros(plan.end, dtype=torch.float16, device="cuda"), flag()
        scale = torch.ones(1, device="cuda")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan.pack(part, 0, scale, seen)
        assert not part.any(), "capturing runs nothing"
        for factor in (1.0, 0.25):
            scale.fill_(factor)
            for tensor in tensors:
                tensor.mul_(2.0)
            graph.replay()
            assert same_bits(part.cpu(), torch.cat([(tensor.cpu() * factor).half() for tensor in tensors]))
            assert not seen.item()
        tensors[-1][7] = torch.inf
        graph.replay()
        assert seen.item() == 1
        moved = [tensor.clone() for tensor in tensors]
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            plan.pack(part)
            with pytest.raises(RuntimeError, match="moved while a CUDA graph"):
                plan.rebind(moved)

    def test_tensors_that_moved_are_followed(self) -> None:
        plan = CudaPackPlan([torch.ones(10, device="cuda")], torch.float32)
        part = torch.zeros(10, device="cuda")
        for number in (2.0, 3.0, 4.0):
            plan.rebind([torch.full((10,), number, device="cuda")])
            plan.pack(part)
            plan.release()
            assert part.tolist() == [number] * 10
        with pytest.raises(ValueError, match="released"):
            plan.pack(part)

    def test_misuse_is_refused(self) -> None:
        fp32 = torch.ones(8, device="cuda")
        with pytest.raises(TypeError, match=r"tensor 1 is torch.float64"):
            CudaPackPlan([fp32, fp32.double()], torch.float32)
        with pytest.raises(ValueError, match="contiguous"):
            CudaPackPlan([fp32.view(2, 4).t()], torch.float32)
        with pytest.raises(ValueError, match="on cpu"):
            CudaPackPlan([fp32, fp32.cpu()], torch.float32)
        plan = CudaPackPlan([fp32], torch.float16)
        with pytest.raises(TypeError, match=r"wire of torch.float16, given one of torch.float32"):
            plan.pack(torch.empty(8, device="cuda"))
        with pytest.raises(ValueError, match=r"\[1:9\] reaches outside its wire of 8 numbers"):
            plan.pack(torch.empty(8, dtype=torch.float16, device="cuda"), 1)
        with pytest.raises(TypeError, match="not_finite is int32"):
            plan.pack(torch.empty(8, dtype=torch.float16, device="cuda"), 0, 1.0, torch.zeros(1, device="cuda"))
