"""The native loops against plain torch, bit for bit (any NaN equals any NaN), on every instruction set there is."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from bits import BUILT, assert_same_bits, needs_native, numbers
from torch import Tensor

from commlab import native
from commlab.native import library

OPS = ["sum", "prod", "min", "max"]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int32, torch.int64]
SIZES = [0, 1, 2, 5, 31, 64, 1000, 100_003]
STARTS = [(0, 0), (1, 3), (7, 0)]  # of dst and src: from aligned memory and from odd places


def on_both(backend: str, dst: Tensor, call) -> tuple[Tensor, Tensor]:
    """What `call(dst)` leaves in dst: (natively, with torch)."""
    results = []
    for name in (backend, "torch"):
        copy = dst.clone()
        with native.using(name):
            call(copy)
        results.append(copy)
    return results[0], results[1]


@needs_native
@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_reduce(backend: str, dtype: torch.dtype, op: str) -> None:
    for numel, (dst_start, src_start) in itertools.product(SIZES, STARTS):
        dst, src = numbers(numel + 9, dtype, 1), numbers(numel + 9, dtype, 2)
        got, want = on_both(backend, dst, lambda d: native.reduce(d, dst_start, src, src_start, numel, op))  # noqa: B023
        assert_same_bits(got, want, zeros_equal=op in ("min", "max"))


@needs_native
@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_accumulate(backend: str, dtype: torch.dtype, op: str) -> None:
    for numel, (dst_start, src_start) in itertools.product(SIZES, STARTS):
        dst, src = numbers(numel + 9, torch.float32, 1), numbers(numel + 9, dtype, 2)
        got, want = on_both(backend, dst, lambda d: native.accumulate(d, dst_start, src, src_start, numel, op))  # noqa: B023
        assert_same_bits(got, want, zeros_equal=op in ("min", "max"))


@needs_native
@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_reduce_rows(backend: str, dtype: torch.dtype, op: str) -> None:
    divisors = (1, 3, 4) if op == "sum" and dtype.is_floating_point else (1,)
    for numel, (dst_start, ranks), divisor in itertools.product(SIZES, ((0, 1), (3, 5)), divisors):
        rows = numbers(ranks * (numel + 3), dtype, 2).view(ranks, numel + 3)
        got, want = on_both(
            backend,
            numbers(numel + 9, dtype, 1),
            lambda d: native.reduce_rows(d, dst_start, rows.clone(), numel, op, divisor),  # noqa: B023
        )
        assert_same_bits(got, want, zeros_equal=op in ("min", "max"))


@needs_native
@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_16bit_pattern_survives_the_trip_through_fp32(backend: str, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    got, want = on_both(backend, torch.empty(2**16), lambda d: native.widen(d, 0, every, 0, 2**16))
    assert_same_bits(got, want)
    with native.using(backend):
        back = torch.empty_like(every)
        native.narrow(back, 0, got, 0, 2**16)
    assert_same_bits(back, every)


@needs_native
@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_narrow_rounds_to_nearest_even_around_every_tie(backend: str, dtype: torch.dtype) -> None:
    """Every 16-bit number, every midpoint to its neighbour, and the fp32 numbers just beside both."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()].sort().values
    midpoints = (every[1:].double() + every[:-1].double()).mul(0.5).float()
    limit = torch.tensor([65519.996, 65520.0, 65536.0, 3.4e38, 2.0**-25, 2.0**-24, 1e-40, float("inf"), float("nan")])
    exact = torch.cat([every, midpoints, limit, -limit])
    inf = torch.tensor(float("inf"))
    src = torch.cat([exact, exact.nextafter(inf), exact.nextafter(-inf)])
    for divisor in (1.0, 3.0, 4.0, 7.0):
        got, want = on_both(
            backend,
            torch.empty(len(src), dtype=dtype),
            lambda d: native.narrow(d, 0, src, 0, len(src), divisor),  # noqa: B023
        )
        assert_same_bits(got, want)


@needs_native
@pytest.mark.parametrize("backend", BUILT)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scale_and_divide(backend: str, dtype: torch.dtype) -> None:
    for numel, start, factor in itertools.product(SIZES, (0, 3), (3.0, 1.0 / 3.0, 0.5, 1e-3)):
        dst = numbers(numel + 5, dtype, 3)
        got, want = on_both(backend, dst, lambda d: native.scale(d, start, numel, factor))  # noqa: B023
        assert_same_bits(got, want)
        got, want = on_both(backend, dst, lambda d: native.divide(d, start, numel, factor))  # noqa: B023
        assert_same_bits(got, want)


@pytest.mark.parametrize("backend", native.backends())
def test_a_mean_over_ranks_is_x_divided_by_ranks(backend: str) -> None:
    x = numbers(10_000, torch.float32, 5)
    for ranks in range(1, 18):
        with native.using(backend):
            mean = x.clone()
            native.divide(mean, 0, len(mean), ranks)
        assert_same_bits(mean, x / ranks)


@needs_native
@pytest.mark.parametrize("backend", BUILT)
def test_integers_wrap(backend: str) -> None:
    for dtype in (torch.int32, torch.int64):
        limits = torch.iinfo(dtype)
        dst = torch.full((9,), limits.max, dtype=dtype)
        with native.using(backend):
            native.reduce(dst, 0, torch.ones(9, dtype=dtype), 0, 9, "sum")
        assert dst.tolist() == [limits.min] * 9


def test_misuse_is_refused_before_memory_is_touched() -> None:
    fp32, fp16, int32 = torch.ones(8), torch.ones(8, dtype=torch.float16), torch.ones(8, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"dst is torch.float32, src is torch.float16"):
        native.reduce(fp32, 0, fp16, 0, 8, "sum")
    with pytest.raises(TypeError, match="bool"):
        native.reduce(fp32.bool(), 0, fp32.bool(), 0, 8, "sum")
    with pytest.raises(TypeError, match="int32"):
        native.divide(int32, 0, 8, 2)
    with pytest.raises(TypeError, match="src in fp16 or bf16"):
        native.accumulate(fp32, 0, fp32, 0, 8, "sum")
    with pytest.raises(ValueError, match=r"reduce src\[1:9\] reaches outside its tensor of 8 numbers"):
        native.reduce(fp32, 0, fp32, 1, 8, "sum")
    for start, numel in [(-1, 2), (2, -1), (9, 0)]:
        with pytest.raises(ValueError, match="reaches outside"):
            native.scale(fp32, start, numel, 2.0)
    with pytest.raises(ValueError, match="contiguous"):
        native.scale(torch.ones(8, 8).T, 0, 8, 2.0)
    for backend in native.backends():
        with native.using(backend), pytest.raises(ValueError, match="op 'avg' does not exist; there are sum, prod"):
            native.reduce(fp32, 0, fp32, 0, 8, "avg")
    assert fp32.tolist() == [1.0] * 8


def test_backend_is_reported_and_restored() -> None:
    before = native.backend()
    for name in native.backends():
        with native.using(name):
            expected = "torch: " if name == "torch" else f"native: {name}"
            assert native.backend().startswith(expected)
    assert native.backend() == before
    with pytest.raises(ValueError, match="'mmx'"), native.using("mmx"):
        pass


def test_a_missing_module_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "commlab._native", None)
    monkeypatch.setitem(sys.modules, "commlab._native_missing", None)
    built, reason = library._load()
    assert built is None and "cannot be imported" in reason
    note = types.ModuleType("commlab._native_missing")
    vars(note)["REASON"] = "no compiler, says CMake"
    monkeypatch.setitem(sys.modules, "commlab._native_missing", note)
    assert library._load() == (None, "the native module was not built: no compiler, says CMake")


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_the_build_succeeds_without_a_compiler(tmp_path: Path) -> None:
    """pip runs these two steps; what they install must be the reason and nothing else."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"CXX": str(tmp_path / "no-such-compiler")}
    configure = ["cmake", "-S", str(root), "-B", str(tmp_path / "build")]
    done = subprocess.run(configure, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "no working C++ compiler was found" in done.stderr
    install = ["cmake", "--install", str(tmp_path / "build"), "--prefix", str(tmp_path / "installed")]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    installed = [path for path in (tmp_path / "installed").rglob("*") if path.is_file()]
    assert [path.name for path in installed] == ["_native_missing.py"]
    assert installed[0].read_text() == 'REASON = "no working C++ compiler was found"\n'


@needs_native
def test_other_threads_run_during_a_long_reduce() -> None:
    """Another thread must count on while this one sits in a single native call."""
    dst, src = torch.ones(8_000_000, dtype=torch.float64), torch.ones(8_000_000, dtype=torch.float64)
    counted = [0]
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)  # hands the GIL back, which nobody will ask for below

    counter = threading.Thread(target=count)
    # From here on no thread is ever asked to give up the GIL: between the two readings of the counter it can
    # only have moved if the native call itself let go.
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        counter.start()
        progress = []
        for _ in range(20):
            before = counted[0]
            native.reduce(dst, 0, src, 0, len(dst), "sum")
            progress.append(counted[0] - before)
    finally:
        stop.set()
        counter.join()
        sys.setswitchinterval(interval_s)
    assert any(progress)
