"""Two programs and one folder of checkpoints; random state of every kind; buffers of every dtype."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import training
from training import Recipe, build, go_on

import commlab
from commlab.checkpoint import Checkpoints, nested, random_state
from commlab.errors import UsageError

RECIPE = Recipe()


def checkpoints_of(folder: Path, keep: int = 2) -> Checkpoints:
    run = build("single", training.alone(), RECIPE)
    return Checkpoints(folder, run.model, run.engine, run.scheduler, keep)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:15]) for path in folder.glob("step-*"))


def test_another_runs_checkpoints_stay(tmp_path: Path) -> None:
    """A18: a second program in one folder, without restore(): it deletes what it has made, and nothing else."""
    first = checkpoints_of(tmp_path)
    for step in (3000, 4000, 5000):
        first.save(step)
    assert steps_in(tmp_path) == [4000, 5000]
    del first
    second = checkpoints_of(tmp_path)
    for step in (100, 200, 300):
        second.save(step)
    assert steps_in(tmp_path) == [200, 300, 4000, 5000]
    second.close()
    again = checkpoints_of(tmp_path, keep=1)
    found = again.restore()
    assert found is not None and found[0] == 5000, "a run that goes on owns what it goes on from"
    again.save(6000)
    assert steps_in(tmp_path) == [200, 300, 6000]


def test_the_second_writer_is_refused_by_name(tmp_path: Path) -> None:
    """A18: two writers, in one process and in two; the file of a writer that was killed keeps nobody out."""
    first, second = checkpoints_of(tmp_path), checkpoints_of(tmp_path)
    first.save(1)
    partial = tmp_path / ".step-0000000009.partial"
    partial.mkdir()
    with pytest.raises(UsageError, match=rf"another Checkpoints object of this process \(pid {os.getpid()} on "):
        second.save(2)
    assert partial.exists(), "nobody removes what another writer is writing"
    first.close()
    program = f"""
import os, sys, time
sys.path[:0] = {[str(Path(training.__file__).parent)]!r}
import training
from pathlib import Path
from commlab.checkpoint import Checkpoints
run = training.build("single", training.alone(), training.Recipe())
Checkpoints_ = Checkpoints(Path({str(tmp_path)!r}), run.model, run.engine)
Checkpoints_.save(7)
child = os.fork()
if not child:
    time.sleep(30)
    os._exit(0)
print(child, flush=True)
time.sleep(30)
"""
    other = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    child = 0
    try:
        assert other.stdout is not None
        child = int(other.stdout.readline())
        with pytest.raises(UsageError, match=rf"another program writes there \(pid {other.pid} on "):
            second.save(2)
        assert steps_in(tmp_path) == [1, 7]
        other.kill()
        other.wait(10)
        second.save(2)  # although a process that the writer has forked lives
        assert steps_in(tmp_path) == [1, 2, 7]
    finally:
        other.kill()
        other.wait(10)
        if other.stdout is not None:
            other.stdout.close()
        if child:
            os.kill(child, signal.SIGKILL)


def test_every_generators_state_comes_back(tmp_path: Path) -> None:
    """A18: Python's and numpy's random state, bit for bit, whatever numpy's generator is."""
    for step, bits in enumerate((np.random.MT19937(7), np.random.PCG64(7), np.random.SFC64(7), np.random.Philox(7)), 1):
        before = np.random.get_bit_generator()
        np.random.set_bit_generator(bits)
        try:
            random.seed(step)
            random.gauss(0, 1), np.random.normal()
            writer = checkpoints_of(tmp_path)
            writer.save(step)
            writer.close()
            drawn = [random.random(), random.gauss(0, 1), *np.random.normal(size=3), *np.random.randint(0, 9, 9)]
            random.seed(99), np.random.uniform(size=7)
            checkpoints_of(tmp_path).restore()
            again = [random.random(), random.gauss(0, 1), *np.random.normal(size=3), *np.random.randint(0, 9, 9)]
            assert drawn == again, type(bits)
        finally:
            np.random.set_bit_generator(before)


def test_on_other_ranks_shared_random_state_stays_shared() -> None:
    """A18: what all ranks drew alike they go on to draw alike; else every rank draws anew."""
    random.seed(1)
    np.random.seed(1)
    alike = random_state.take([])
    drawn = random.random(), np.random.uniform()
    own = random_state.take([])
    torch.manual_seed(3)
    random_state.draw_anew([alike, alike], 5)
    assert (random.random(), np.random.uniform()) == drawn
    random_state.draw_anew([alike, own], 5)
    assert (random.random(), np.random.uniform()) not in (drawn, (random.random(), np.random.uniform()))
    random_state.give({"cpu": alike["cpu"]})  # of an older checkpoint


def buffers() -> dict[str, torch.Tensor]:
    """A buffer of every dtype that torch can copy, its bytes all different."""
    found = {}
    for name in dir(torch):
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype) or str(dtype) in (str(value.dtype) for value in found.values()):
            continue
        data = (torch.arange(6 * dtype.itemsize, dtype=torch.int64) * 37 % 251).to(torch.uint8)
        if dtype == torch.bool:
            data = data % 2
        try:
            value = data.view(dtype).view(2, 3)
            torch.empty_like(value).copy_(value)
        except (RuntimeError, NotImplementedError):
            continue  # quantized ones, and those of less than 8 bits: torch can't copy them
        found[f"of_{name}"] = value
    whole = torch.arange(6.0)
    return {
        **found,
        "scalar": torch.tensor(3 + 4j, dtype=torch.complex128),
        "empty": torch.empty(0, 3, dtype=torch.complex32),
        "view": whole[:4],
        "overlapping": whole[2:].view(2, 2),
        "transposed": torch.arange(6, dtype=torch.int16).view(2, 3).t(),
        "conjugated": torch.tensor([1 + 2j, 3 - 1j]).conj(),
        "negative": torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        "nan": torch.tensor([0x7FC00123, 0x7F800001, -1], dtype=torch.int32).view(torch.float32),
    }


def zeros(like: torch.Tensor) -> torch.Tensor:
    """Zero bytes of its dtype and shape."""
    return torch.zeros(like.numel() * like.itemsize, dtype=torch.uint8).view(like.dtype).view(like.shape)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_buffers_of_every_dtype_come_back(tmp_path: Path) -> None:
    """A6: every dtype is saved and restored, bit for bit."""
    kept = buffers()
    assert len(kept) >= 25

    def make(values: dict[str, torch.Tensor]) -> tuple[torch.nn.Module, Checkpoints]:
        model = torch.nn.Linear(3, 2)
        for name, value in values.items():
            model.register_buffer(name, value)
        engine = commlab.strategy("single", model, torch.optim.SGD(model.parameters(), lr=0.1), training.alone())
        return model, Checkpoints(tmp_path, model, engine)

    _, checkpoints = make(kept)
    checkpoints.save(1)
    model, others = make({name: zeros(value) for name, value in kept.items()})
    others.restore()
    for name, value in kept.items():
        found = model.get_buffer(name)
        assert found.dtype == value.dtype and found.shape == value.shape
        mine, theirs = (each.resolve_conj().resolve_neg().contiguous().view(-1) for each in (found, value))
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)), name
    with pytest.raises(UsageError, match=r"'of_int16' is torch.int16 in the checkpoint, and torch.int32 in this model"):
        make({**kept, "of_int16": torch.zeros(2, 3, dtype=torch.int32)})[1].restore()


def test_what_has_no_plain_memory_is_refused_by_name() -> None:
    """A6: with the place of the tensor."""
    for value in (torch.eye(3).to_sparse(), torch.ones(3, device="meta")):
        with pytest.raises(
            UsageError, match=r"state\['fixed'\]\['mask'\].* is (a sparse_coo tensor|on the meta device)"
        ):
            nested.pack({"fixed": {"mask": value}})


def test_a_run_that_goes_on_keeps_its_count(tmp_path: Path) -> None:
    """A18: checkpoints that a run has made before its restart are its own."""
    run = build("single", training.alone(), RECIPE)
    first = Checkpoints(tmp_path, run.model, run.engine, run.scheduler)
    go_on(run, range(1))
    for step in (1, 2, 3):
        first.save(step)
    first.close()
    again = checkpoints_of(tmp_path)
    again.restore()
    again.save(4)
    assert steps_in(tmp_path) == [3, 4]
