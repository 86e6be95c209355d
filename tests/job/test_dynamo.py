"""torch.compile around commlab: a compiled function stops before each operation, and goes on behind it; the numbers are
those of the same function uncompiled, at every call."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import Forked
from jobs import environment
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import commlab

PRELOAD = ("torch._dynamo",)  # seconds, in every rank


def compiled(function: Callable[..., Any]) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend="eager")


def collectives(rank: int, size: int) -> None:
    """The same function three times: what depends on the call (an operation's number, addresses) must not be frozen."""
    group = commlab.init("torch")

    def mixed(x: torch.Tensor) -> torch.Tensor:
        doubled = x * 2
        summed = commlab.allreduce(doubled.clone(), "sum", group=group) + 1
        handle = commlab.allreduce_async(x.clone(), "max", group=group)
        shifted = summed - 1
        most = handle.wait() + shifted
        parts = commlab.allgather(torch.zeros(size * x.numel()), most / size, group=group)
        commlab.barrier(group)
        return commlab.broadcast(parts.sin(), 1, group=group)

    traced = compiled(mixed)
    for call in range(3):
        x = torch.arange(5.0) * (call + 1) + rank
        assert torch.equal(traced(x), mixed(x)), call
    commlab.shutdown()


def engines(rank: int, size: int) -> None:
    commlab.init("torch")
    for name in ("dps", "allreduce", "ps"):
        ends = []
        for wrap in (lambda step: step, compiled):
            torch.manual_seed(3)
            model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
            engine = commlab.strategy(name, model, optimizer, max_grad_norm=1.0)

            def step(x: torch.Tensor, engine: Any = engine) -> torch.Tensor:
                loss = engine.model(x).square().sum()
                engine.backward(loss, 2)
                engine.step()
                engine.zero_grad()
                return loss.detach() * 2

            traced = wrap(step)
            losses = [traced(torch.full((2, 3), 1.0 + rank + at)) for at in range(3)]
            assert not any(entry["capturable"] for entry in optimizer.param_groups), name
            ends.append([*losses, *(parameter.detach().clone() for parameter in model.parameters())])
            engine.close()
        assert all(map(torch.equal, *ends)), (name, ends)
    commlab.shutdown()


def ddp(rank: int, size: int) -> None:
    ends = []
    for wrap in (lambda module: module, compiled):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        wrapped = wrap(DistributedDataParallel(model))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for at in range(3):
            wrapped(torch.arange(6.0).view(2, 3) * (rank + 1) + at).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([value.clone() for value in model.state_dict().values()])
    assert all(map(torch.equal, *ends)), ends

    def mixed(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        dist.all_reduce(y)
        whole = torch.empty(size * len(x))
        dist.all_gather_into_tensor(whole, y + 1)
        dist.broadcast(whole, size - 1)
        return whole.cos()

    traced = compiled(mixed)
    for call in range(3):
        x = torch.arange(5.0) * (call + 1) + rank
        assert torch.equal(traced(x), mixed(x)), call


def horovod(rank: int, size: int) -> None:
    import commlab.horovod.torch as hvd

    hvd.init()
    ends = []
    for wrap in (lambda step: step, compiled):
        torch.manual_seed(3)
        model = nn.Linear(3, 2)
        # What the user compiles is compiled, the optimizer too, and may round otherwise.
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.01), named_parameters=model.named_parameters()
        )

        def step(x: torch.Tensor, model: nn.Module = model, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            return hvd.allreduce(loss.detach(), name="loss") + 1

        traced = wrap(step)
        ends.append([traced(torch.full((2, 3), 1.0 + rank + at)) for at in range(3)])
        ends[-1] += [parameter.detach().clone() for parameter in model.parameters()]
    for found, wanted in zip(*ends, strict=True):
        torch.testing.assert_close(found, wanted)
    hvd.shutdown()


@pytest.mark.parametrize(
    ("body", "backend"), [(collectives, "gloo"), (engines, "gloo"), (ddp, "commlab"), (horovod, None)]
)
def test_what_is_compiled_gives_the_same_numbers(forked: Forked, body: Any, backend: str | None) -> None:
    forked(body, 2, backend=backend, preload=PRELOAD, limit_s=100)


AFTER = """
import torch
import torch._dynamo
assert "commlab" not in sys.modules
import commlab
from torch._dynamo.trace_rules import check_file
assert check_file(commlab.__file__.replace("__init__", "train"), True).skipped
assert not check_file(__file__ if "__file__" in dir() else "/somewhere/else.py", True).skipped
"""

BEFORE = """
import commlab
assert not any(name.startswith("torch") for name in sys.modules)
import torch
assert "torch._dynamo" not in sys.modules
from importlib.machinery import PathFinder
there = PathFinder.find_spec("torch._dynamo.trace_rules", [torch.__path__[0] + "/_dynamo"])
waiting = [finder for finder in sys.meta_path if type(finder).__name__ == "_WhenImported"]
asked = waiting[0].find_spec(there.name, [torch.__path__[0] + "/_dynamo"])
assert asked.origin == there.origin  # whoever only asks does not import
from commlab.job.dynamo import _WhenImported
assert [isinstance(finder, _WhenImported) for finder in sys.meta_path].count(True) == 1
torch.compile(lambda x: x, backend="eager")(torch.ones(1))
assert not any(isinstance(finder, _WhenImported) for finder in sys.meta_path)
import torch._dynamo.trace_rules as rules
assert rules.check_file(commlab.__file__.replace("__init__", "train"), True).skipped
assert rules.__spec__.loader.get_source(rules.__name__) and type(rules.__loader__).__name__ == "SourceFileLoader"
"""


OTHERWISE = """
import types
import warnings
sys.modules["torch._dynamo.trace_rules"] = types.ModuleType("rules")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import commlab
assert ["can't be told to leave commlab's functions alone" in str(each.message) for each in said] == [True], said
"""


@pytest.mark.parametrize(
    "program",
    [AFTER, BEFORE, OTHERWISE],
    ids=["commlab-after-the-compiler", "commlab-before", "rules-of-another-torch"],
)
def test_in_either_order(program: str) -> None:
    alone = environment(TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    command = [sys.executable, "-c", "import sys\n" + program]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
