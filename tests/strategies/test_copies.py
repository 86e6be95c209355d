"""What every rank has a copy of: given from rank 0 at the start, whatever its dtype, and compared from then on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from coupled import SIZE, batch, build, couple, errors_of, every_strategy, make_step, model_of, two_groups, values
from crew import Crew, by_turns, groups

from commlab.errors import DisagreementError, UsageError
from commlab.runtime.raw import bytes_of, fingerprint, from_bytes, layout_of, meaning_of, write_bytes
from commlab.strategies.engine import Engine


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew(SIZE)
    yield made
    made.close()


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    found = [*model.named_parameters(), *model.named_buffers()]
    return {name: bytes_of(tensor).numpy().tobytes() for name, tensor in found}


def assert_alike(found: list[Any]) -> None:
    assert all(each == found[0] for each in found)


# Every dtype, as bytes.

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name)),
]


def of_dtype(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """15 numbers of any bits (of bool: 0 and 1), as 3 x 5."""
    width = torch.empty(0, dtype=dtype).element_size()
    raw = torch.arange(15 * width).add(seed).mul(37).remainder(251).to(torch.uint8)
    return (raw % 2 if dtype is torch.bool else raw).view(dtype).view(3, 5)


def quantized(seed: int) -> list[torch.Tensor]:
    numbers = torch.arange(15.0).add(seed).sin().view(3, 5)
    return [
        torch.quantize_per_tensor(numbers, 0.05, 3, torch.qint8),
        torch.quantize_per_channel(numbers, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2]), 0, torch.quint8),
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_every_dtype_come_back(dtype: torch.dtype) -> None:
    """A6: buffers of every dtype; however they lie."""
    wanted, other = of_dtype(dtype, 0), of_dtype(dtype, 1)
    assert fingerprint(wanted) != fingerprint(other) and layout_of(wanted) == layout_of(other)
    write_bytes(other, bytes_of(wanted))
    assert torch.equal(bytes_of(other), bytes_of(wanted))
    again = from_bytes(bytes_of(wanted), meaning_of(wanted))
    assert again.dtype == dtype and torch.equal(bytes_of(again), bytes_of(wanted))
    turned = of_dtype(dtype, 2).t()
    write_bytes(turned, bytes_of(wanted.t().contiguous()))
    assert torch.equal(bytes_of(turned.t().contiguous()), bytes_of(wanted))
    expanded = of_dtype(dtype, 3)[:, :1].expand(3, 5)
    write_bytes(expanded, bytes_of(wanted[:, :1].expand(3, 5)))
    assert torch.equal(bytes_of(expanded), bytes_of(wanted[:, :1].expand(3, 5)))
    scalar = of_dtype(dtype, 4)[0, 0]
    write_bytes(scalar, bytes_of(wanted[1, 1]))
    assert torch.equal(bytes_of(scalar), bytes_of(wanted[1, 1]))


@pytest.mark.filterwarnings("ignore")
def test_bytes_of_quantized_tensors_come_back() -> None:
    """A6: quantized buffers."""
    for wanted, other in zip(quantized(0), quantized(9), strict=True):
        assert layout_of(wanted) == layout_of(other) and not torch.equal(wanted.int_repr(), other.int_repr())
        write_bytes(other, bytes_of(wanted))
        assert torch.equal(wanted.int_repr(), other.int_repr())
        again = from_bytes(bytes_of(wanted), meaning_of(wanted))
        assert torch.equal(again.dequantize(), wanted.dequantize()) and layout_of(again) == layout_of(wanted)
    assert layout_of(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)) != layout_of(
        torch.quantize_per_tensor(torch.ones(2), 0.2, 0, torch.qint8)
    )


def test_a_fingerprint_sees_one_bit_anywhere() -> None:
    """A4: sizes around those of words, rows and of what is small; numbers that change places."""
    for numel in (1, 7, 8, 9, 65535, 65536, 65537, 2**17 + 5):
        numbers = torch.arange(numel).mul(131).remainder(256).to(torch.uint8)
        mark = fingerprint(numbers)
        for at in {0, numel // 3, numel - 1}:
            numbers[at] ^= 16
            assert fingerprint(numbers) != mark
            numbers[at] ^= 16
        assert fingerprint(numbers) == mark == fingerprint(numbers.clone())
        if numel > 100:
            for far in (1, 8, 16384, numel // 2):
                swapped = numbers.clone()
                swapped[[0, min(far, numel - 1)]] = numbers[[min(far, numel - 1), 0]]
                assert torch.equal(swapped, numbers) or fingerprint(swapped) != mark


class Everything(torch.nn.Module):
    """Buffers of every dtype, other numbers for every seed; some of them not contiguous, and one not saved."""

    def __init__(self, seed: int):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.frozen = torch.nn.Parameter(torch.full((3,), float(seed)), requires_grad=False)
        for at, dtype in enumerate(DTYPES):
            self.register_buffer(f"b{at}", of_dtype(dtype, seed))
        for at, tensor in enumerate(quantized(seed)):
            self.register_buffer(f"q{at}", tensor)
        self.register_buffer("turned", torch.arange(6.0).add(seed).view(2, 3).t())
        self.register_buffer("masked", torch.arange(4.0).add(seed), persistent=False)
        self.register_buffer("nothing", torch.empty(0, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(x)
        return found


@pytest.mark.filterwarnings("ignore")
@every_strategy
def test_every_rank_starts_with_rank_0s_buffers(crew: Crew, strategy: str) -> None:
    """A6: buffers of every dtype are given; A4: a parameter that is frozen too."""
    ranks = groups(SIZE)

    def one(rank: int) -> dict[str, bytes]:
        with by_turns:
            model = Everything(rank)
        engine = couple(strategy, model, torch.optim.SGD(model.layer.parameters(), lr=0.1), ranks[rank])
        make_step(engine, rank, 0)
        engine.settle()
        return bits(model)

    found = crew.all(one)
    assert_alike(found)
    first = bits(Everything(0))
    assert all(found[0][name] == first[name] for name in first if not name.startswith("layer"))


def test_a_sparse_buffer_is_refused_by_name(crew: Crew) -> None:
    """A6: what cannot be given is named, on every rank."""
    ranks = groups(SIZE)

    def one(rank: int) -> None:
        model = torch.nn.Linear(2, 2)
        model.register_buffer("graph", torch.eye(2).to_sparse() if rank == 1 else torch.eye(2))
        with pytest.raises(UsageError, match=r"'graph' is a sparse_coo tensor.*on ranks 1 of 3"):
            couple("allreduce", model, torch.optim.SGD(model.parameters(), lr=0.1), ranks[rank])

    crew.all(one)


# Batch norm: what forward writes.


class Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.eye(4, dtype=torch.bool))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.norm(self.layer(x))
        return found


def normed(crew: Crew, strategy: str, **options: Any) -> list[Engine]:
    ranks = groups(SIZE)

    def one(rank: int) -> Engine:
        model = Normed()
        with torch.no_grad():
            model.layer.weight.copy_(torch.arange(12.0).sin().view(4, 3))
            model.layer.bias.fill_(0.25)
        return couple(strategy, model, torch.optim.SGD(model.parameters(), lr=0.0), ranks[rank], **options)

    return crew.all(one)


def statistics(engine: Engine) -> tuple[torch.Tensor, torch.Tensor, int]:
    norm = engine.model.norm
    return norm.running_mean.clone(), norm.running_var.clone(), int(norm.num_batches_tracked)


def alone(rank: int, steps: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The statistics of a rank that nobody tells anything."""
    model = Normed()
    with torch.no_grad():
        model.layer.weight.copy_(torch.arange(12.0).sin().view(4, 3))
        model.layer.bias.fill_(0.25)
        for step in range(steps):
            model(batch(rank, step))
    return model.norm.running_mean, model.norm.running_var, steps


@every_strategy
@pytest.mark.parametrize("rule", ["broadcast", "mean", "local"])
def test_statistics_follow_the_rule(crew: Crew, strategy: str, rule: str) -> None:
    """A6: BatchNorm's running statistics, after each step and in settle()."""
    engines = normed(crew, strategy, buffers=rule)
    for step in range(3):
        crew.all(lambda rank: make_step(engines[rank], rank, step))  # noqa: B023 - called here
        found = [statistics(engine) for engine in engines]
        # Learning rate 0: the running statistics are linear in those of the batches.
        wanted = [alone(rank, step + 1) for rank in range(SIZE)]
        for rank in range(SIZE):
            for at in (0, 1):
                if rule == "mean":
                    expected = torch.stack([each[at] for each in wanted]).mean(0)
                else:
                    expected = wanted[0 if rule == "broadcast" else rank][at]
                assert torch.allclose(found[rank][at], expected, rtol=1e-5, atol=1e-6), (step, rank, at)
            assert found[rank][2] == step + 1
    # A forward pass in between, without a step.
    crew.all(lambda rank: engines[rank].model(batch(rank, 9)))
    crew.all(lambda rank: engines[rank].settle())
    same = [torch.equal(statistics(engine)[0], statistics(engines[0])[0]) for engine in engines]
    assert same == ([True] * SIZE if rule != "local" else [True, False, False])


@every_strategy
def test_a_rank_without_samples_follows_too(crew: Crew, strategy: str) -> None:
    """A6: rank 0 has no forward pass in the step, or is the only one that has."""
    for alone_rank in (0, 2):
        engines = normed(crew, strategy)

        def step(rank: int) -> None:
            has = (rank == alone_rank) == (alone_rank == 0)  # noqa: B023 - called here
            engine = engines[rank]  # noqa: B023
            engine.backward(engine.model(batch(rank, 0)).sum() if has else None, 2 * has)
            engine.step()
            engine.zero_grad()

        if strategy == "external" and alone_rank == 2:
            continue
        crew.all(step)
        assert_alike([statistics(engine)[2] for engine in engines])
        assert_alike([statistics(engine)[0].tolist() for engine in engines])


def test_buffers_that_nobody_writes_cost_no_message(crew: Crew) -> None:
    """A6: a model with masks, and one without buffers, send as many messages."""
    sent = []
    for masks in (0, 70):
        ranks = groups(SIZE)

        def one(rank: int) -> Engine:
            model = model_of()
            for at in range(masks):  # noqa: B023 - called here
                model.register_buffer(f"mask{at}", torch.ones(2, dtype=torch.bool))
            return couple("allreduce", model, two_groups(model), ranks[rank])  # noqa: B023

        engines = crew.all(one)
        before = len(ranks[0].transport._network.messages)  # type: ignore[attr-defined]
        crew.all(lambda rank: make_step(engines[rank], rank, 0))  # noqa: B023
        sent.append(len(ranks[0].transport._network.messages) - before)  # type: ignore[attr-defined]
        if masks:
            # With more buffers than bits neighbours share one: the last one is made alike, and the first one stays.
            engines[1].model.mask69.fill_(False)
            engines[0].model.mask68.fill_(False)
            crew.all(lambda rank: make_step(engines[rank], rank, 1))  # noqa: B023
            for engine in engines:
                assert not engine.model.mask68.any() and engine.model.mask69.all() and engine.model.mask0.all()
    assert sent[0] == sent[1]


# The start: rank 0 alone has loaded a checkpoint.


def trained(kind: Callable[..., Any], steps: int = 2) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = model_of(1)
    optimizer = two_groups(model, kind)
    for step in range(steps):
        model(batch(7, step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.param_groups[1]["lr"] = 0.037
    return model, optimizer


def adamw_amsgrad(groups_of: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups_of, lr=lr, amsgrad=True)


def adamw_fused(groups_of: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups_of, lr=torch.tensor(lr), fused=True)


KINDS = [torch.optim.AdamW, adamw_amsgrad, adamw_fused, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Rprop]


@every_strategy
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_rank_0_has_is_given(crew: Crew, strategy: str, kind: Callable[..., Any]) -> None:
    """A4: rank 0 alone has loaded a checkpoint before strategy(): model, optimizer, learning rate."""
    ranks = groups(SIZE)

    def one(rank: int, everybody: bool) -> list[torch.Tensor]:
        model, optimizer = trained(kind) if everybody or rank == 0 else trained(kind, 0)
        if not everybody and rank:
            optimizer.param_groups[0]["lr"] = 0.5
            optimizer = two_groups(model, kind)
        engine = couple(strategy, model, optimizer, again[rank] if everybody else ranks[rank], max_grad_norm=1.0)
        for step in range(3):
            make_step(engine, rank, step)
        engine.settle()
        return [*values(engine), torch.tensor(float(optimizer.param_groups[1]["lr"]))]

    given = crew.all(lambda rank: one(rank, False))
    again = groups(SIZE)
    wanted = crew.all(lambda rank: one(rank, True))
    for mine, theirs in zip(given, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_state_that_only_another_rank_has_is_dropped(crew: Crew) -> None:
    """A4: rank 0 starts anew, and a rank has the state of an earlier run."""
    ranks = groups(SIZE)

    def one(rank: int) -> int:
        model, optimizer = trained(torch.optim.AdamW, 2 * (rank == 1))
        couple("allreduce", model, optimizer, ranks[rank])
        return len(optimizer.state)

    assert crew.all(one) == [0] * SIZE


class Odd:
    """What no other rank could be told."""


def test_state_that_cannot_be_described_is_refused_by_name(crew: Crew) -> None:
    """A4: an object of the user's own in the optimizer's state."""
    ranks = groups(SIZE)

    def one(rank: int) -> None:
        model, optimizer = trained(torch.optim.AdamW)
        if rank == 2:
            optimizer.state[model[0].bias]["plan"] = Odd()
        with pytest.raises(UsageError, match=r"AdamW remembers 'plan' of '0.bias' as a Odd, which cannot be given"):
            couple("allreduce", model, optimizer, ranks[rank])

    crew.all(one)


# Later: a rank that has other copies is named.


def write_parameter(engine: Engine) -> None:
    with torch.no_grad():
        engine.model[2].weight[1, 1] += 1e-7


def load_model(engine: Engine) -> None:
    state = copy.deepcopy(engine.model.state_dict())
    state["2.weight"][0, 0] += 1
    engine.model.load_state_dict(state)


def load_optimizer(engine: Engine) -> None:
    state = copy.deepcopy(engine.optimizer.state_dict())
    state["state"][0]["exp_avg"][0, 0] += 1
    engine.optimizer.load_state_dict(state)


def write_state(engine: Engine) -> None:
    engine.optimizer.state[engine.model[0].weight]["exp_avg_sq"].mul_(2)


COPIES = {
    write_parameter: "'2.weight'",
    load_model: "'2.weight'",
    load_optimizer: "the optimizer's 'exp_avg' of '0.weight'",
    write_state: "the optimizer's 'exp_avg_sq' of '0.weight'",
}


@pytest.mark.parametrize("write", COPIES)
@pytest.mark.parametrize("strategy", ["allreduce", "external"])
def test_copies_that_differ_are_named(crew: Crew, strategy: str, write: Callable[[Engine], None]) -> None:
    """A4: rank 1 alone loads, or writes, after strategy(): in the next step, in settle(), every K steps."""
    for steps, meet in ((100, "settle"), (100, "step"), (2, "steps")):
        engines = build(crew, strategy, check_replicas=steps)
        crew.all(lambda rank: make_step(engines[rank], rank, 0))  # noqa: B023 - called here
        write(engines[1])
        if meet == "step" and write is write_state:
            continue  # nobody sees that before the next comparison

        def go_on(rank: int) -> None:
            engines[rank].settle() if meet == "settle" else make_step(engines[rank], rank, 1)  # noqa: B023

        told = errors_of(crew, go_on)
        for text in told:
            if "between two steps" in text:  # seen before there is anything to compare
                assert "not alike on all ranks: ranks 1 differ from 0, 2" in text and write is not write_state, text
                continue
            assert COPIES[write] in text and "(ranks 0, 2: copy 1, rank 1: copy 2)" in text, text


@pytest.mark.parametrize("strategy", ["ps", "dps"])
def test_copies_of_parameters_that_differ_are_named_under_servers(crew: Crew, strategy: str) -> None:
    """A4: between nodes every rank has parameters of its own."""
    engines = build(crew, strategy)
    crew.all(lambda rank: make_step(engines[rank], rank, 0))
    write_parameter(engines[1])
    told = errors_of(crew, lambda rank: engines[rank].settle())
    assert all("'2.weight' (ranks 0, 2: copy 1, rank 1: copy 2)" in text for text in told), told


@every_strategy
def test_writes_that_all_ranks_make_are_no_disagreement(crew: Crew, strategy: str) -> None:
    """A4: weights that are clipped after each step, as in WGAN."""
    engines = build(crew, strategy)

    def clipped(rank: int, step: int) -> None:
        make_step(engines[rank], rank, step)
        with torch.no_grad():
            for parameter in engines[rank].model.parameters():
                parameter.clamp_(-0.25, 0.25)

    for step in range(6):
        crew.all(lambda rank: clipped(rank, step))  # noqa: B023 - called here
    crew.all(lambda rank: engines[rank].settle())


# update_parameters().


@every_strategy
def test_random_changes_are_rank_0s(crew: Crew, strategy: str) -> None:
    """A10: update_parameters() with random numbers: parameters, frozen ones, and buffers."""
    ranks = groups(SIZE)

    def one(rank: int) -> dict[str, bytes]:
        model = model_of()
        model.register_buffer("noise", torch.zeros(5, dtype=torch.int16))
        model[2].bias.requires_grad_(False)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine = couple(strategy, model, torch.optim.AdamW(trainable, lr=0.1), ranks[rank])
        make_step(engine, rank, 0)

        def change(net: torch.nn.Module) -> None:
            generator = torch.Generator().manual_seed(rank)
            for parameter in net.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
            net.noise.random_(1, 1000, generator=generator)

        engine.update_parameters(change)
        found = bits(model)
        make_step(engine, rank, 1)
        engine.settle()
        return found

    found = crew.all(one)
    assert_alike(found)
    assert any(found[0]["noise"])


def test_models_of_different_layouts_are_found(crew: Crew) -> None:
    """A4: as many numbers in another shape."""
    ranks = groups(SIZE)

    def one(rank: int) -> None:
        model = torch.nn.Linear(*((3, 2) if rank else (2, 3)), bias=False)
        with pytest.raises(DisagreementError, match=r"rank 0: .*'weight \[3, 2\]'.*; ranks 1-2: .*'weight \[2, 3\]'"):
            couple("dps", model, torch.optim.SGD(model.parameters(), lr=0.1), ranks[rank])

    crew.all(one)


@pytest.mark.parametrize("strategy", ["allreduce", "dps"])
def test_ranks_may_have_a_parameter_in_other_strides(crew: Crew, strategy: str) -> None:
    """A4: a transposed parameter, which one rank has made contiguous (as an engine does that was closed)."""
    of_rank = groups(SIZE)

    def run(rank: int) -> torch.Tensor:
        model = torch.nn.Linear(3, 5)
        turned = torch.arange(15.0).view(3, 5).add(rank).t()
        model.weight = torch.nn.Parameter(turned.contiguous() if rank == 1 else turned)
        engine = couple(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1), of_rank[rank])
        engine.close()
        return model.weight.detach().clone()

    for found in crew.all(run):
        assert torch.equal(found, torch.arange(15.0).view(3, 5).t())
