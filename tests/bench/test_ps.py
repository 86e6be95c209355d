"""The parameter server's benchmarks: who does what, closed forms, bytes on links, and what is made of runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from bench import straggler
from bench.contestants import parameter_server
from bench.core import results
from bench.core.mpirun import find_mpi, mpirun_environment

ROOT = Path(__file__).resolve().parents[2]
FOUR_HOSTS = [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_the_same_workers_whatever_the_number_of_servers() -> None:
    one, two, four = (parameter_server.roles(FOUR_HOSTS, servers, 4) for servers in (1, 2, 4))
    assert one.workers == two.workers == four.workers == (0, 2, 4, 6)
    assert (one.servers, two.servers, four.servers) == ((7,), (5, 7), (1, 3, 5, 7))


def test_bytes_of_the_busiest_link() -> None:
    """One server takes in what three other hosts push. Four share it: each host's worker sends three quarters to other
    hosts, and its server a quarter to each of the three."""
    assert parameter_server.roles(FOUR_HOSTS, 1, 4).link_bytes(FOUR_HOSTS, 100) == 300
    assert parameter_server.roles(FOUR_HOSTS, 2, 4).link_bytes(FOUR_HOSTS, 100) == 200
    assert parameter_server.roles(FOUR_HOSTS, 4, 4).link_bytes(FOUR_HOSTS, 100) == 150
    assert parameter_server.roles([[0, 1]], 1, 1).link_bytes([[0, 1]], 100) == 0
    assert parameter_server.Roles((0, 1), (2, 3)).link_bytes([[0], [1], [2], [3]], 100) == 100


def test_what_is_pulled_is_a_sum_in_closed_form() -> None:
    mean = sum(parameter_server.pushed(worker, 300).double() for worker in range(3)) / 3
    assert torch.equal(parameter_server.expected(5, 3, 300, None).double(), 5 * mean - 3)
    assert all(
        torch.equal(parameter_server.pushed(worker, 300).bfloat16().float(), parameter_server.pushed(worker, 300))
        for worker in range(9)
    )
    assert (
        not torch.equal(parameter_server.pushed(0, 300), parameter_server.pushed(1, 300))
        and len(parameter_server.pushed(0, 300).unique()) == 97
    )


def test_the_program(tmp_path: Path) -> None:
    mpi = find_mpi()
    command = [mpi.mpirun, "-n", "4", "python", "-m", "bench.ps", "--sizes", "4KB,300KB", "--rounds", "1"]
    command += ["--servers", "1,2", "--json", str(tmp_path / "r.jsonl")]
    environment = {**mpirun_environment(mpi), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    ((about, found),) = results.read(tmp_path / "r.jsonl")
    assert about["bench"] == "bench.ps" and [record["bytes"] for record in found[::7]] == [4000, 300_000]
    ours = {record["contestant"]: record for record in found if record["kind"] == "commlab"}
    assert {"commlab, 1 server", "commlab, 2 servers", "commlab, 2 servers, wire bf16"} < set(ours)
    assert not any(record["wrong"] for record in found) and all(record["workers"] == 2 for record in found)
    assert all(record["ratio_floor"] > 0 and len(record["ratio_messages"]) == 3 for record in ours.values())


def ended(tokens_per_s: float, bits: float) -> straggler.Ended:
    return straggler.Ended(tokens_per_s, bits, "0: 100.0%", "5 5")


def test_a_straggler_is_measured_against_bsp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round by round; and asp may cost a tenth of the loss, no more."""
    options = straggler.parser().parse_args(["--rows", "bsp,asp"])
    found = {
        "bsp": [ended(100, 3.0), ended(50, 3.0), ended(200, 3.0)],
        "asp": [ended(300, 3.2), ended(50, 3.1), ended(500, 3.4)],
    }
    bsp, asp = straggler.results(found, options)
    assert bsp["speed_of_bsp"][0] == 1 and asp["speed_of_bsp"] == [2.5, 1.0, 3.0]
    assert asp["loss_of_bsp"] == pytest.approx(3.2 / 3.0, rel=1e-3) and not asp["wrong"]
    found["asp"] = [ended(300, 3.4)] * 3
    assert straggler.results(found, options)[1]["wrong"]


def test_staleness_in_short() -> None:
    assert straggler.spread("0: 100.0%") == "median 0, most 0"
    assert straggler.spread("0: 18.0%, 1: 30.1%, 7: 50.0%, 81: 1.9%") == "median 7, most 81"


def test_only_the_slow_rank_is_slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor time of forward and backward, times the factor less one."""
    from bench.training import slowed

    naps: list[float] = []
    clock = [0.0]
    monkeypatch.setattr(slowed.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(slowed.time, "sleep", naps.append)
    monkeypatch.setattr(slowed.train, "main", lambda flags: len(flags))
    monkeypatch.setattr(slowed.sys, "argv", ["slowed", "1", "5", "--steps", "3"])
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))

    def step() -> None:
        clock[0] = 10.0
        loss = model(torch.ones(1, 3)).sum()
        clock[0] = 10.5
        loss.backward()

    assert slowed.main() == 2, "this is rank 0"
    step()
    assert not naps
    slow = slowed.SlowModel(5)
    step()
    assert naps == [2.0]
    with torch.no_grad():
        model(torch.ones(1, 3))
    slow.remove()
    step()
    assert naps == [2.0]
