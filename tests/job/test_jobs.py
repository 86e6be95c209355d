"""Whole jobs under mpirun, and how they end: no rank outlives a failure, and the message says who and what.

Every launch imports torch once per rank, so there are few of them and each shows several things. Where a rank would
otherwise wait, it waits for minutes: a job that ends within seconds was ended.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from jobs import BUSY, finish, gone_soon, mpirun, start


def test_an_exception_in_one_rank_ends_all(tmp_path: Path) -> None:
    program = """
group = commlab.init(timeout_s=300)
if group.rank == 1:
    say("raising", time.time())
    raise ValueError("seven")
commlab.allreduce(torch.ones(5))
"""
    job = finish(start(mpirun(3), program, tmp_path))
    assert job.code != 0
    assert job.output.count("Traceback") == 1
    assert "[rank 1 of 3] ValueError: seven" in job.output
    gone_soon(job, float(job.said("raising")[0]))


def test_ranks_that_disagree(tmp_path: Path) -> None:
    """First about the arguments of ``init``, which every rank may catch; then about a tensor, which nobody catches."""
    program = """
rank = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")))
try:
    commlab.init(nodes="1" if rank == 2 else "3")
except commlab.DisagreementError as error:
    say("caught", rank, error)
group = commlab.init(timeout_s=300)
mine = torch.ones(5 if group.rank == 1 else 6)
try:
    commlab.allreduce(mine, "sum", name="wte")
finally:
    say("untouched", bool((mine == 1).all()), time.time())
"""
    job = finish(start(mpirun(3), program, tmp_path))
    assert len(job.said("caught")) == 3
    assert all("ranks 0-1: " in said and "nodes='3'" in said and "rank 2: " in said for said in job.said("caught"))
    assert job.code != 0
    assert re.search(
        r"\[rank \d of 3\] commlab\.errors\.DisagreementError: ranks disagree \(seen on rank \d\): "
        r"ranks 0, 2: allreduce #\d+ 'wte' of float32\[6\] .*; rank 1: allreduce #\d+ 'wte' of float32\[5\]",
        job.output,
    ), job.output
    assert job.said("untouched")
    assert all(said.startswith("True") for said in job.said("untouched"))
    gone_soon(job, min(float(said.split()[1]) for said in job.said("untouched")))


def test_a_killed_peer_ends_all(tmp_path: Path) -> None:
    program = """
group = commlab.init(timeout_s=300)
if group.rank == 1:
    say("dying", time.time())
    os.kill(os.getpid(), signal.SIGKILL)
commlab.allreduce(torch.ones(5))
"""
    job = finish(start(mpirun(3), program, tmp_path))
    assert job.code != 0
    gone_soon(job, float(job.said("dying")[0]))


def test_a_peer_that_never_answers(tmp_path: Path) -> None:
    program = """
from commlab.runtime import waiting
waiting.WARN_AFTER_S = 0.3
group = commlab.init(timeout_s=1.2, window=os.environ["WINDOW"])
if group.rank == 1:
    time.sleep(300)
try:
    commlab.allreduce(torch.ones(5), name="wte")
finally:
    say("late", time.time())
"""
    for window in ("auto", "off"):
        job = finish(start(mpirun(2), program, tmp_path, WINDOW=window))
        assert job.code != 0
        silent = r"rank 0 has waited {} s for rank 1 in allreduce #\d+ 'wte' of float32\[5\]"
        assert re.search(rf"^{silent.format('0[.][3-9]')}", job.output, re.MULTILINE), job.output
        assert re.search(rf"PeerTimeoutError: {silent.format('[1-9][.][0-9]')}", job.output), job.output
        gone_soon(job, float(job.said("late")[0]))


def test_ctrl_c_ends_all(tmp_path: Path) -> None:
    program = """
group = commlab.init(timeout_s=300)
commlab.allreduce(torch.ones(5))  # an import that is interrupted leaves a traceback of its own
say("ready", group.rank)
if group.rank == 1:
    time.sleep(300)
commlab.allreduce(torch.ones(5))
"""
    process = start(mpirun(2), program, tmp_path, own_group=True)
    already = ""
    assert process.stdout is not None
    while already.count("ready") < 2:
        line = process.stdout.readline()
        assert line, f"the job ended early:\n{already}"
        already += line
    pressed_s = time.time()
    os.killpg(process.pid, signal.SIGINT)  # Intel's mpirun is a shell script, which forwards nothing
    job = finish(process, already)
    assert job.code != 0
    assert "Traceback" not in job.output
    gone_soon(job, pressed_s)


def test_a_rank_that_leaves_is_missed_at_once(tmp_path: Path) -> None:
    """B1: under MPI, where its process stays until all have finished; with and without a window; what its peers wait
    in is named, and how it left."""
    program = """
group = commlab.init(timeout_s=300, window=os.environ["WINDOW"])
commlab.allreduce(torch.ones(5))
if group.rank == 2:
    say("leaving", time.time())
    exec(os.environ["END"])
else:
    try:
        commlab.allreduce(torch.ones(5), name="wte")
    finally:
        say("missed", time.time())
"""
    ends = {
        "sys.exit(3)": "exit code 3",
        "sys.exit('text')": "exit code 1: text",
        "pass": "exit code 0",
        "sys.excepthook = lambda *all: None; raise ValueError('seven')": "exit code 1: ValueError: seven",
    }
    for number, (end, words) in enumerate(ends.items()):
        job = finish(start(mpirun(3), program, tmp_path, WINDOW=("auto", "off")[number % 2], END=end))
        assert job.code != 0
        sentence = rf"PeerLostError: rank 2 left \({words}\) while rank [01] is in allreduce #\d+ 'wte' of float32\[5\]"
        assert re.search(sentence, job.output), job.output
        left_s, missed_s = float(job.said("leaving")[0]), min(map(float, job.said("missed")))
        assert missed_s - left_s < BUSY
        gone_soon(job, missed_s)


def test_a_rank_that_does_not_come_to_init(tmp_path: Path) -> None:
    """B14: before MPI_Init, which can't be left again, and after it; the ranks are named, within the limit."""
    program = """
if os.environ["PHASE"] == "after MPI_Init":
    from mpi4py import MPI
rank = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")))
if rank == 1:
    time.sleep(300)
from commlab.runtime import connect
connect.MEET_S = 0.0
# How long the other two take to get here is not what is looked at.
here = os.path.join(os.environ["HERE"], os.environ["PHASE"])
open(f"{here} {rank}", "w").close()
while not os.path.exists(f"{here} {2 - rank}"):
    time.sleep(0.01)
say("calling", time.time())
commlab.init(timeout_s=1.5)
"""
    for phase, words in {
        "before MPI_Init": r"MPI_Init has waited 1\.5 s; not there: rank 1$",
        "after MPI_Init": r"PeerTimeoutError: rank [02] has waited 1\.5 s in commlab\.init\(\) for: rank 1; every",
    }.items():
        job = finish(start(mpirun(3), program, tmp_path, PHASE=phase, HERE=str(tmp_path)))
        assert job.code != 0
        assert re.search(words, job.output, re.MULTILINE), job.output
        gone_soon(job, max(map(float, job.said("calling"))) + 1.5)


def test_several_jobs_in_one_process(tmp_path: Path) -> None:
    """B14, B26: init and shutdown again and again, over both transports; other arguments without a shutdown are
    refused."""
    program = """
for turn in range(3):
    for transport in ("mpi", "torch"):
        group = commlab.init(transport, timeout_s=60)
        assert commlab.init() is group
        try:
            commlab.init(transport, window="off", timeout_s=5)
        except commlab.UsageError as error:
            assert "before with timeout_s=60, window='auto', and now with timeout_s=5, window='off'" in str(error)
        else:
            raise AssertionError("not refused")
        mine = commlab.empty(1000).fill_(group.rank + turn)
        assert (commlab.allreduce(mine, "sum") == 2 * turn + 1).all()
        commlab.shutdown()
        assert (mine == 2 * turn + 1).all()
say("right", group.rank)
"""
    job = finish(start(mpirun(2), program, tmp_path))
    assert sorted(job.said("right")) == ["0", "1"], job.output
    assert job.code == 0
