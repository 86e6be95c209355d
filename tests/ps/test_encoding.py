"""What an optimizer on a server remembers, as bytes and over messages; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import torch
from training import alone

from commlab.errors import UsageError
from commlab.ps.encoding import decode, encode
from commlab.ps.messages import STATE_BYTES, Header, Kind
from commlab.ps.store import ParameterServer

KINDS: dict[str, Any] = {
    "AdamW": torch.optim.AdamW,
    "amsgrad": lambda tensors: torch.optim.AdamW(tensors, amsgrad=True),
    "momentum": lambda tensors: torch.optim.SGD(tensors, lr=0.1, momentum=0.9),
    "plain": lambda tensors: torch.optim.SGD(tensors, lr=0.1),
    "Adagrad": torch.optim.Adagrad,
}
SHAPES = {"big": (300, 7), "number": (), "bf16": (33,), "none": (0, 4)}


def named() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return [(name, tensor.bfloat16() if name == "bf16" else tensor) for name, tensor in made.items()]


def stepped(store: ParameterServer, steps: range) -> list[torch.Tensor]:
    """The values after each of these steps, whose gradients depend on the step alone."""
    found = []
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for name, tensor in named():
            store.push(name, torch.randn(tensor.shape, generator=generator).to(tensor.dtype)).wait()
        store.step().wait()
        found += [store.pull(name, torch.empty_like(tensor)).wait() for name, tensor in named()]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_server_goes_on_where_another_was(kind: str) -> None:
    first = ParameterServer(named(), KINDS[kind], group=alone())
    values = stepped(first, range(3))[-len(SHAPES) :]
    slices = first.placement.of_server[0]
    states = [first.optimizer_state(owned).wait() for owned in slices]
    second = ParameterServer(
        [(name, value.clone()) for (name, _), value in zip(named(), values, strict=True)], KINDS[kind], group=alone()
    )
    if kind != "Adagrad":  # which has a state from the start
        assert second.optimizer_state(slices[0]).wait() == {}
    for owned, state in zip(slices, states, strict=True):
        second.set_optimizer_state(owned, state).wait()
    for mine, theirs in zip(stepped(first, range(3, 6)), stepped(second, range(3, 6)), strict=True):
        assert torch.equal(mine, theirs)
    first.close()
    second.close()


def test_what_is_no_tensor_comes_back_too() -> None:
    state = {
        "step": torch.tensor(3.0),
        "plain": torch.arange(5),
        "count": 7,
        "ratio": 0.1,
        "on": True,
        "none": None,
        "two": (1, [2]),
    }
    again = decode(encode(state))
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(again[key], value) if torch.is_tensor(value) else again[key] is value or again[key] == value
    assert decode(encode({})) == {}
    with pytest.raises(UsageError, match="cannot hold state"):
        encode({"history": {1, 2}})
    with pytest.raises(UsageError, match="the most is"):
        encode({"exp_avg": torch.zeros(STATE_BYTES // 4)})
    no_state: Any = [1, 2]
    shapeless = safetensors.torch.save({"text": torch.zeros(3, dtype=torch.bfloat16)})
    for broken in (
        torch.zeros(0, dtype=torch.uint8),
        encode(state)[:-1],
        torch.full((99,), 7, dtype=torch.uint8),
        encode(no_state),
        torch.frombuffer(bytearray(shapeless), dtype=torch.uint8),
    ):
        with pytest.raises(UsageError, match=f"{broken.numel()} B are no state of an optimizer"):
            decode(broken)


def test_what_is_not_of_this_slice_is_refused() -> None:
    store = ParameterServer(named(), torch.optim.AdamW, group=alone())
    stepped(store, range(1))
    owned = store.placement.of_server[0][0]
    kept = store.optimizer_state(owned).wait()
    for wrong in (torch.zeros(3), kept["exp_avg"].view(1, -1)):
        with pytest.raises(UsageError, match=r"'exp_avg' has shape \[.*\], and its part of 'big' \[\d+\]"):
            store.set_optimizer_state(owned, {**kept, "exp_avg": wrong}).wait()
    assert torch.equal(store.optimizer_state(owned).wait()["exp_avg"], kept["exp_avg"])
    with pytest.raises(UsageError, match=r"parts 99\.\.99 do not lie side by side"):
        store.optimizer_state(owned._replace(number=99)).wait()
    broken = torch.full((99,), 7, dtype=torch.uint8)
    header = Header(Kind.SET_STATE, owned.number, 1, wire=0)
    with pytest.raises(UsageError, match=r"99 B are no state of an optimizer"):
        store._requests.ask(0, header, (0, 2, 0), "broken", broken).wait()
    store.close()
    with pytest.raises(UsageError, match="that was closed"):
        store.optimizer_state(owned)


def test_where_updates_are_added_there_is_nothing_to_remember() -> None:
    store = ParameterServer(named(), None, group=alone())
    stepped(store, range(1))
    owned = store.placement.of_server[0][0]
    assert store.optimizer_state(owned).wait() == {}
    store.set_optimizer_state(owned, {}).wait()
    with pytest.raises(UsageError, match="no optimizer on this server"):
        store.set_optimizer_state(owned, {"step": 1}).wait()
    store.close()
