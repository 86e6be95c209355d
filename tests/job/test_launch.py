"""What launchers say, and the last words of a rank. Real processes, but no torch and no MPI: a moment each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import commlab
from commlab.errors import UsageError
from commlab.job.launch import Launch, detect
from commlab.job.presence import Presence

OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2"}


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, Launch(None, 0, 1, 0, 1)),
        (OPENMPI, Launch("openmpi", 5, 8, 1, 4)),
        (MPICH, Launch("mpich", 2, 3, 0, 1)),
        (TORCHRUN, Launch("torchrun", 1, 2, 1, 2)),
        (SLURM, Launch("slurm", 3, 4, 1, 2)),
        (SLURM | MPICH, Launch("mpich", 2, 3, 0, 1)),
        (SLURM | {"SLURM_NTASKS_PER_NODE": "2(x2)"}, Launch("slurm", 3, 4, 1, 4)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Launch("mpich", 1, 2, 1, 2)),
        ({"RANK": "1"}, Launch(None, 0, 1, 0, 1)),
        ({"RANK": "1", "WORLD_SIZE": ""}, Launch(None, 0, 1, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch(None, 0, 1, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}, Launch("torchrun", 0, 1, 0, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"} | MPICH, Launch("mpich", 2, 3, 0, 1)),
        (TORCHRUN | MPICH, Launch("mpich", 2, 3, 0, 1)),
        (TORCHRUN | MPICH | {"TORCHELASTIC_RUN_ID": "x"}, Launch("torchrun", 1, 2, 1, 2)),
        (TORCHRUN | {"LOCAL_RANK": "", "LOCAL_WORLD_SIZE": "0"}, Launch("torchrun", 1, 2, 1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, Launch(None, 0, 1, 0, 1)),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
            Launch(None, 0, 1, 0, 1),
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, Launch("slurm", 0, 4, 0, 4)),
    ],
    ids=[
        *("none", "openmpi", "mpich", "torchrun", "slurm", "mpirun-in-slurm", "odd-slurm", "no-local", "half"),
        *("empty", "one-by-hand", "torchrun-of-one", "set-in-a-shell", "mpirun-knows-better", "torchrun-in-mpirun"),
        *("empty-local", "allocation", "interactive-step", "srun"),
    ],
)
def test_detect(environ: dict[str, str], launch: Launch) -> None:
    """B10, B16: variables that are empty, set in a shell, or an allocation's around one process, make no ranks."""
    assert detect(environ) == launch


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, r"RANK='one' is set, which is no number; unset it"),
        ({"RANK": "0", "WORLD_SIZE": "²"}, r"WORLD_SIZE='²' is set, which is no number; unset it"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, r"RANK=3 and WORLD_SIZE=2 are set, and ranks go from 0 to 1; unset them"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, r"RANK=-1 and WORLD_SIZE=2 are set"),
    ],
)
def test_variables_that_make_no_sense(environ: dict[str, str], message: str) -> None:
    """B16: one sentence, never a traceback out of int()."""
    with pytest.raises(UsageError, match=message):
        detect(environ)


def python(code: str, environ: dict[str, str] | None = None, **options: object) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter, after a hook whose abort leaves with the code + 40."""
    hooked = f"import os, sys, threading\nfrom commlab import errors\nfrom commlab.job import launch\n{code}"
    clean = {name: value for name, value in os.environ.items() if "RANK" not in name and not name.startswith("PMI")}
    clean["PYTHONPATH"] = os.pathsep.join([str(Path(commlab.__file__).parents[1]), clean.get("PYTHONPATH", "")])
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-c", hooked],
        env=clean | (environ or {}),
        text=True,
        timeout=60,
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
    )


HOOK = "launch.install_exception_hook(lambda code: os._exit(code + 40))\n"


def test_an_exception_is_printed_once_with_its_rank_and_ends_the_job() -> None:
    done = python(HOOK + "def broken():\n    raise ValueError('seven')\nbroken()", MPICH)
    assert done.returncode == 41
    lines = done.stderr.splitlines()
    assert all(line.startswith("[rank 2 of 3] ") for line in lines), done.stderr
    assert done.stderr.count("Traceback") == done.stderr.count("ValueError: seven") == 1
    assert lines[-1] == "[rank 2 of 3] ValueError: seven"


def test_our_own_errors_say_their_message_once() -> None:
    done = python(HOOK + "raise errors.UsageError('no such thing')")
    assert done.returncode == 41
    assert done.stderr.count("UsageError: no such thing") == 1
    assert done.stderr.splitlines()[-1] == "commlab.errors.UsageError: no such thing"


def test_an_exception_in_any_thread_ends_the_job() -> None:
    code = "thread = threading.Thread(target=lambda: 1 / 0)\nthread.start()\nthread.join()\nprint('went on')"
    done = python(HOOK + code, MPICH)
    assert done.returncode == 41
    assert "[rank 2 of 3] ZeroDivisionError" in done.stderr
    assert "went on" not in done.stdout


def test_a_thread_that_leaves_is_no_failure() -> None:
    done = python(HOOK + "thread = threading.Thread(target=sys.exit)\nthread.start()\nthread.join()\nprint('went on')")
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_ctrl_c_ends_the_job_without_a_traceback() -> None:
    done = python(HOOK + "raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (170, "")


def test_hooks_that_were_there_are_called_too() -> None:
    """B25: after our traceback and before the end; in threads as well; one that is replaced later is the user's."""
    theirs = "sys.excepthook = lambda *details: print('theirs', details[1])\n"
    done = python(theirs + HOOK + "raise ValueError('seven')", MPICH)
    assert (done.returncode, done.stdout) == (41, "theirs seven\n")
    assert done.stderr.count("ValueError: seven") == 1
    done = python(theirs + HOOK + "raise KeyboardInterrupt")
    assert (done.returncode, done.stdout, done.stderr) == (170, "theirs \n", "")
    in_threads = theirs.replace("sys.", "threading.").replace("details[1]", "details[0].exc_value")
    done = python(in_threads + HOOK + "thread = threading.Thread(target=lambda: 1 / 0)\nthread.start()\nthread.join()")
    assert (done.returncode, done.stdout) == (41, "theirs division by zero\n")
    done = python(HOOK + theirs + "raise ValueError('seven')")
    assert (done.returncode, done.stdout) == (1, "theirs seven\n")
    done = python(
        "def broken(*details): raise OSError('theirs')\nsys.excepthook = broken\n" + HOOK + "raise ValueError"
    )
    assert done.returncode == 41, "a hook that fails does not keep the job alive"


def test_a_worker_that_dies_meanwhile_does_not_keep_the_job_alive() -> None:
    """B10: torch's DataLoader raises an exception out of a signal handler, in the middle of a report or of the end."""
    handler = "import signal\ndef died(*details): raise RuntimeError('worker')\nsignal.signal(signal.SIGCHLD, died)\n"
    for where in (
        "launch.traceback.format_exception = lambda *all: os.kill(os.getpid(), signal.SIGCHLD)",
        "launch.time.sleep = lambda s: os.kill(os.getpid(), signal.SIGCHLD)",
        "sys.excepthook = lambda *all: os.kill(os.getpid(), signal.SIGCHLD)",
    ):
        done = python(handler + where + "\n" + HOOK + "raise ValueError('seven')")
        assert done.returncode == 41, where


def test_an_interactive_session_goes_on() -> None:
    """B25: what is typed wrongly at a prompt ends nothing."""
    typed = HOOK + "1 / 0\nnot_there\nprint('went', 'on')\n"
    head = "import os, sys, threading\nfrom commlab.job import launch\n"
    done = subprocess.run(
        [sys.executable, "-i"],
        input=head + typed,
        env={**os.environ, "PYTHONPATH": str(Path(commlab.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "went on" in done.stdout
    assert "ZeroDivisionError" in done.stderr
    assert "NameError" in done.stderr
    assert done.returncode == 0


def test_the_last_abort_counts() -> None:
    """``init`` after ``shutdown`` brings another transport, and the hook must not end the job through the old one."""
    done = python(HOOK + "launch.install_exception_hook(lambda code: os._exit(code + 50))\nraise ValueError")
    assert done.returncode == 51


def test_output_before_the_end_is_not_lost() -> None:
    done = python(HOOK + "print('so far', end='')\nraise ValueError")
    assert (done.returncode, done.stdout) == (41, "so far")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_job_ends_even_when_nobody_reads_its_output(stream: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = python(HOOK + "sys.stdout.write('unread')\nraise ValueError", **{stream: writer})
    finally:
        os.close(writer)
    assert done.returncode == 41


def test_end_job_without_other_ranks_returns() -> None:
    done = python("launch.end_job(1)\nprint('alone')")
    assert (done.returncode, done.stdout) == (0, "alone\n")


def test_importing_commlab_imports_nothing_heavy() -> None:
    """So that a wrong flag is told in a moment, not after seconds of imports."""
    done = python("import commlab\nprint(sorted({'torch', 'numpy', 'mpi4py', 'transformers'} & set(sys.modules)))")
    assert done.stdout == "[]\n"
    assert set(commlab.__all__) <= set(dir(commlab))
    with pytest.raises(AttributeError, match="no attribute 'allreduze'"):
        _ = commlab.allreduze


def test_who_has_not_come_is_named_by_the_job_s_number() -> None:
    """Open MPI numbers the ranks of a host in another order than the job's."""
    here = [Launch("openmpi", rank, 3, local_rank, 3) for rank, local_rank in ((0, 0), (1, 2), (2, 1))]
    come = [Presence(here[rank]) for rank in (0, 2)]
    try:
        assert [presence.missing() for presence in come] == [["rank 1"], ["rank 1"]]
    finally:
        for presence in come:
            presence.close()
    of_two_hosts = Presence(Launch("openmpi", 5, 6, 1, 3))
    assert of_two_hosts.missing() == ["local rank 0", "local rank 2"]
    of_two_hosts.close()
