"""The bench core: figures, data and their closed forms, the floor, and the program as a user starts it."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import allreduce, compare
from bench.contestants import floor
from bench.contestants.case import DTYPES, EXACT_UP_TO, OPS, Case
from bench.core import results as records
from bench.core.harness import Unavailable, measure
from bench.core.mpirun import LauncherError, find_mpi, mpirun_environment
from bench.core.ranks import Ranks
from bench.core.stats import bus_factor, format_bytes, parse_bytes, percentile, ratio
from commlab.chunks import split
from commlab.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


def test_sizes() -> None:
    texts = {"4B": 4, "4": 4, "64KiB": 65536, "64k": 64000, "1MB": 10**6, "0.5 GB": 5 * 10**8, "100 MB": 10**8}
    assert {text: parse_bytes(text) for text in texts} == texts
    for text in ("", "MB", "1XB", "-4B", "1e3B", "4 B B"):
        with pytest.raises(ValueError, match="no size"):
            parse_bytes(text)


@given(st.integers(1, 10**12))
def test_exact_sizes_come_back(count: int) -> None:
    text = format_bytes(count)
    assert parse_bytes(text) == count or text == f"{count / 1e6:.3f}MB"


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert bus_factor("allreduce", 8) == 2 * 7 / 8
    assert bus_factor("reduce_scatter", 8) == bus_factor("allgather", 8) == 7 / 8
    assert bus_factor("broadcast", 8) == 1
    assert percentile([3.0, 1.0, 2.0], 50) == 2 and percentile([3.0, 1.0, 2.0], 99) == 3


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=40))
def test_the_range_of_a_ratio_holds_its_median(samples: list[float]) -> None:
    found = ratio(samples, [1.0] * len(samples))
    assert found.low <= found.median <= found.high
    assert len(samples) > 5 or (found.low, found.high) == (min(samples), max(samples))


@pytest.mark.parametrize("rounds", [6, 7, 9, 11, 21, 40])
def test_the_range_holds_the_true_median_as_often_as_it_says(rounds: int) -> None:
    """Against the binomial distribution, and on lopsided noise with a common factor per round, which must cancel."""
    draw = random.Random(rounds)
    held, trials = 0, 2000
    for _ in range(trials):
        weather = [math.exp(draw.gauss(0, 2)) for _ in range(rounds)]
        noise = [draw.expovariate(math.log(2)) for _ in range(rounds)]  # its median is 1
        found = ratio([each * rain for each, rain in zip(noise, weather, strict=True)], weather)
        held += found.low <= 1 <= found.high
    # 95 %, less four standard deviations of 2000 trials.
    assert held / trials >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / trials)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_data_and_closed_form(op: str, dtype: str, size: int) -> None:
    cases = [Case(op, 1003, DTYPES[dtype], rank, size, EXACT_UP_TO.get(dtype, 2**11)) for rank in range(size)]
    numel = cases[0].bytes // DTYPES[dtype].itemsize
    whole = torch.stack([case.source.double() for case in cases])
    total = whole.sum(0)
    assert float(total.max()) <= EXACT_UP_TO.get(dtype, 2**11)
    for rank, (case, own) in enumerate(zip(cases, split(numel, size), strict=True)):
        if op == "allreduce":
            result = total
        elif op == "reduce_scatter":
            result = total[own.start : own.stop]
        elif op == "allgather":
            result = torch.cat([whole[peer][part.start : part.stop] for peer, part in enumerate(split(numel, size))])
        else:
            result = whole[0]
        case.fill()
        assert case.wrong(result.to(case.dtype)) == 0
        assert case.wrong(result[1:].to(case.dtype)) == case.expected.numel()
        before = case.part if op == "reduce_scatter" else case.whole
        assert case.wrong(before) > 0 or size == 1 or (op, rank) == ("broadcast", 0)
        if op != "broadcast" and rank:
            assert (whole[rank] != whole[rank - 1]).all(), "differs per rank at every index"


def test_data_shows_what_goes_wrong() -> None:
    """Chunks swapped, shifted, added twice or not at all: each is seen at most of the indices that it touches."""
    cases = [Case("allreduce", 4000, torch.float32, rank, 4) for rank in range(4)]
    right = cases[0].expected
    first, second = right[:1000], right[1000:2000]
    assert cases[0].wrong(torch.cat([second, first, right[2000:]])) > 1900
    assert cases[0].wrong(right.roll(1)) > 3900
    for case in cases:
        assert case.wrong(right + case.source) > 3900 and case.wrong(right - case.source) > 3900
    assert cases[0].wrong(cases[0].whole) == 4000


def test_too_many_ranks_for_sixteen_bits() -> None:
    assert Case("allreduce", 5, torch.bfloat16, 22, 23, EXACT_UP_TO["bfloat16"]).expected.max() <= 256
    with pytest.raises(UsageError, match="24 ranks are too many"):
        Case("allreduce", 5, torch.bfloat16, 0, 24, EXACT_UP_TO["bfloat16"])


def test_floor_copies() -> None:
    """Any size, from and to odd places, and not a byte beyond."""
    try:
        ways = floor.load()
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))
    source = torch.randint(0, 256, (5000,), dtype=torch.uint8)
    for way in ways.values():
        for numel, start, shift in ((0, 0, 0), (1, 3, 5), (63, 1, 0), (64, 0, 1), (65, 7, 9), (4801, 17, 33)):
            target = torch.zeros(5000, dtype=torch.uint8)
            way(target.data_ptr() + start, source.data_ptr() + shift, numel)
            assert torch.equal(target[start : start + numel], source[shift : shift + numel])
            assert not target[:start].any() and not target[start + numel :].any()


def test_floor_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    results = measure(floor.blocks(Case("allreduce", 8, torch.float32, 0, 1)), Ranks(), 1)
    assert "floor.cpp failed" in results[0].missing
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="install g"):
        floor.build()


def mpirun() -> list[str]:
    try:
        mpi = find_mpi()
    except LauncherError as error:
        pytest.skip(str(error))
    return [mpi.mpirun, "-n", "2", sys.executable, "-m", "bench.allreduce"]


def test_two_ranks_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The program as a user starts it: every contestant right, every column there, and comparable with itself."""
    result = tmp_path / "deep" / "r.jsonl"
    arguments = ["--sizes", "4B,40KB", "--rounds", "3", "--timeout", "60", "--json", str(result)]
    done = subprocess.run(
        [*mpirun(), *arguments],
        cwd=ROOT,
        env=mpirun_environment(find_mpi()),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ((run, found),) = records.read(result)
    assert run["command"] == "mpirun -n 2 python -m bench.allreduce --sizes 4B,40KB --rounds 3 --timeout 60"
    assert run["versions"]["mpi"] != "none" and str(ROOT) not in json.dumps(run)
    here = [row for row in found if "missing" not in row]
    assert all(row["wrong"] == 0 and len(row["samples_us"]) == 3 and row["p50_us"] > 0 for row in here)
    assert all(row["p50_us"] == pytest.approx(median(row["samples_us"]), abs=2e-3) for row in here)
    names = {row["contestant"] for row in here if row["bytes"] == 40_000}
    assert {"commlab ring", "commlab ring, no check", "commlab direct, wire fp16", "MPI_Allreduce", "gloo"} <= names
    sent = {row["contestant"]: row["bytes_sent"] for row in here if row["bytes"] == 40_000}
    assert (sent["commlab ring"], sent["commlab ring, wire fp16"], sent["commlab tree"]) == (40_000, 20_000, 40_000)
    for row in found:
        assert "missing" not in row or row["missing"] in done.stdout
        assert row["contestant"] in done.stdout
    assert compare.main([str(result), str(result)]) == 0
    assert "0 faster, 0 slower" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--sizes", "4XB"], ["--peers", "nccl"], ["--rounds", "0"], ["--algorithms", "ring,star"]],
    ids=lambda each: each[0],
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        allreduce.parser().parse_args(arguments)
    assert arguments[1].split(",")[-1] in capsys.readouterr().err
