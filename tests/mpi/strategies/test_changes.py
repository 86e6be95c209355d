"""What is trained changes in mid-training, where ranks share memory and where some only serve; and what comes back."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from learners import CASES, assert_like, everything, freeze, learner, loss_of, plain, trained, unfreeze
from mpi_ranks import Ranks
from mpi_stores import closing_stores
from mpi_strategies import groups_of, ours
from mpi_windows import close_all
from torch.optim.swa_utils import AveragedModel
from training import digest

import commlab
from commlab.errors import AgreedError, UsageError
from commlab.runtime.control import gather_bytes

SERVED = ((4, 1, "bsp"), (4, 2, "bsp"), (3, 1, "bsp"), (3, 1, "asp"))
"""Ranks, servers, consistency: 3, 2, 2, 2 workers."""


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    close_all()


@ours
@pytest.mark.parametrize("case", ["unfrozen and added", "removed and added again", "another module in its place"])
def test_training_goes_on_as_in_torch(ranks: Ranks, strategy: str, case: str) -> None:
    """A2, A13, B7: in the window, whose memory is planned anew while the step's graph reads the old."""
    wanted = plain(*CASES[case])
    for group in groups_of(ranks):
        model, optimizer, engine = trained(group, strategy, case, bucket_bytes=700)
        assert len(set(gather_bytes(group, digest(model), "digest"))) == 1
        engine.close()
        assert_like((model, optimizer), wanted)


@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_what_is_saved_or_moved_is_the_model_alone(ranks: Ranks, strategy: str) -> None:
    """B8, A8: in the window, where all parameters of all ranks lie in one segment."""
    for group in groups_of(ranks):
        model = learner()
        optimizer = everything(model)
        engine = commlab.strategy(strategy, model, optimizer, group)
        sizes = []
        for state in (learner().state_dict(), model.state_dict()):
            file = io.BytesIO()
            torch.save(state, file)
            sizes.append(len(file.getvalue()))
        assert sizes[1] <= sizes[0] + 1000
        engine.backward(loss_of(model, 0, group.rank, 1))
        engine.step()
        engine.zero_grad()
        model.share_memory()
        engine.backward(loss_of(model, 1, group.rank, 1))
        with pytest.raises(UsageError, match=r"parameter '\d\.\w+' was given other memory after"):
            engine.step()
        engine.close()


@pytest.mark.parametrize("size, servers, consistency", SERVED)
@closing_stores
def test_servers_give_state_and_parameters_back(ranks: Ranks, size: int, servers: int, consistency: str) -> None:
    """A13, A2: layers are frozen and trained again meanwhile; on a rank that served, the optimizer is as at first."""
    steps = [None, freeze(0), None, freeze(0, False), None, None]
    group = ranks.group(*range(size))
    if group is None:
        return
    model = learner()
    optimizer = everything(model)
    before = [list(entry["params"]) for entry in optimizer.param_groups]
    engine = commlab.strategy(
        "ps" if servers == 1 else "dps", model, optimizer, group, servers=servers, consistency=consistency
    )
    if engine.role == "worker":
        workers = engine.group
        for number, change in enumerate(steps):
            if change is not None:
                change(model, optimizer)
            engine.backward(loss_of(model, number, workers.rank, workers.size))
            engine.step()
            engine.zero_grad()
        with pytest.raises(UsageError, match=r"optimizer\.state_dict\(\) of an optimizer that an engine"):
            optimizer.state_dict()
        engine.close()
        if consistency == "bsp":
            assert_like((model, optimizer), plain(everything, steps))
        else:
            assert all("exp_avg" in optimizer.state[parameter] for parameter in model.parameters())
        assert len(set(gather_bytes(workers, digest(model), "digest"))) == 1
        with pytest.raises(UsageError, match=r"step\(\) on an engine that was closed"):
            engine.step()
    else:
        with pytest.raises(UsageError, match=r"backward\(\) on a rank that has only served"):
            engine.backward(None, 0)
    for entry, tensors in zip(optimizer.param_groups, before, strict=True):
        assert all(a is b for a, b in zip(entry["params"], tensors, strict=True))
    # Another engine takes over, on all ranks, with what the workers have.
    if consistency == "bsp":
        again = commlab.strategy("dps", model, optimizer, group)
        assert len(set(gather_bytes(group, digest(model), "digest"))) == 1
        again.close()


@closing_stores
def test_servers_cannot_grow(ranks: Ranks) -> None:
    """A2: an error on every worker, in that step, which says the way out."""
    group = ranks.group(0, 1, 2)
    if group is None:
        return
    model = learner()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([*model[2].parameters(), *model[4].parameters()], lr=0.1)
    engine = commlab.strategy("ps", model, optimizer, group, servers=1)
    if engine.role == "worker":
        engine.backward(loss_of(model, 0, engine.group.rank, 2))
        engine.step()
        engine.zero_grad()
        unfreeze(0)(model, optimizer)
        with pytest.raises(AgreedError, match=r"'0\.weight', '0\.bias': the servers of strategy ps keep.*close\(\)"):
            engine.backward(loss_of(model, 1, engine.group.rank, 2))


@pytest.mark.parametrize("overlap_pulls", [False, True])
@closing_stores
def test_models_of_workers_are_copied_and_saved(ranks: Ranks, overlap_pulls: bool) -> None:
    """B8: deepcopy, AveragedModel and torch.save(model), whose hooks wait for servers."""
    group = ranks.group(0, 1, 2)
    if group is None:
        return
    model = learner()
    engine = commlab.strategy("ps", model, everything(model), group, servers=1, overlap_pulls=overlap_pulls)
    if engine.role == "server":
        return
    rank = engine.group.rank
    average = AveragedModel(model)
    for number in range(3):
        engine.backward(loss_of(model, number, rank, 2))
        engine.step()
        engine.zero_grad()
        engine.settle()
        average.update_parameters(model)
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert b"commlab" not in file.getvalue()
    for other in (copied, loaded):
        assert digest(other) == digest(model)
        assert torch.equal(loss_of(other, 7), loss_of(model, 7))
        assert list(other.state_dict()) == list(model.state_dict())
    assert torch.isfinite(loss_of(average.module, 7))
    engine.close(state=False)
    assert digest(copied) == digest(model)
