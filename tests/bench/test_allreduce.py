"""bench.allreduce: the records of results, and the program as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from bench import allreduce, compare
from bench.contestants.case import Case
from bench.core import results
from bench.core.harness import Contestant, Result
from bench.core.mpirun import LauncherError, find_mpi, mpirun_environment

ROOT = Path(__file__).resolve().parents[2]


def test_records_hold_the_best_peer_and_the_check() -> None:
    def result(name: str, samples_s: list[float], **labels: Any) -> Result:
        contestant = Contestant(name, lambda: None, lambda: None, lambda _: 0, labels)
        return Result(contestant, samples_s, cpu_s=[3 * sample_s for sample_s in samples_s])

    ring = {"kind": "commlab", "algorithm": "ring", "wire": None}
    results = [
        result("slow copy", [2.0, 2.0, 2.0], kind="floor"),
        result("copy", [1.0, 2.0, 1.0], kind="floor"),
        result("ring", [4.0, 8.0, 4.4], check=True, **ring),
        result("ring, no check", [3.0, 7.0, 4.0], check=False, **ring),
        result("half ring", [4.0, 4.0, 4.0], kind="commlab", algorithm="ring", wire="fp16", check=True),
        result("peer", [8.0, 16.0, 4.0], kind="peer"),
        result("half peer", [2.0, 2.0, 2.0], kind="peer", wire="fp16"),
        result("wrong peer", [1.0, 1.0, 1.0], kind="peer"),
    ]
    results[-1].wrong = 1
    found = {
        record["contestant"]: record
        for record in allreduce.records(results, Case("allreduce", 1000, torch.float32, 0, 4))
    }
    assert found["ring"]["ratio_floor"] == [4.0, 4.0, 4.4] and found["ring"]["floor"] == "copy"
    assert found["ring"]["best_peer"] == "peer", (
        "not the one whose result is wrong, nor the one that sends half the bytes"
    )
    assert found["ring"]["ratio_best_peer"] == [0.5, 0.5, 1.1]
    assert found["half ring"]["best_peer"] == "half peer" and found["half ring"]["ratio_best_peer"][0] == 2
    assert found["ring"]["check_us"] == 1e6 and "check_us" not in found["half ring"]
    assert found["ring"]["algbw_GBps"] == pytest.approx(4000 / 4.4 / 1e9, rel=1e-3)
    assert found["ring"]["busbw_GBps"] == pytest.approx(1.5 * 4000 / 4.4 / 1e9, rel=1e-3)
    assert "busbw_GBps" not in found["copy"]
    assert found["ring"]["cpu_us"] == 3 * 4.4e6


def test_records_of_the_missing_say_why() -> None:
    gone = [
        Result(Contestant(name, lambda: None, lambda: None, lambda _: 0, {"kind": "peer"}), missing=reason)
        for name, reason in (("absent", "not installed"), ("unable", "cannot do that"))
    ]
    here = Result(Contestant("here", lambda: None, lambda: None, lambda _: 0, {"kind": "peer"}), [1.0] * 3, [2.0] * 3)
    found = allreduce.records([*gone, here], Case("allreduce", 8, torch.float32, 0, 2))
    assert [record.get("missing") for record in found] == ["not installed", "cannot do that", None]


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
    ((about, found),) = results.read(result)
    assert about["command"] == "mpirun -n 2 python -m bench.allreduce --sizes 4B,40KB --rounds 3 --timeout 60"
    assert about["versions"]["mpi"] != "none" and str(ROOT) not in json.dumps(about)
    here = [record for record in found if "missing" not in record]
    assert all(record["wrong"] == 0 and len(record["samples_us"]) == 3 and record["p50_us"] > 0 for record in here)
    assert all(record["p50_us"] == pytest.approx(median(record["samples_us"]), abs=2e-3) for record in here)
    names = {record["contestant"] for record in here if record["bytes"] == 40_000}
    assert {"commlab ring", "commlab ring, no check", "commlab direct, wire fp16", "MPI_Allreduce", "gloo"} <= names
    sent = {record["contestant"]: record["bytes_sent"] for record in here if record["bytes"] == 40_000}
    assert (sent["commlab ring"], sent["commlab ring, wire fp16"], sent["commlab tree"]) == (40_000, 20_000, 40_000)
    for record in found:
        assert "missing" not in record or record["missing"] in done.stdout
        assert record["contestant"] in done.stdout
    assert compare.main([str(result), str(result)]) == 0
    assert "0 faster, 0 slower" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [["--sizes", "4XB"], ["--peers", "nccl"], ["--rounds", "0"], ["--algorithms", "ring,star"]],
    ids=lambda each: each[0],
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        allreduce.PROGRAM.parser().parse_args(arguments)
    assert arguments[1].split(",")[-1] in capsys.readouterr().err
