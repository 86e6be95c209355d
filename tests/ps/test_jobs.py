"""The parameter server as whole jobs: its page of the documentation, workers that return without a word, and ranks that
die."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jobs import finish, gone_soon, mpirun, start

PAGE = Path(__file__).parents[2] / "docs" / "parameter-server.md"

WITHOUT_A_WORD = """
import atexit
say("loss", float((model.weight.detach() - 1).abs().max()) if store.role == "worker" else 0.0, store.role)
commlab.init()
store = commlab.ParameterServer([("w", torch.zeros(1))], consistency="asp")
if store.role == "worker":
    if store.group.rank == 0:
        store.push("w", torch.ones(1)).wait()
        sys.exit()  # without leave(), close() or shutdown()
    out = torch.zeros(1)
    while float(out) < 1.0:
        store.pull("w", out).wait()
    for _ in range(3):
        store.push("w", torch.ones(1)).wait()
        store.step()
    store.pull("w", out).wait()
    say("found", float(out))
say("ended", store.role)
"""


def test_the_page_runs_and_workers_may_return_without_a_word(tmp_path: Path) -> None:
    [example] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    assert (
        len([line for line in example.splitlines() if line.strip() and not line.startswith(("import", "commlab"))])
        <= 15
    )
    job = finish(start(mpirun(3), example + WITHOUT_A_WORD, tmp_path))
    assert job.code == 0, job.output
    # The model learns to add up eight numbers: every weight becomes 1.
    losses = [float(said.split()[0]) for said in job.said("loss")]
    assert len(losses) == 3 and max(losses) < 0.05, job.output
    assert job.said("found") == ["4.0"]
    assert sorted(job.said("ended")) == ["server", "worker"]


@pytest.mark.parametrize("who", ["server", "worker"])
def test_a_rank_that_dies_ends_all(tmp_path: Path, who: str) -> None:
    """Whether it raises or is killed."""
    program = f"""
group = commlab.init(timeout_s=300)
receive_ = commlab.ps.server.server.Server.receive
dies = "{who}"
def receive(self, peer, header, data, count=[0]):
    count[0] += 1
    if count[0] == 5:
        say("dying", time.time())
        raise ValueError("five messages")
    receive_(self, peer, header, data)
if dies == "server":
    commlab.ps.server.server.Server.receive = receive
store = commlab.ParameterServer([("w", torch.zeros(1))], consistency="bsp")
for step in range(100):
    if dies == "worker" and step == 3 and group.rank == 0:
        say("dying", time.time())
        os.kill(os.getpid(), signal.SIGKILL)
    store.push("w", torch.ones(1)).wait()
    store.step()
    store.pull("w", torch.zeros(1)).wait()
"""
    job = finish(start(mpirun(3), "import commlab.ps.server.server\n" + program, tmp_path))
    assert job.code != 0
    if who == "server":
        assert "[rank 2 of 3] ValueError: five messages" in job.output
    gone_soon(job, float(job.said("dying")[0]))


def test_over_gloo(tmp_path: Path) -> None:
    """Where every message is waited for by a thread; workers may be heard in any order."""
    program = """
group = commlab.init("torch", timeout_s=60)
store = commlab.ParameterServer([("w", torch.zeros(70000))], consistency="ssp:1", servers=1)
out = torch.zeros(70000)
if store.role == "worker":
    if store.group.rank == 0:
        time.sleep(0.3)
    for step in range(5):
        store.push("w", torch.arange(70000.0)).wait()
        store.step()
        store.pull("w", out).wait()
    store.leave()
    store.group.barrier()
    store.pull("w", out).wait()
    say("right", bool((out == 10 * torch.arange(70000.0)).all()), max(store.report()["staleness"]) <= 1)
commlab.shutdown()
"""
    job = finish(start(mpirun(3), program, tmp_path, PYTHONWARNINGS="error::UserWarning"))
    assert job.code == 0 and job.said("right") == ["True True"] * 2, job.output


def test_what_workers_refuse_ends_servers_too(tmp_path: Path) -> None:
    """They serve, and hear of nothing."""
    (tmp_path / "checkpoints" / "step-0000000007").mkdir(parents=True)
    (tmp_path / "text.txt").write_text("".join(f"line {number} of {number**2}\n" for number in range(400)))
    flags = ["--strategy", "ps", "--servers", "1", "--batch-size", "2", "--steps", "2", "--timeout", "300"]
    flags += ["--data", "text.txt", "--output", "model", "--checkpoint-dir", "checkpoints", "--checkpoint-every", "1"]
    program = f"""
from commlab.train import main
os.chdir({str(tmp_path)!r})
say("began", time.time())
sys.exit(main({flags!r}))
"""
    job = finish(start(mpirun(3), program, tmp_path))
    assert job.code == 2, job.output
    assert job.output.count("commlab: there are checkpoints already, the newest") == 1, job.output
    assert "Traceback" not in job.output
    assert job.ended_s - float(job.said("began")[0]) < 100, "nobody waited for the timeout"
