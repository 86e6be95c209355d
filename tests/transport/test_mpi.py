"""What a process may do with MPI and with itself around commlab, under mpirun."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import finish, mpirun, start

PROGRAM = """
if {first}:
    from mpi4py import MPI
group = commlab.init(timeout_s=60, window="{window}")
commlab.allreduce(torch.ones(3))
for ends in ("exit", "raise"):
    child = os.fork()
    if not child:
        for call in (lambda: commlab.allreduce(torch.ones(3), group=group), commlab.init):
            try:
                call()
            except commlab.UsageError as error:
                say("child", "forked" in str(error))
        commlab.shutdown()
        if ends == "raise":
            raise ValueError("of the child")
        sys.exit(3)
    say("code", ends, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert commlab.allreduce(torch.ones(3), "sum")[0] == group.size
part = group.subgroup([1, 0])
commlab.allreduce(torch.ones(3), group=part)
commlab.shutdown()
for dead in (part, group):
    try:
        commlab.allreduce(torch.ones(3), group=dead)
    except commlab.UsageError as error:
        say("dead", "was shut down" in str(error))
group = commlab.init(timeout_s=60, window="{window}")
commlab.barrier()
from mpi4py import MPI
MPI.Finalize()
if "{window}" == "off":
    try:
        commlab.allreduce(torch.ones(3))
    except commlab.UsageError as error:
        say("finalized", "MPI was finalized" in str(error))
commlab.shutdown()
say("end", "ok")
"""


@pytest.mark.parametrize(("first", "window"), [(False, "off"), (True, "auto")])
def test_children_shutdown_and_finalize(tmp_path: Path, first: bool, window: str) -> None:
    """B17: children of fork never touch MPI, a group of the dead world is refused, and our clean-up comes after
    MPI_Finalize as well as before it; also where the program has imported mpi4py first."""
    job = finish(start(mpirun(2), PROGRAM.format(first=first, window=window), tmp_path))
    assert job.code == 0, job.output
    assert job.said("child") == ["True"] * 8, job.output
    assert sorted(job.said("code")) == ["exit 3", "exit 3", "raise 1", "raise 1"]
    assert job.said("dead") == ["True"] * 4
    assert job.said("finalized") == (["True"] * 2 if window == "off" else [])
    assert len(job.said("end")) == 2
