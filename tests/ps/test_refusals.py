"""Stores of several ranks in one process: what is refused before anything is sent, and who is told of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sim_stores import groups, play, sgd
from torch.optim import SGD
from training import alone

from commlab.errors import CommlabError, UsageError
from commlab.ps.store import ParameterServer


def test_what_is_no_gradient_is_refused_before_anything_is_sent() -> None:
    """B19: arguments of push and pull."""
    store = ParameterServer([("w", torch.zeros(2, 3)), ("b", torch.zeros(3))], sgd, group=alone())
    sent = store.bytes_sent
    wrong: list[tuple[Any, str]] = [
        (np.zeros((2, 3), np.float32), "numpy.ndarray, which is no torch tensor; give a dense torch tensor"),
        ([1.0, 2.0], "builtins.list, which is no torch tensor"),
        (torch.zeros(2, 3).to_sparse(), "a sparse_coo tensor"),
        (torch.zeros(2, 3, device="meta"), "a meta tensor"),
        (torch.zeros(2, 3, dtype=torch.float64), r"a tensor of float64\[2, 3\]"),
        (torch.zeros(3, 2), r"a tensor of float32\[3, 2\]"),
    ]
    for tensor, reason in wrong:
        for call in (store.push, store.pull, lambda key, value: store.push_pull(key, value, torch.zeros(2, 3))):
            with pytest.raises(
                UsageError, match=rf"rank 0: (push|pull|push_pull) of 'w' with .*{reason.lstrip('with ')}"
            ):
                call("w", tensor)
    for key in (b"w", 3, None, ("w",), ["w"]):
        with pytest.raises(UsageError, match=r"no key .*; keys are the tensors' names, as text"):
            store.push(key, torch.zeros(2, 3))  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="as text"):
            store.push(key, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="pull of 'w' with an expanded tensor"):
        store.pull("w", torch.zeros(1, 3).expand(2, 3))
    with pytest.raises(UsageError, match=r"push_flat of 2 tensors with float32\[4\]; they have 9 numbers"):
        store.push_flat(("w", "b"), torch.zeros(4))
    with pytest.raises(UsageError, match="no key 'x'"):
        store.pull_flat(("x",), torch.zeros(4))
    assert store.bytes_sent == sent
    # What is right although it is rare.
    out = torch.zeros(3, 2).t()
    negative = torch.complex(torch.zeros(2, 3), torch.ones(2, 3)).conj().imag
    store.push("w", negative)
    store.push("b", torch.ones(1).expand(3))
    store.step()
    assert (store.pull("w", out).wait() == 0.5).all()
    with torch.inference_mode():
        made = torch.zeros(3)
    assert (store.pull("b", made).wait() == -0.5).all()
    saved = torch.ones(3, requires_grad=True)
    product = (saved * saved).sum()
    store.pull("b", saved).wait()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    store.close()
    store.close()
    for call in (store.push, store.pull):
        with pytest.raises(UsageError, match="that was closed"):
            call("b", torch.ones(3))
    for flat in (store.push_flat, store.pull_flat, store.assign_flat):
        with pytest.raises(UsageError, match="that was closed"):
            flat(("b",), torch.ones(3))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lr": float("nan")}, r"'lr' of the optimizer's group 0 is nan"),
        ({"lr": torch.tensor(float("nan"))}, r"'lr' of the optimizer's group 0 is nan"),
        ({"lr": float("inf")}, r"'lr' of the optimizer's group 0 is inf"),
        ({"momentum": float("nan")}, r"'momentum' of the optimizer's group 0 is nan"),
        ({"hook": object()}, r"'hook' of the optimizer's group 0 is a object, which can't be sent"),
        ({"lr": torch.ones(2)}, r"'lr' of the optimizer's group 0 is a Tensor"),
    ],
)
def test_hyper_parameters_that_can_not_be(change: dict[str, Any], reason: str) -> None:
    """B19: lr = NaN, and a group entry that is no JSON."""
    store = ParameterServer([("w", torch.zeros(3))], sgd, group=alone())
    assert store.optimizer is not None
    sent, good = store.bytes_sent, dict(store.optimizer.param_groups[0])
    store.optimizer.param_groups[0].update(change)
    with pytest.raises(UsageError, match=rf"rank 0: push at clock 0: {reason}"):
        store.push("w", torch.ones(3))
    assert store.bytes_sent == sent
    store.optimizer.param_groups[0].clear()
    store.optimizer.param_groups[0].update(good)
    store.push("w", torch.ones(3)).wait()
    store.step()
    store.optimizer.add_param_group({"params": [torch.zeros(1)]})
    with pytest.raises(UsageError, match="has 2 groups, and the parameter server was built with 1"):
        store.push("w", torch.ones(3))
    store.grad_scale = float("nan")
    with pytest.raises(UsageError, match="grad_scale is nan"):
        store.push("w", torch.ones(3))
    store.close()


@pytest.mark.parametrize(
    ("arguments", "options", "reason"),
    [
        (([("w", np.zeros(3))],), {}, r"the pair \('w', a ndarray\); give text and a tensor"),
        (([(3, torch.zeros(3))],), {}, r"the pair \(3, a Tensor\)"),
        (([torch.zeros(3)],), {}, r"named_params has Tensor"),
        (([("w", torch.zeros(3).to_sparse())],), {}, "'w' has no plain memory"),
        (([("w", torch.zeros(3, dtype=torch.int8))],), {}, "'w' is torch.int8"),
        (([("w", torch.zeros(3)), ("w", torch.ones(3))],), {}, "two tensors are named 'w'"),
        (([("w", torch.zeros(3))], 7), {}, "optimizer is a int; give a factory"),
        (([("w", torch.zeros(3))], lambda params: None), {}, "factory returned a NoneType"),
        (([("w", torch.zeros(3))], lambda params: SGD([torch.zeros(3)], lr=0.1)), {}, "made SGD of other tensors"),
        (([("w", torch.zeros(3))], lambda params: SGD([*params, torch.zeros(3)], lr=0.1)), {}, "of other tensors"),
        (
            ([("w", torch.zeros(3))], lambda params: 1 / 0),
            {},
            "rank 0: .* factory raised ZeroDivisionError",
        ),
        (([("w", torch.zeros(3))],), {"max_grad_norm": float("nan")}, "max_grad_norm is nan; give a number above 0"),
        (([("w", torch.zeros(3))],), {"max_grad_norm": -1}, "max_grad_norm is -1"),
        (([("w", torch.zeros(3))],), {"consistency": float("nan")}, "unknown consistency nan"),
        (([("w", torch.zeros(3))],), {"consistency": None}, "unknown consistency None"),
        (([("w", torch.zeros(3))],), {"servers": 1.0}, "servers is 1.0"),
        (([("w", torch.zeros(3))],), {"groups": {"w": "first"}}, "the group of 'w' is 'first'"),
    ],
)
def test_arguments_of_a_store_that_can_not_be(arguments: Any, options: dict[str, Any], reason: str) -> None:
    """B19: one clear UsageError each."""
    with pytest.raises(UsageError, match=reason):
        ParameterServer(*arguments, group=alone(), **options)


def test_what_one_rank_refuses_is_told_to_all() -> None:
    """B19: nobody waits for a rank whose arguments were refused, or whose factory raised, be it the server's alone."""

    def on_rank(rank: int, factory: Any, values: Any) -> str:
        with pytest.raises(UsageError) as caught:
            ParameterServer(values, factory, group=everyone[rank])
        return str(caught.value)

    from crew import Crew

    crew = Crew(3)
    everyone = groups(3)
    good = [("w", torch.zeros(3))]
    texts = crew.all(lambda rank: on_rank(rank, sgd, [(7, torch.zeros(3))] if rank == 1 else good))
    assert all("the pair (7, a Tensor)" in text and "(on ranks 1 of 3)" in text for text in texts), texts

    def breaks(params: Any) -> torch.optim.Optimizer:
        if params[0].numel() == 3:
            raise KeyError("no such layer")
        return sgd(params)

    texts = crew.all(lambda rank: on_rank(rank, breaks, good))
    assert all("server 0 (rank 2): the optimizer's factory raised KeyError: 'no such layer'" in text for text in texts)
    crew.close()


def test_workers_are_told_what_a_server_raises() -> None:
    """B19: an optimizer that raises on the server alone, in mid-training."""
    told: list[str] = []

    class Breaks(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if self.param_groups[0]["lr"] == 0.25:
                raise ValueError("no such learning rate")
            return super().step(closure)

    def script(store: ParameterServer, worker: int) -> None:
        assert store.optimizer is not None
        out = torch.empty(3)
        for step in range(3):
            if step == 2:
                store.optimizer.param_groups[0]["lr"] = 0.25
            try:
                store.push_pull("w", torch.ones(3), out).wait()
                store.step()
            except CommlabError as error:
                told.append(str(error))
                assert step == 2
        with pytest.raises(CommlabError, match="has failed"):
            store.push("w", torch.ones(3))

    with pytest.raises(ValueError, match="no such learning rate"):
        play(3, script, [("w", torch.zeros(3))], lambda params: Breaks(params, lr=0.5), elementwise=True)
    wanted = "server 0 (server rank 2) has failed: ValueError: no such learning rate; this store can't be used any more"
    assert len(told) == 2 and all(wanted in text for text in told), told


def test_a_refused_push_that_nobody_waited_for_is_not_forgotten() -> None:
    """A gradient that was refused is told to who calls the step after."""
    store = ParameterServer([("w", torch.zeros(3))], None, group=alone())
    store.push("w", torch.ones(3))
    twice = store.push("w", torch.ones(3))
    store.step()
    while not twice.done():
        pass
    with pytest.raises(UsageError, match=r"push of 'w' at clock 0 was refused by server 0: .*twice in clock 0"):
        store.step()
    store.step()
    store.close()
