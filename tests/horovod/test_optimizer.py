"""DistributedOptimizer, broadcasts of state, SyncBatchNorm, elastic state: what a training program of Horovod's does,
against the same numbers by hand. The original's known defects are each a test."""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import commlab.horovod.torch as hvd


class Net(nn.Module):
    """``last`` is used by nobody, ``odd`` by odd ranks alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)
        self.odd, self.last = nn.Linear(5, 3), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, odd: bool = False) -> torch.Tensor:
        hidden = self.first(x).tanh()
        found: torch.Tensor = self.second(hidden) + (self.odd(hidden) if odd else 0)
        return found


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def batch(rank: int, step: int, rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1000 * step + rank))


def by_hand(size: int, steps: int, passes: int = 1, sum_of: bool = False) -> Net:
    """One process that does what all ranks do together."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(size):
            for turn in range(passes):
                loss = model(batch(rank, step * passes + turn), odd=bool(rank % 2)).square().mean()
                (loss / (1 if sum_of else size)).backward()
        optimizer.step()
    return model


def close(model: nn.Module, reference: nn.Module, rtol: float = 1e-4) -> None:
    atol = 1e-6 if rtol < 1e-3 else 1e-2
    for own, want in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own, want, rtol=rtol, atol=atol)


def trains(rank: int, size: int) -> bool:
    hvd.init()
    kinds: tuple[tuple[dict[str, Any], float], ...] = (
        ({}, 1e-4),
        ({"num_groups": 2}, 1e-4),
        ({"gradient_predivide_factor": 2.0}, 1e-4),
        ({"compression": hvd.Compression.fp16}, 0.05),
        ({"compression": hvd.Compression.bf16}, 0.05),
        ({"op": hvd.Sum}, 1e-4),
        ({"backward_passes_per_step": 3}, 1e-4),
    )
    for options, rtol in kinds:
        passes = options.get("backward_passes_per_step", 1)
        model = net(seed=rank)
        hvd.broadcast_parameters(net().state_dict(), 0)
        model.load_state_dict(net().state_dict()) if rank == 0 else None
        hvd.broadcast_parameters(model.named_parameters(), 0)
        plain = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            optimizer = hvd.DistributedOptimizer(plain, named_parameters=model.named_parameters(), **options)
        assert isinstance(optimizer, torch.optim.SGD) and type(optimizer).__name__ == "SGD"
        for step in range(3):
            optimizer.zero_grad(set_to_none=bool(step % 2))
            for turn in range(passes):
                model(batch(rank, step * passes + turn), odd=bool(rank % 2)).square().mean().backward()
            if step == 1:
                optimizer.synchronize()
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                optimizer.step()
        if "num_groups" not in options:
            assert model.last.weight.grad is None, "no rank has computed it"
            close(model, by_hand(size, 3, passes, "op" in options), rtol)
        gathered = hvd.allgather_object([p.tolist() for p in model.parameters()])
        assert all(each == gathered[0] for each in gathered), options
    hvd.shutdown()
    return True


@pytest.mark.parametrize("size", [2, 3])
def test_training(forked: Callable[..., list[Any]], size: int) -> None:
    """The averaged gradient, with parameters that some ranks or none use; known defect of the original:
    zero_grad(set_to_none=True)."""
    assert all(forked(trains, size))


def steps_by_closure(rank: int, size: int) -> bool:
    hvd.init()
    model = net()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model.named_parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(batch(rank, 0)).square().mean()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) > 0
    found = hvd.allgather_object(model.first.weight.tolist())
    assert found[0] == found[1]
    # Misuse is said, and harms nothing.
    model(batch(rank, 1)).sum().backward()
    with pytest.raises(AssertionError, match="zero_grad"):
        optimizer.zero_grad()
    with pytest.raises(AssertionError, match="backward_passes_per_step=1"):
        model(batch(rank, 1)).sum().backward()
    optimizer.synchronize()
    with pytest.warns(UserWarning, match="skip_synchronize"):
        optimizer.step()
    with pytest.raises(ValueError, match="not named"):
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), [("first", model.first.weight)])
    # Ranks that end an epoch in the middle of an accumulation: two passes of three here, one there.
    optimizer.set_backward_passes_per_step(3)
    optimizer.zero_grad()
    for turn in range(rank + 1):
        model(batch(rank, turn)).square().mean().backward()
    own = hvd.allgather(model.first.weight.grad.reshape(1, -1).clone())
    optimizer.step()
    torch.testing.assert_close(model.first.weight.grad.reshape(-1), own.mean(0))
    # Sparse gradients, also where a rank has none this time.
    embedding = nn.Embedding(10, 3, sparse=True)
    hvd.broadcast_parameters(embedding.state_dict(), 0)
    for dense in (False, True):
        sparse = hvd.DistributedOptimizer(torch.optim.SGD(embedding.parameters(), 0.5), sparse_as_dense=dense)
        before = embedding.weight.detach().clone()
        embedding(torch.tensor([rank, 2, 2])).sum().backward()
        sparse.step()
        changed = (before - embedding.weight).detach()[:, 0]
        torch.testing.assert_close(changed[:4], torch.tensor([0.25, 0.25, 1.0, 0.0]))
        sparse.zero_grad()
    sparse = hvd.DistributedOptimizer(torch.optim.SGD(embedding.parameters(), 0.5))
    before = embedding.weight.detach().clone()
    if rank == 0:
        embedding(torch.tensor([5])).sum().backward()
    sparse.step()
    torch.testing.assert_close((before - embedding.weight).detach()[4:7, 0], torch.tensor([0.0, 0.25, 0.0]))
    hvd.shutdown()
    return True


def test_closures_misuse_ragged_ends_sparse(forked: Callable[..., list[Any]]) -> None:
    """Known defect of the original: ragged ends of backward_passes_per_step."""
    assert all(forked(steps_by_closure))


def is_pickled(rank: int, size: int) -> bool:
    hvd.init()
    model = net()
    optimizer = hvd.DistributedOptimizer(torch.optim.Adam(model.parameters(), 0.01), model.named_parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model(batch(rank, 0)).sum().backward()
    optimizer.step()
    scheduler.step()
    for made in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert made.param_groups[0]["lr"] == 0.005 and type(made) is type(optimizer)
        own = [p for group in made.param_groups for p in group["params"]]
        for p in own:
            p.grad = torch.full_like(p, float(rank))
        made.synchronize()
        assert all(p.grad is not None and (p.grad == 0.5).all() for p in own), "it averages its own parameters"
    hvd.shutdown()
    return True


def test_pickled(forked: Callable[..., list[Any]]) -> None:
    """Known defect of the original: a wrapped optimizer can't be pickled."""
    assert all(forked(is_pickled))


def state_travels(rank: int, size: int) -> list[str]:
    hvd.init()
    done = []
    kinds = [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Adafactor, torch.optim.LBFGS,
             torch.optim.SparseAdam, torch.optim.ASGD, torch.optim.Rprop]  # fmt: skip
    for kind in kinds:
        model = nn.Linear(4, 3)
        optimizer: Any = kind(model.parameters(), lr=0.1 * (rank + 1))
        if rank == 0 and kind is not torch.optim.SparseAdam:

            def closure(model: nn.Linear = model, optimizer: Any = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss: torch.Tensor = model(torch.ones(2, 4)).square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)
        hvd.broadcast_optimizer_state(optimizer, 0)
        assert optimizer.param_groups[0]["lr"] == 0.1
        texts = hvd.allgather_object(repr(sorted(optimizer.state_dict()["state"].items())))
        assert texts[0] == texts[1], kind
        done.append(kind.__name__)
    hvd.shutdown()
    return done


def test_broadcast_optimizer_state(forked: Callable[..., list[Any]]) -> None:
    """For any optimizer, also where only the root has a state."""
    assert len(forked(state_travels)[0]) == 8


def deltas(rank: int, size: int) -> bool:
    hvd.init()
    model = net()
    start = copy.deepcopy(model)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), model.named_parameters(), op=hvd.Adasum
    )
    model(batch(rank, 0)).square().mean().backward()
    optimizer.step()
    own = copy.deepcopy(start)
    plain = torch.optim.SGD(own.parameters(), 0.1)
    own(batch(rank, 0)).square().mean().backward()
    plain.step()
    delta = (own.first.weight - start.first.weight).detach().reshape(-1).double()
    a, b = hvd.allgather(delta[None])
    dot = a.dot(b)
    want = start.first.weight.reshape(-1) + (1 - dot / (2 * a.dot(a))) * a + (1 - dot / (2 * b.dot(b))) * b
    torch.testing.assert_close(model.first.weight.reshape(-1).double(), want, rtol=1e-5, atol=1e-6)
    hvd.shutdown()
    return True


def test_adasum_optimizer(forked: Callable[..., list[Any]]) -> None:
    assert all(forked(deltas))


def normalizes(rank: int, size: int) -> bool:
    hvd.init()
    for shape in ((3,), (3, 4), (3, 2, 2)):
        inputs = [torch.randn(peer + 2, *shape, generator=torch.Generator().manual_seed(peer)) for peer in range(size)]
        whole, plain, sync = torch.cat(inputs).requires_grad_(), nn.BatchNorm2d(3), hvd.SyncBatchNorm(3)
        plain._check_input_dim = lambda x: None  # type: ignore[method-assign]
        own = inputs[rank].clone().requires_grad_()
        weights = torch.arange(whole.numel(), dtype=torch.float32).view(whole.shape).sin()
        first = sum(peer + 2 for peer in range(rank))
        mine = slice(first, first + rank + 2)
        want, found = plain(whole), sync(own)
        (want * weights).sum().backward()
        (found * weights[mine]).sum().backward()
        torch.testing.assert_close(found, want[mine])
        assert own.grad is not None and whole.grad is not None
        torch.testing.assert_close(own.grad, whole.grad[mine], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sync.running_var, plain.running_var)
        summed = hvd.allreduce(sync.weight.grad, op=hvd.Sum)
        torch.testing.assert_close(summed, plain.weight.grad, rtol=1e-4, atol=1e-5)
    hvd.shutdown()
    return True


def test_sync_batch_norm(forked: Callable[..., list[Any]]) -> None:
    """On CPUs, with batches that differ in size."""
    assert all(forked(normalizes))


def goes_on(rank: int, size: int, folder: str) -> list[Any]:
    model = net(seed=rank)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, epoch=0, seen=[])
    resets: list[int] = []
    state.register_reset_callbacks([lambda: resets.append(state.epoch)])

    @hvd.elastic.run
    def train(state: Any) -> int:
        while state.epoch < 4:
            for p in model.parameters():
                p.grad = hvd.allreduce(torch.full_like(p, float(rank)))
            optimizer.step()
            state.epoch += 1
            if state.epoch == 3 and not resets:
                hvd.allreduce(torch.ones(1 + rank), name="they differ")
            state.seen.append(state.epoch)
            state.commit()
        return int(state.epoch)

    assert train(state) == 4
    found = hvd.allgather_object(model.first.bias.tolist())
    assert all(each == found[0] for each in found)
    hvd.shutdown()
    return [state.seen, resets, found[0]]


def test_elastic(forked: Callable[..., list[Any]]) -> None:
    """An error that all ranks live through costs what came after the last commit; a restarted job, with another number
    of ranks, goes on from the newest commit in the folder."""
    with tempfile.TemporaryDirectory() as folder:
        environ = {"COMMLAB_ELASTIC_DIR": folder}
        first = forked(goes_on, 2, environ=environ, arguments=(folder,))
        assert [each[:2] for each in first] == [[[1, 2, 3, 4], [2]]] * 2
        assert len(list(Path(folder).glob("step-*"))) == 2
        again = forked(goes_on, 3, environ=environ, arguments=(folder,))
        assert [each[0] for each in again] == [[1, 2, 3, 4]] * 3 and again[0][2] == first[0][2]


def commits(rank: int, size: int, upto: int, renamed: bool) -> list[Any]:
    """Plain values alone; each rank's, and what a rank raises."""
    state = hvd.elastic.ObjectState(**{"steps" if renamed else "epoch": 0})

    @hvd.elastic.run
    def train(state: Any) -> int:
        begun = int(state.epoch)
        for state.epoch in range(begun + 1, upto + 1):
            state.commit()
        return begun

    found: list[Any] = []
    try:
        found.append(train(state))
    except Exception as error:
        found.append(str(error))
    hvd.shutdown()
    return found


def test_commits_of_damaged_folders(forked: Callable[..., list[Any]]) -> None:
    """Where all commits are damaged, the new ones, whose numbers are lower, stay all the same; plain values are
    committed, too; a commit of other members is refused."""
    with tempfile.TemporaryDirectory() as folder:
        environ = {"COMMLAB_ELASTIC_DIR": folder}
        assert forked(commits, 1, environ=environ, arguments=(6, False)) == [[0]]
        for manifest in Path(folder).glob("step-*/manifest.json"):
            manifest.write_text(manifest.read_text() + " ")
        assert forked(commits, 1, environ=environ, arguments=(3, False)) == [[0]]
        assert sorted(path.name[-1] for path in Path(folder).glob("step-*")) == ["2", "3"]
        assert forked(commits, 1, environ=environ, arguments=(5, False)) == [[3]]
        ((words,),) = forked(commits, 1, environ=environ, arguments=(5, True))
        assert "has epoch, and this program's state has steps; give the state what was committed" in words
