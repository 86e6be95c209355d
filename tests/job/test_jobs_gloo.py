"""Whole jobs over gloo: under torchrun, under mpirun and without a launcher; see test_jobs."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

from jobs import finish, free_port, gone_soon, mpirun, start, torchrun


def test_over_gloo_under_torchrun(tmp_path: Path) -> None:
    """Results first, a group within the group, and then an exception in one rank."""
    program = """
group = commlab.init("torch", timeout_s=300)
assert (group.rank, group.size, group.local_size) == (int(os.environ["RANK"]), 2, 2)
for algorithm in ("auto", "ring", "halving", "tree", "direct"):
    mine = torch.arange(1000.0) + group.rank
    assert torch.equal(commlab.allreduce(mine, "sum", algorithm=algorithm), 2 * torch.arange(1000.0) + 1), algorithm
assert commlab.broadcast(torch.tensor(group.rank), root=1) == 1
turned = group.subgroup([1, 0])
assert turned.rank == 1 - group.rank
assert commlab.broadcast(torch.tensor(group.rank), root=0, group=turned) == 1
say("right", group.rank)
group.barrier()
if group.rank == 1:
    say("raising", time.time())
    raise ValueError("seven")
commlab.allreduce(torch.ones(5))
"""
    job = finish(start(torchrun(2), program, tmp_path))
    assert sorted(job.said("right")) == ["0", "1"]
    assert job.code != 0
    assert "[rank 1 of 2] ValueError: seven" in job.output
    # torchrun takes a moment to end the others; a rank that sees its peer go in the meantime may say so.
    assert {"PeerLostError"} >= set(re.findall(r"^\[rank 0 of 2\] commlab\.errors\.(\w+): ", job.output, re.MULTILINE))
    gone_soon(job, float(job.said("raising")[0]))


def test_over_gloo_a_killed_peer_is_named_at_once(tmp_path: Path) -> None:
    """Without a launcher, which would end the other rank before it can speak. Gloo notices, and so does the window."""
    program = """
group = commlab.init("torch", timeout_s=300, window=os.environ["WINDOW"])
if group.rank == 1:
    say("dying", time.time())
    os.kill(os.getpid(), signal.SIGKILL)
try:
    commlab.allreduce(torch.ones(5))
except commlab.PeerLostError as error:
    say("first", error)
commlab.allreduce(torch.ones(5))
"""
    for window in ("auto", "off"):
        meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WINDOW": window}
        processes = [start([sys.executable], program, tmp_path, RANK=str(rank), **meet) for rank in range(2)]
        survivor, killed = map(finish, processes)
        assert killed.code == -signal.SIGKILL
        assert survivor.code == 1
        named = r"rank 0: .*(lost rank 1|rank 1 is gone).*, in allreduce #\d+ of float32\[5\]"
        assert re.search(f"^first {named}", survivor.output, re.MULTILINE), survivor.output
        again = rf"\[rank 0 of 2\] commlab\.errors\.PeerLostError: {named}"
        assert re.search(again, survivor.output), survivor.output
        gone_soon(survivor, float(killed.said("dying")[0]))


def test_a_rank_that_fails_while_it_connects_ends_all(tmp_path: Path) -> None:
    """Rank 0 looks for a network interface that is not there; the others wait for the address that it would tell."""
    program = """
say("connecting", time.time())
commlab.init("torch", timeout_s=300)
"""
    job = finish(start(mpirun(2), program, tmp_path, GLOO_SOCKET_IFNAME="missing0"))
    assert job.code != 0
    assert "[rank 0 of 2] Traceback" in job.output
    gone_soon(job, job.ended_s)


def test_an_exception_over_gloo_under_mpirun(tmp_path: Path) -> None:
    program = """
group = commlab.init("torch", timeout_s=300)
assert torch.equal(commlab.allreduce(torch.ones(5), "sum"), torch.full((5,), 2.0))
if group.rank == 1:
    say("raising", time.time())
    raise ValueError("seven")
commlab.allreduce(torch.ones(5))
"""
    job = finish(start(mpirun(2), program, tmp_path))
    assert job.code != 0
    assert "[rank 1 of 2] ValueError: seven" in job.output
    gone_soon(job, float(job.said("raising")[0]))


def test_over_gloo_who_left_and_who_has_not_come(tmp_path: Path) -> None:
    """B1, B14, B26: ranks without a launcher. The second job of the process meets in the same store; then one leaves
    without a word, and the kernel tells its exit code."""
    program = """
for turn in range(2):
    group = commlab.init("torch", timeout_s=60)
    assert torch.equal(commlab.allreduce(torch.ones(5), "sum"), torch.full((5,), 2.0))
    if turn == 0:
        commlab.shutdown()
if group.rank == 1:
    os._exit(3)
try:
    commlab.allreduce(torch.ones(5))
except commlab.PeerLostError as error:
    say("lost", error)
sys.modules["commlab.runtime.world"]._world = None
sys.modules["commlab.runtime.connect"].MEET_S = 0.0
os.environ["RANK"], os.environ["MASTER_PORT"] = "0", os.environ["SECOND_PORT"]
try:
    commlab.init("torch", timeout_s=0.5)
except commlab.PeerTimeoutError as error:
    say("late", error)
os._exit(0)
"""
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    meet["SECOND_PORT"] = str(free_port())
    processes = [start([sys.executable], program, tmp_path, RANK=str(rank), **meet) for rank in range(2)]
    survivor, gone = map(finish, processes)
    assert gone.code == 3, gone.output
    assert survivor.code == 0, survivor.output
    assert re.search(
        "^lost rank 1 left [(]exit code 3[)] while rank 0 is in allreduce #", survivor.output, re.MULTILINE
    )
    assert re.search(
        r"^late rank 0 has waited \d+\.\d s in commlab\.init\(\) for rank 1; every rank must call it",
        survivor.output,
        re.MULTILINE,
    ), survivor.output
