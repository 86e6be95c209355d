"""Whole jobs under mpirun, and how they end: no rank outlives a failure, and the message says who and what.

Every launch imports torch once per rank, so there are few of them and each shows several things. Where a rank would
otherwise wait, it waits for minutes: a job that ends within seconds was ended.
"""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

from jobs import finish, gone_soon, mpirun, start


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
        assert re.search(rf"PeerTimeoutError: {silent.format('1[.]2')}", job.output), job.output
        gone_soon(job, float(job.said("late")[0]))


def test_ctrl_c_ends_all(tmp_path: Path) -> None:
    program = """
group = commlab.init(timeout_s=300)
say("ready", group.rank)
if group.rank == 1:
    time.sleep(300)
commlab.allreduce(torch.ones(5))
"""
    process = start(mpirun(2), program, tmp_path)
    already = ""
    assert process.stdout is not None
    while already.count("ready") < 2:
        line = process.stdout.readline()
        assert line, f"the job ended early:\n{already}"
        already += line
    pressed_s = time.time()
    process.send_signal(signal.SIGINT)
    job = finish(process, already)
    assert job.code != 0
    assert "Traceback" not in job.output
    gone_soon(job, pressed_s)
