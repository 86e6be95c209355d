"""Parameters in flat buffers: each owns its storage, and none may be moved or tied behind the engine's back."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing  # teaches ForkingPickler to share tensors
from learners import learner, loss_of
from training import alone

import commlab
from commlab.errors import UsageError
from commlab.gradients.bucket import own_storage

MOVING = ("ps", "dps")


def coupled(strategy: str, model: torch.nn.Module) -> commlab.strategies.engine.Engine:
    return commlab.strategy(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1), alone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_view_that_owns_its_storage_is_the_same_memory(dtype: torch.dtype) -> None:
    """B8: writes go both ways, and nothing before or behind belongs to it."""
    flat = torch.arange(100).to(dtype)
    view = own_storage(flat[13:29])
    assert view.data_ptr() == flat[13:].data_ptr() and view.untyped_storage().nbytes() == 16 * dtype.itemsize
    view[3] = 77
    flat[14] = 99
    assert flat[16] == 77 and view[1] == 99
    flat_again = flat
    del flat
    assert view[1] == 99 and flat_again[14] == 99
    assert own_storage(flat_again[5:5]).shape == (0,)


@pytest.mark.parametrize("strategy", MOVING)
def test_what_is_saved_is_no_more_than_the_model(strategy: str) -> None:
    """B8: torch.save() writes whole storages."""
    model = learner()
    plain = io.BytesIO()
    torch.save(model.state_dict(), plain)
    engine = coupled(strategy, model)
    for state in (model.state_dict(), copy.deepcopy(model).state_dict()):
        found = io.BytesIO()
        torch.save(state, found)
        assert len(found.getvalue()) <= len(plain.getvalue()) + 1000
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    again = torch.load(whole, weights_only=False)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    engine.backward(loss_of(model, 0))
    engine.step()
    assert all(not torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_a_saved_gradient_is_no_more_than_itself() -> None:
    """B8: under allreduce a gradient lies in a bucket."""
    model = learner()
    engine = coupled("allreduce", model)
    engine.backward(loss_of(model, 0))
    engine.step()
    gradient = model[4].bias.grad
    assert gradient is not None
    assert gradient.untyped_storage().nbytes() == gradient.numel() * gradient.element_size()


@pytest.mark.parametrize("strategy", MOVING)
@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.share_memory(),
        lambda model: model.half().double(),
        lambda model: model[2].weight.share_memory_(),
        lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
        lambda model: setattr(model[2].weight, "data", model[2].weight.data.clone()),
        lambda model: model._apply(lambda tensor: tensor.clone()),
        ForkingPickler.dumps,
    ],
    ids=["share_memory", "half", "one shared", "assign", "data", "apply", "sent to a process"],
)
def test_a_parameter_that_was_moved_is_named_at_that_step(
    strategy: str, move: Callable[[torch.nn.Sequential], object]
) -> None:
    """A8: torch swaps storages in place, so that tensors to compare with would move as well."""
    model = learner()
    engine = coupled(strategy, model)
    engine.backward(loss_of(model, 0))
    engine.step()
    move(model)
    with pytest.raises(UsageError, match=r"'[024]\.(weight|bias)'"):
        engine.backward(loss_of(model, 1))
        engine.step()


@pytest.mark.parametrize("strategy", ["allreduce", *MOVING])
def test_a_parameter_that_is_replaced_is_named(strategy: str) -> None:
    """A8: by setattr, before backward and between backward and step."""
    model = learner()
    engine = coupled(strategy, model)
    model[2].weight = torch.nn.Parameter(model[2].weight.detach().clone())
    with pytest.raises(UsageError, match=r"'2\.weight' is trainable, but the optimizer does not have it"):
        engine.backward(loss_of(model, 0))
    if strategy in MOVING:
        model = learner()
        engine = coupled(strategy, model)
        engine.backward(loss_of(model, 0))
        model[2] = torch.nn.Linear(33, 17)
        with pytest.raises(UsageError, match=r"parameter '2\.\w+' was given other memory after commlab\.strategy\(\)"):
            engine.step()


@pytest.mark.parametrize("strategy", ["allreduce", *MOVING])
def test_torch_cannot_swap_a_trained_parameter_for_another_tensor(strategy: str) -> None:
    """A8: torch.utils.swap_tensors() would leave it without our hooks, and nobody would send its gradient."""
    model = learner()
    engine = coupled(strategy, model)
    other = torch.nn.Parameter(model[2].weight.detach().clone())
    with pytest.raises(RuntimeError, match="Cannot swap"):
        torch.utils.swap_tensors(model[2].weight, other)
    engine.backward(loss_of(model, 0))
    engine.step()
    engine.close()
    torch.utils.swap_tensors(model[2].weight, other)


def tied_by_data(model: torch.nn.Sequential) -> None:
    model[1] = torch.nn.Linear(33, 33)
    model.twin = torch.nn.Linear(7, 33).double()
    model.twin.weight.data = model[0].weight.data


def transposed(model: torch.nn.Sequential) -> None:
    model.twin = torch.nn.Parameter(model[0].weight.t())


def viewed_by_a_buffer(model: torch.nn.Sequential) -> None:
    model.register_buffer("first_row", model[0].weight.data[0])


def overlapping(model: torch.nn.Sequential) -> None:
    memory = torch.arange(20.0)
    model.a, model.b = torch.nn.Parameter(memory[:12]), torch.nn.Parameter(memory[11:])


@pytest.mark.parametrize("strategy", MOVING)
@pytest.mark.parametrize(
    "tie, names",
    [
        (tied_by_data, r"parameter '(0|twin)\.weight' and parameter '(0|twin)\.weight'"),
        (transposed, r"parameter '(twin|0\.weight)' and parameter '(twin|0\.weight)'"),
        (viewed_by_a_buffer, r"'0\.weight' and buffer 'first_row'|'first_row' and parameter '0\.weight'"),
        (overlapping, r"parameter 'a' and parameter 'b'"),
    ],
)
def test_parameters_that_are_tied_by_memory_alone_are_refused(
    strategy: str, tie: Callable[[torch.nn.Sequential], None], names: str
) -> None:
    """A7: moved into flat buffers they would be tied no more. Nothing is moved before."""
    model = learner()
    tie(model)
    before = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(UsageError, match=rf"({names}).* share memory.*strategy {strategy}"):
        coupled(strategy, model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


@pytest.mark.parametrize("strategy", ["single", "allreduce"])
def test_what_is_tied_by_memory_stays_tied_where_nothing_moves(strategy: str) -> None:
    """A7: both gradients are applied to the one memory, as torch does."""

    def build() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).double()
        for at, parameter in enumerate(model.parameters()):
            parameter.data = (torch.arange(parameter.numel(), dtype=torch.float64) + at).sin().view(parameter.shape)
        model[1].weight.data = model[0].weight.data
        return model

    def loss(model: torch.nn.Module) -> torch.Tensor:
        result: torch.Tensor = model(torch.ones(2, 4, dtype=torch.float64)).square().sum()
        return result

    mine, plain = build(), build()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    engine = coupled(strategy, mine)
    for _ in range(3):
        optimizer.zero_grad()
        loss(plain).backward()
        optimizer.step()
        engine.backward(loss(mine))
        engine.step()
        engine.zero_grad()
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(mine.parameters(), plain.parameters(), strict=True))


def test_neighbours_in_one_memory_are_not_tied() -> None:
    """A7: slices and interleaved columns of one tensor share no number; an LSTM's flat weights do not."""
    memory = torch.arange(40.0).view(5, 8)
    model = torch.nn.Module()
    model.a, model.b = torch.nn.Parameter(memory[:, ::2]), torch.nn.Parameter(memory[:, 1::2])
    model.c, model.d = (torch.nn.Parameter(part) for part in torch.arange(10.0).split(5))
    for strategy in MOVING:
        coupled(strategy, model).close()


@pytest.mark.parametrize("strategy", ["single", "allreduce", *MOVING])
def test_an_expanded_parameter_is_refused(strategy: str) -> None:
    """B7: several of its numbers are one in memory, which no optimizer can write."""
    model = torch.nn.Module()
    model.wide = torch.nn.Parameter(torch.ones(3, 1).expand(3, 5))
    with pytest.raises(UsageError, match=r"'wide' is expanded: 15 numbers of shape \[3, 5\] lie in the memory of 3"):
        coupled(strategy, model)


@pytest.mark.parametrize("strategy", ["single", "allreduce", *MOVING])
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_what_is_on_the_meta_device_is_refused(strategy: str, kind: str) -> None:
    """B7: it has no numbers that rank 0 could give."""
    model = learner()
    nowhere = torch.zeros(3, device="meta")
    if kind == "buffer":
        model.register_buffer("nowhere", nowhere)
    else:
        model.nowhere = torch.nn.Parameter(nowhere, requires_grad=False)
    with pytest.raises(UsageError, match=rf"{kind} 'nowhere' of shape \[3\] is on the meta device"):
        coupled(strategy, model)


@pytest.mark.parametrize("strategy", ["single", "allreduce", *MOVING])
def test_a_lazy_module_is_refused_until_it_has_numbers(strategy: str) -> None:
    """B7: its parameters have no shape before the first forward pass."""
    model = torch.nn.Sequential(torch.nn.LazyLinear(3))
    with pytest.raises(UsageError, match=r"parameter '0\.weight' is of a lazy module"):
        coupled(strategy, model)
    model(torch.ones(1, 2))
    coupled(strategy, model).close()
