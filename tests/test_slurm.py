"""docs/launch/slurm.sbatch under a real Slurm of two nodes: ``make test-slurm`` (pytest --slurm).

Real schedulers, not stand-ins.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from jobs import lives
from slurm import Slurm, wait_until, why_not, with_openmpi

from bench.core.mpirun import find_mpi
from bench.hosts.mpi import rank_variables

SCRIPT = Path(__file__).parents[1] / "docs" / "launch" / "slurm.sbatch"
STEPS, EVERY = 60, 20
FLAGS = f"--steps {STEPS} --batch-size 8 --eval-every 0 --eval-batches 1 --sample 0 --checkpoint-every".split()
FLAGS += [str(EVERY)]
START_S = 200.0
"""How long four ranks on two busy cores may take to import torch and begin."""


@dataclass
class Training:
    """One training, by one job or by several after each other."""

    slurm: Slurm
    folder: Path
    environment: dict[str, str]

    def submit(self, *options: str) -> str:
        shape = ["--ntasks-per-node=2", f"--output={self.folder}/log"]
        return self.slurm.submit(*shape, *options, str(SCRIPT), *FLAGS, environment=self.environment)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def losses(self) -> dict[int, float]:
        try:
            lines = (self.folder / "run/metrics.jsonl").read_text().splitlines(keepends=True)
        except OSError:
            return {}
        # The last line may be half written.
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("\n")]
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    @property
    def weights(self) -> bytes:
        return (self.folder / "run/model/model.safetensors").read_bytes()

    def reaches(self, step: int) -> None:
        wait_until(lambda: step in self.losses, START_S, f"step {step}")

    def ranks(self, job: str) -> dict[int, int]:
        """The processes of a running job by rank, as this process sees them."""
        ranks, parents = {}, {}
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = dict(item.partition("=")[::2] for item in entry.read_text().split("\0"))
                words = (entry.parent / "cmdline").read_text().split("\0")
                parent = re.search(r"^PPid:\s+(\d+)$", (entry.parent / "status").read_text(), re.M)
            except (OSError, UnicodeDecodeError):
                continue
            a_rank = variables.get("SLURM_JOB_ID") == job and "SLURM_PROCID" in variables
            if a_rank and parent and words[0].endswith("python") and "commlab.train" in words:
                pid = int(entry.parent.name)
                ranks[pid], parents[pid] = int(variables["SLURM_PROCID"]), int(parent[1])
        # The keeper of a rank's memory (docs/links.md) is its child, with its words and its variables.
        return {rank: pid for pid, rank in ranks.items() if parents[pid] not in ranks}


@pytest.fixture(scope="module")
def slurm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if not request.config.getoption("--slurm"):
        pytest.skip("make test-slurm runs it")
    if reason := why_not():
        pytest.skip(reason)
    if find_mpi().kind != "mpich":
        pytest.skip("runs in the environment with MPICH, and lays Open MPI over it")
    folder = tmp_path_factory.mktemp("slurm")
    with Slurm(folder) as started:
        yield started
    if kept := os.environ.get("COMMLAB_SLURM_LOGS"):
        shutil.copytree(
            folder.parent, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("spool*", "socket", "env")
        )


def training(slurm: Slurm, folder: Path, pmi: str, environment: Path) -> Training:
    text = folder / "text.txt"
    text.write_text("".join(f"line {number} of the text, and {number**2}\n" for number in range(4000)))
    variables = {"RUN": str(folder / "run"), "DATA": str(text), "PMI": pmi, "COMMLAB_ENV": str(environment)}
    return Training(slurm, folder, variables)


@pytest.fixture(scope="module")
def whole(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A training that nothing has interrupted."""
    done = training(slurm, tmp_path_factory.mktemp("whole"), "pmi2", Path(sys.prefix))
    job = slurm.ended(done.submit(), 2 * START_S)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), done.log
    return done


def test_it_trains_on_two_nodes(whole: Training) -> None:
    assert "4 ranks on 2 nodes" in whole.log
    assert list(whole.losses) == list(range(STEPS))
    assert whole.losses[STEPS - 1] < whole.losses[0]


def test_it_is_requeued_and_killed_and_goes_on(slurm: Slurm, whole: Training, tmp_path: Path) -> None:
    """USR1, which Slurm sends to the script alone: checkpoint, requeue. ``kill -9`` of a task: the job fails at once
    and says which. In the end the numbers are those of a run without either."""
    run = training(slurm, tmp_path, "pmi2", Path(sys.prefix))
    job = run.submit()
    run.reaches(5)
    slurm.ask("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: slurm.job(job)["Restarts"] == "1", START_S, "the requeue")
    saved = re.search(r"^SIGUSR1: the run ends after step (\d+), which is saved", run.log, re.M)
    assert saved, run.log
    first = int(saved[1])
    assert 5 <= first < STEPS and first % EVERY, "not a checkpoint that was due anyway"

    run.reaches(first + EVERY + 2)
    assert f"resume: from step {first} in " in run.log
    ranks = run.ranks(job)
    assert sorted(ranks) == [0, 1, 2, 3]
    os.kill(ranks[2], signal.SIGKILL)
    ended = slurm.ended(job, 60)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1") and ended["ExitCode"] != "0:0", run.log
    assert "task 2: Killed" in run.log
    assert not any(map(lives, ranks.values()))

    ended = slurm.ended(run.submit(), 2 * START_S)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), run.log
    assert int(re.findall(r"^resume: from step (\d+) in ", run.log, re.M)[-1]) % EVERY == 0
    assert run.losses == whole.losses
    assert run.weights == whole.weights


def test_open_mpi_by_pmix(slurm: Slurm, whole: Training, tmp_path: Path) -> None:
    environment = with_openmpi(tmp_path / "env")
    run = training(slurm, tmp_path, "pmix", environment)
    run.environment |= rank_variables(replace(find_mpi(), kind="openmpi"), slurm.link)
    ended = slurm.ended(run.submit(), 2 * START_S)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), run.log
    assert "4 ranks on 2 nodes" in run.log
    assert run.losses == pytest.approx(whole.losses, rel=1e-4)
