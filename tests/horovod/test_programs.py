"""Programs that import horovod run unchanged; a job is launched by mpirun, torchrun, or from a function."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from jobs import environment, finish, mpirun, start

PROGRAM = """
import os
import threading
import time
import torch
import horovod, horovod.torch as hvd
from horovod.torch.mpi_ops import rank, Average
from horovod.torch.compression import Compression
from horovod.common.exceptions import HorovodInternalError
import horovod.torch.elastic
for name in ("horovod.tensorflow", "horovod.keras", "horovod.mxnet", "horovod.spark"):
    try:
        __import__(name)
    except ImportError as error:
        assert "PyTorch alone" in str(error)
    else:
        raise AssertionError(name)
hvd.init()
torch.manual_seed(hvd.rank())
model = torch.nn.Linear(8, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01 * hvd.size())
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), op=hvd.Average)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
if hvd.rank() == 0:
    hvd.start_timeline(os.environ["TIMELINE"], mark_cycles=True)
for step in range(4):
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(torch.randn(5, 8)), torch.ones(5, 4)).backward()
    optimizer.step()
if hvd.rank() == 0:
    hvd.stop_timeline()
total = hvd.allreduce(model.weight.detach().sum(), name="total", op=Average)
assert abs(total - model.weight.detach().sum()) < 1e-6
assert "commlab horovod" in [thread.name for thread in threading.enumerate()]
hvd.barrier()
used_s, since_s = time.process_time(), time.perf_counter()
time.sleep(0.5)
idle = time.process_time() - used_s < 0.1 * (time.perf_counter() - since_s)
say("ranks", hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), hvd.cross_size(), idle)
"""


def test_under_mpirun(tmp_path: Path) -> None:
    """Without a word of commlab in the program, and without shutdown(): leaving is enough. The engine's thread is
    asleep while nothing is under way."""
    pytest.importorskip("mpi4py")
    timeline = tmp_path / "timeline.json"
    command = [*mpirun(2), "-m", "commlab.horovod"]
    job = finish(start(command, PROGRAM, tmp_path, TIMELINE=str(timeline)))
    assert sorted(job.said("ranks")) == ["0 2 0 2 1 True", "1 2 1 2 1 True"]
    text = timeline.read_text()
    for word in ("NEGOTIATE_ALLREDUCE", "allreduce.weight", "CYCLE_START", "start_time_since_epoch_in_micros"):
        assert word in text


FUNCTION = """
import commlab.horovod as horovod


def train(scale, offset=0):
    import torch
    import commlab.horovod.torch as hvd

    hvd.init()
    total = hvd.allreduce(torch.tensor(float(hvd.rank() + 1)), op=hvd.Sum)
    return float(total) * scale + offset + hvd.rank()


def fails():
    raise KeyError("on purpose")


if __name__ == "__main__":
    print(horovod.run(train, (10,), {"offset": 1}, np=2))
    try:
        horovod.run(fails, np=1)
    except RuntimeError as error:
        print("raised", "rank 0" in str(error) and "on purpose" in str(error))
"""


def test_run(tmp_path: Path) -> None:
    file = tmp_path / "function.py"
    file.write_text(FUNCTION)
    ended = subprocess.run(
        [sys.executable, str(file)], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.stdout.splitlines() == ["[31.0, 32.0]", "raised True"], ended.stderr[-3000:]
