"""Names, and tensors that are tied by memory."""

from __future__ import annotations

import pytest
import torch

from commlab.errors import UsageError
from commlab.gradients.parameters import (
    buffers_by_name,
    name_parameters,
    named_parameters,
    parameters_by_name,
    require_memory_of_their_own,
    unexpanded,
)


def test_a_compiled_model_has_the_names_of_the_model() -> None:
    """B7: torch.compile() puts ``_orig_mod.`` before every name, also in the middle."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    names = [name for name, _ in model.named_parameters()]
    inner = torch.nn.Sequential(torch.compile(model[0], backend="eager"), model[1])
    for compiled in (torch.compile(model, backend="eager"), inner):
        assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
        assert [name for name, _ in parameters_by_name(compiled)] == names
        assert all("_orig_mod" not in name for name, _ in buffers_by_name(compiled))
        optimizer = torch.optim.SGD(compiled.parameters(), lr=1.0)
        assert [item.name for item in named_parameters(compiled, optimizer)] == names


def test_frozen_parameters_of_the_optimizer_are_known() -> None:
    """B7: an optimizer holds frozen parameters, of any dtype."""
    model = torch.nn.Linear(3, 2)
    model.packed = torch.nn.Parameter(torch.arange(6, dtype=torch.uint8), requires_grad=False)
    model.bias.requires_grad_(False)
    named = name_parameters(model, [[model.packed, model.weight], [model.bias]])
    assert [(item.name, item.group) for item in named.trained] == [("weight", 0)]
    assert [(item.name, item.group) for item in named.frozen] == [("bias", 1), ("packed", 0)]


def test_what_exists_of_an_expanded_tensor() -> None:
    """B7: each number once."""
    tensor = torch.arange(6.0).view(2, 1, 3).expand(2, 4, 3)
    assert torch.equal(unexpanded(tensor), torch.arange(6.0).view(2, 1, 3))
    whole = torch.arange(6.0).view(2, 3)
    assert unexpanded(whole) is whole and unexpanded(torch.tensor(1.0)).shape == ()


@pytest.mark.parametrize(
    "view, tied",
    [
        (lambda memory: memory[0], True),
        (lambda memory: memory[:, 3], True),
        (lambda memory: memory.t(), True),
        (lambda memory: memory.view(torch.uint8), True),
        (lambda memory: memory[:2, 1::2], True),
        (lambda memory: memory[2:], False),
        (lambda memory: memory[2:, 1::2], False),
    ],
)
def test_views_of_a_parameter_are_found(view: object, tied: bool) -> None:
    """A7: rows, columns, transposes, bytes; and neighbours are told apart."""
    memory = torch.arange(32.0).view(4, 8)
    model = torch.nn.Module()
    model.rows = torch.nn.Parameter(memory[:2])
    model.register_buffer("seen", view(memory))  # type: ignore[operator]
    named = name_parameters(model, [[model.rows]]).trained
    if tied:
        with pytest.raises(
            UsageError, match=r"(parameter 'rows' and buffer 'seen'|buffer 'seen' and parameter 'rows')"
        ):
            require_memory_of_their_own("a strategy", model, named)
    else:
        require_memory_of_their_own("a strategy", model, named)


def test_buffers_may_share_memory_with_each_other() -> None:
    """A7: what nobody moves stays tied."""
    model = torch.nn.Linear(3, 2)
    model.register_buffer("a", torch.zeros(3))
    model.register_buffer("b", model.a.view(3, 1))
    require_memory_of_their_own("a strategy", model, name_parameters(model, [[model.weight, model.bias]]).trained)
