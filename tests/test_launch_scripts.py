"""The scripts of docs/launch do what they say: run with launchers that only tell what they were given.

test_slurm.py runs the one for Slurm under a real Slurm.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from commlab.trainer.config import Config

LAUNCH = Path(__file__).parents[1] / "docs" / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
TELLS = f"""#!{sys.executable}
import json, os, sys
print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), flush=True)
"""
SLURM = {"SLURM_CPUS_PER_TASK": "3", "SLURM_JOB_ID": "77"}

scripts = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Where launchers only tell, and an environment can be activated."""
    for name in ("mpirun", "srun", "scontrol"):
        (tmp_path / name).write_text(TELLS)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "env/bin").mkdir(parents=True)
    (tmp_path / "env/bin/activate").write_text("echo activated >&2\n")
    return {
        "PATH": os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
        "COMMLAB_ENV": str(tmp_path / "env"),
        "HOSTS": str(LAUNCH / "hosts"),
        "RANKS_PER_HOST": "4",
        "RUN": str(tmp_path / "my run"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        **SLURM,
    }


def told(script: Path, environment: dict[str, str], *flags: str) -> list[str]:
    done = subprocess.run(
        ["bash", str(script), *flags], env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stderr == "activated\n"
    found: list[str] = json.loads(done.stdout)
    return found


@scripts
def test_bash_reads_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    assert script.suffix == ".sbatch" or os.access(script, os.X_OK)


@scripts
def test_the_trainer_takes_its_flags(script: Path, environment: dict[str, str], tmp_path: Path) -> None:
    words = told(script, {**environment, "DATA": "a text"}, "--steps", "9")
    at = words.index("-m")
    assert Path(words[at - 1]).name == "python"
    assert words[at + 1] == "commlab.train"
    config = Config.from_argv(words[at + 2 :])
    assert (config.data, config.steps, config.resume, config.checkpoint_every) == (("a text",), 9, True, 100)
    run = tmp_path / "my run"
    assert run.is_dir()
    assert (config.output, config.checkpoint_folder) == (str(run / "model"), str(run / "checkpoints"))
    words = told(script, environment)
    assert Config.from_argv(words[words.index("-m") + 2 :]).data is None


def test_what_the_launchers_are_given(environment: dict[str, str]) -> None:
    hosts, several = environment["HOSTS"], {**environment, "IFACE": "eth9"}
    mpich = told(LAUNCH / "mpich.sh", several)
    assert mpich[: mpich.index("-m") - 1] == ["mpirun", "-f", hosts, "-ppn", "4", "-n", "8", "-iface", "eth9"]
    assert "-iface" not in told(LAUNCH / "mpich.sh", environment)
    openmpi = told(LAUNCH / "openmpi.sh", several)
    wanted = ["mpirun", "--hostfile", hosts, "--map-by", "ppr:4:node", "--bind-to", "none", "-n", "8"]
    assert openmpi[: openmpi.index("-m") - 1] == [*wanted, "--mca", "btl_tcp_if_include", "eth9"]
    slurm = told(LAUNCH / "slurm.sbatch", {**environment, "PMI": "pmi2"})
    assert slurm[: slurm.index("-m") - 1] == ["srun", "--mpi=pmi2", "--cpus-per-task=3", "--kill-on-bad-exit=1"]
    assert Config.from_argv(slurm[slurm.index("-m") + 2 :]).threads == 3


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("code", "requeued"), [(75, True), (138, True), (0, False)])
def test_it_queues_itself_again(
    environment: dict[str, str], tmp_path: Path, code: int, requeued: bool, early: bool
) -> None:
    """Slurm tells the script that time is nearly up, and the script the ranks. When they have ended, with a checkpoint
    or without, the job goes into the queue, unless training was done. ``early``: the signal comes between the script's
    start of the ranks and its next line."""
    answers = f"import signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit({code}))\n"
    started = tmp_path / "started"
    (tmp_path / "srun").write_text(
        TELLS.replace("print", answers + "print", 1) + f"open({str(started)!r}, 'w')\ntime.sleep(60)\n"
    )
    script = (LAUNCH / "slurm.sbatch").read_text()
    if early:
        assert script.count("ranks=$!\n") == 1
        waits = f"until [[ -e '{started}' ]]; do sleep 0.05; done; kill -USR1 $$\n"
        script = script.replace("ranks=$!\n", waits + "ranks=$!\n")
    (tmp_path / "script").write_text(script)
    process = subprocess.Popen(
        ["bash", str(tmp_path / "script")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert json.loads(process.stdout.readline())[0] == "srun"
        if not early:
            process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == code
        calls = [json.loads(line) for line in process.stdout]
        assert calls == ([["scontrol", "requeue", "77"]] if requeued else [])
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        process.stdout.close()


def test_a_failure_is_the_scripts_own(environment: dict[str, str], tmp_path: Path) -> None:
    for name in ("srun", "mpirun"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 7\n")
    for script in SCRIPTS:
        done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, timeout=30, check=False)
        assert done.returncode == 7, script.name
