"""Every way in: torchrun, spawn, file://, tcp://, plain mpirun; the entry points; programs that say gloo."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Forked
from jobs import environment, finish, mpirun, start, torchrun

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
import torch
import torch.distributed as dist
dist.init_process_group(*sys.argv[1:])
rank, size = dist.get_rank(), dist.get_world_size()
dist.all_reduce(ones := torch.full((3,), rank + 1.0))
assert ones[0] == size * (size + 1) / 2
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
model(torch.ones(1, 2)).sum().backward()
say("done", rank, size, type(dist.group.WORLD).__name__, dist.get_backend(), dist.group.WORLD.group.window is not None)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for PYTHONPATH with the entry points of pyproject.toml, as an installation writes them: those of a
    checkout are the installation's, which may be older."""
    folder = tmp_path_factory.mktemp("installed")
    entries, group = "", ""
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        if line.startswith("["):
            group = line.strip("[]").removeprefix('project.entry-points."').rstrip('"')
            group = group if line.startswith("[project.entry-points") else ""
            entries += f"[{group}]\n" if group else ""
        elif group and "=" in line:
            name, _, target = line.partition("=")
            entries += f"{name.strip()} = {ast.literal_eval(target.strip())}\n"
    assert "[torch.backends]\ncommlab = commlab.c10d:register" in entries
    assert "[torch.distributed.backends]\ncommlab = commlab.c10d:register" in entries
    info = folder / "commlab_torch-0.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: commlab-torch\nVersion: 0.2.0\n")
    (info / "entry_points.txt").write_text(entries)
    return os.pathsep.join([str(folder), str(ROOT)])


def ended(words: list[str], size: int, name: str = "commlab") -> bool:
    return sorted(words) == [f"{rank} {size} CommlabProcessGroup {name} True" for rank in range(size)]


def test_torchrun(installed: str, tmp_path: Path) -> None:
    """No import in the program."""
    job = finish(start(torchrun(2), PROGRAM.replace("*sys.argv[1:]", '"commlab"'), tmp_path, PYTHONPATH=installed))
    assert job.code == 0 and ended(job.said("done"), 2), job.output


def test_plain_mpirun(installed: str, tmp_path: Path) -> None:
    """RANK is missing, the launcher's own variables are there."""
    job = finish(start(mpirun(2), PROGRAM.replace("*sys.argv[1:]", '"commlab"'), tmp_path, PYTHONPATH=installed))
    assert job.code == 0 and ended(job.said("done"), 2), job.output


def test_mpirun_ends_when_a_rank_fails(installed: str, tmp_path: Path) -> None:
    program = PROGRAM.replace("*sys.argv[1:]", '"commlab"') + "assert rank == 0\ndist.all_reduce(ones)\n"
    job = finish(start(mpirun(2), program, tmp_path, PYTHONPATH=installed))
    assert job.code != 0 and "AssertionError" in job.output, job.output


def test_a_program_that_says_gloo(installed: str, tmp_path: Path) -> None:
    """``torchrun -m commlab.c10d SCRIPT``."""
    command = [*torchrun(2), "-m", "commlab.c10d"]
    job = finish(start(command, PROGRAM.replace("*sys.argv[1:]", '"gloo"'), tmp_path, PYTHONPATH=installed))
    assert job.code == 0 and ended(job.said("done"), 2, "gloo"), job.output


def met(rank: int, size: int) -> str:
    import torch
    import torch.distributed as dist

    dist.all_reduce(ones := torch.ones(3))
    assert ones[0] == size
    return type(dist.group.WORLD).__name__


@pytest.mark.parametrize("method", ["tcp", "file", "env"])
def test_methods(forked: Forked, method: str) -> None:
    assert forked(met, 3, method=method) == ["CommlabProcessGroup"] * 3


def spawned(rank: int, size: int) -> None:
    """``torch.multiprocessing.spawn`` is what this rank does; its children are the ranks."""
    import tempfile

    import torch.multiprocessing as multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(child_of_spawn, (2, f"file://{folder}/store"), 2)


def child_of_spawn(rank: int, size: int, address: str) -> None:
    import torch
    import torch.distributed as dist

    import commlab.c10d

    commlab.c10d.register()
    dist.init_process_group("commlab", address, rank=rank, world_size=size)
    dist.all_reduce(ones := torch.ones(3))
    assert ones[0] == size
    dist.destroy_process_group()


def test_spawn(installed: str) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_launch import spawned\nif __name__ == '__main__': spawned(0, 1)\n"
    )
    # A file, because spawned processes import the main module again.
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment(PYTHONPATH=os.pathsep.join([installed, str(ROOT / "tests/helpers")])),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr


def without_a_name(rank: int, size: int) -> list[str]:
    import torch.distributed as dist

    import commlab.c10d

    commlab.c10d.make_default()
    dist.init_process_group()
    names = [type(dist.group.WORLD).__name__, str(met(rank, size))]
    dist.destroy_process_group()
    return names


def test_make_default(forked: Forked) -> None:
    assert forked(without_a_name, 2, backend=None) == [["CommlabProcessGroup"] * 2] * 2


def replaced(rank: int, size: int) -> list[str]:
    from datetime import timedelta

    import torch.distributed as dist

    import commlab.c10d

    commlab.c10d.replace_gloo()
    commlab.c10d.replace_gloo()
    dist.init_process_group("gloo")
    dist.monitored_barrier(timeout=timedelta(seconds=20))
    group = dist.new_group(backend="gloo")
    names = [met(rank, size), dist.get_backend(), type(group).__name__]
    own = dist.new_group(backend="cpu:gloo,cuda:gloo")
    dist.barrier()  # rank 0 holds the store that the last to make a group of gloo's still reads
    return [*names, type(own).__name__]


def test_replace_gloo(forked: Forked) -> None:
    """A map of devices stays torch's own, whatever it names."""
    wanted = ["CommlabProcessGroup", "gloo", "CommlabProcessGroup", "ProcessGroup"]
    assert forked(replaced, 2, backend=None) == [wanted] * 2


def test_importing_torch_costs_nothing(installed: str) -> None:
    """The entry point loads no more of commlab than its own file and the package's, and survives a torch without
    distributed."""
    program = """
import sys, torch
loaded = sorted(name.removeprefix("commlab.") for name in sys.modules if name.startswith("commlab"))
assert loaded == ["c10d", "c10d.rendezvous", "commlab", "job", "job.dynamo", "job.version"], loaded
assert not [name for name in ("numpy.ma", "mpi4py", "transformers") if name in sys.modules]
import torch.distributed, commlab.c10d
assert "COMMLAB" in torch.distributed.Backend._plugins
torch.distributed.is_available = lambda: False
commlab.c10d.register()
torch.distributed.Backend._plugins.clear()
torch.distributed.is_available = lambda: 1 / 0
commlab.c10d.register()
"""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment(PYTHONPATH=installed),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert found.returncode == 0, found.stderr
