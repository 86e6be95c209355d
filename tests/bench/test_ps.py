"""bench.ps as it is started."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bench.core import results
from bench.core.mpirun import find_mpi, mpirun_environment

ROOT = Path(__file__).resolve().parents[2]


def test_the_program(tmp_path: Path) -> None:
    mpi = find_mpi()
    command = [mpi.mpirun, "-n", "4", "python", "-m", "bench.ps", "--sizes", "4KB,300KB", "--rounds", "1"]
    command += ["--servers", "1,2", "--json", str(tmp_path / "r.jsonl")]
    environment = {**mpirun_environment(mpi), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    ((about, found),) = results.read(tmp_path / "r.jsonl")
    assert about["bench"] == "bench.ps" and [record["bytes"] for record in found[::7]] == [4000, 300_000]
    own = {record["contestant"]: record for record in found if record["kind"] == "commlab"}
    assert {"commlab, 1 server", "commlab, 2 servers", "commlab, 2 servers, wire bf16"} < set(own)
    assert not any(record["wrong"] for record in found) and all(record["workers"] == 2 for record in found)
    assert all(record["ratio_floor"] > 0 and len(record["ratio_messages"]) == 3 for record in own.values())
