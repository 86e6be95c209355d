"""bench.overlap: the records of its samples, and the program as it is started."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bench import overlap
from bench.core import results
from bench.core.mpirun import find_mpi, mpirun_environment

ROOT = Path(__file__).resolve().parents[2]


def test_exposed_is_seen_round_by_round_and_hidden_is_its_ratio() -> None:
    """The second round was slow throughout. 200 bytes on a link of 100 bytes/s."""
    step: Any = SimpleNamespace(bytes_sent=200, late_bytes=50, wrong=3)
    computing: Any = SimpleNamespace(samples_s=[(1.0, 2.0), (2.0, 4.0), (1.0, 2.0)])
    task: Any = SimpleNamespace(model_name="m", tokens=8, size=2)
    found = {
        ("dps", True): [(4.5, 0.5), (7.5, 0.5), (5.5, 0.5)],
        ("dps", False): [(5.5, 0.5), (10.5, 0.5), (5.5, 0.5)],
    }
    on, off = overlap.records(found, {"dps": step}, computing, task, 100.0)
    assert on["exposed_samples_ms"] == [1000, 1000, 2000] and off["exposed_samples_ms"] == [2000, 4000, 2000]
    assert (on["step_ms"], on["compute_ms"], on["backward_ms"], on["update_ms"]) == (5500, 3000, 2000, 500)
    assert on["hidden"] == [0.5, 0.0, 0.75] and "hidden" not in off
    assert (on["floor_ms"], on["late_ms"], on["wrong"]) == (2000, 500, 3)
    shown = dict(zip(overlap.HEAD, overlap.cells(on), strict=True))
    assert (shown["overlap"], shown["exposed"], shown["floor"]) == ("on", "1,000", "2,000")
    assert shown["hidden"] == "50% (0% to 75%)"


def test_without_a_known_link_there_is_no_floor() -> None:
    step: Any = SimpleNamespace(bytes_sent=200, late_bytes=50, wrong=0)
    computing: Any = SimpleNamespace(samples_s=[(1.0, 2.0)])
    task: Any = SimpleNamespace(model_name="m", tokens=8, size=2)
    found = {("dps", True): [(4.0, 0.5)], ("dps", False): [(3.5, 0.5)]}
    on, off = overlap.records(found, {"dps": step}, computing, task, 0.0)
    assert "floor_ms" not in on and "hidden" not in on, "nothing was exposed that could be hidden"
    assert off["exposed_ms"] == 0 and len(overlap.cells(on)) == len(overlap.HEAD)


def test_the_program(tmp_path: Path) -> None:
    mpi = find_mpi()
    command = [mpi.mpirun, "-n", "2", "python", str(ROOT / "tests/helpers/overlapped.py"), "--rounds", "1"]
    command += ["--bucket-mb", "0.0001", "--contestants", "dps,allreduce:bf16", "--json", str(tmp_path / "r.jsonl")]
    environment = {**mpirun_environment(mpi), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    ((about, found),) = results.read(tmp_path / "r.jsonl")
    assert about["bench"] == "bench.overlap" and about["hosts"] == 1
    variants = [(record["contestant"], record["overlap"], record["wrong"]) for record in found]
    assert variants == [(name, on, 0) for name in ("dps", "allreduce:bf16") for on in (True, False)]
    assert "2 ranks on 1 host" in done.stdout
