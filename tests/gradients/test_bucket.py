"""Which parameters travel together, when a bucket leaves, and what is in it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from commlab.errors import UsageError
from commlab.gradients import hooks
from commlab.gradients.bucket import Bucket, plan, usual_bytes
from commlab.gradients.hooks import GradientBuckets
from commlab.gradients.parameters import NamedParameter, named_parameters

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@st.composite
def parameter_lists(draw: st.DrawFn) -> list[NamedParameter]:
    kinds = draw(st.lists(st.tuples(st.integers(0, 40), st.sampled_from(DTYPES), st.integers(0, 2)), max_size=25))
    return [
        NamedParameter(f"p{index}", torch.nn.Parameter(torch.zeros(numel, dtype=dtype)), group, index)
        for index, (numel, dtype, group) in enumerate(kinds)
    ]


def bytes_of(parameter: NamedParameter) -> int:
    return parameter.tensor.numel() * parameter.tensor.element_size()


@given(parameters=parameter_lists(), bucket_bytes=st.integers(1, 600), wire=st.sampled_from([None, torch.float16]))
def test_properties_of_a_plan(parameters: list[NamedParameter], bucket_bytes: int, wire: torch.dtype | None) -> None:
    buckets = plan(parameters, bucket_bytes, wire)
    # Every parameter exactly once.
    assert sorted(member.index for bucket in buckets for member in bucket.parameters) == list(range(len(parameters)))
    assert [bucket.index for bucket in buckets] == list(range(len(buckets)))
    for bucket in buckets:
        # Ranges adjoin, from 0 to the bucket's end, each as long as its parameter.
        starts = [0, *(extent.stop for extent in bucket.ranges)]
        assert [extent.start for extent in bucket.ranges] == starts[:-1]
        assert starts[-1] == bucket.numel == bucket.flat.numel()
        assert [extent.numel for extent in bucket.ranges] == [member.tensor.numel() for member in bucket.parameters]
        # One dtype and one optimizer group; on the wire, the wire's dtype.
        assert len({(member.tensor.dtype, member.group) for member in bucket.parameters}) == 1
        assert bucket.dtype == bucket.flat.dtype == (wire or bucket.parameters[0].tensor.dtype)
        # No larger than asked, but for what one parameter needs; in the order of backward.
        assert len(bucket.parameters) == 1 or sum(map(bytes_of, bucket.parameters)) <= bucket_bytes
        assert [member.index for member in bucket.parameters] == sorted(
            (member.index for member in bucket.parameters), reverse=True
        )
    # Backward reaches the parameter registered first last: a bucket is complete with it, and buckets are numbered in
    # the order in which they are complete.
    completed = [min(member.index for member in bucket.parameters) for bucket in buckets]
    assert completed == sorted(completed, reverse=True)


@given(parameters=parameter_lists(), bucket_bytes=st.integers(1, 600))
def test_buckets_are_as_full_as_they_can_be(parameters: list[NamedParameter], bucket_bytes: int) -> None:
    of_one_kind: dict[tuple[torch.dtype, int], list[Bucket]] = {}
    for bucket in plan(parameters, bucket_bytes, None):
        of_one_kind.setdefault((bucket.dtype, bucket.parameters[0].group), []).append(bucket)
    for buckets in of_one_kind.values():
        for bucket, following in pairwise(buckets):
            filled = sum(map(bytes_of, bucket.parameters))
            assert filled + bytes_of(following.parameters[0]) > bucket_bytes


def chain(depth: int = 4) -> torch.nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(depth)])


class Sent:
    """An exchange that has ended."""

    result = None

    def wait(self, timeout_s: float | None = None) -> None:
        pass


class Log:
    """Buckets of a model with a launch that only writes down what it was given."""

    def __init__(
        self,
        model: torch.nn.Module,
        bucket_bytes: int,
        scale: float = 1.0,
        keep_gradients: bool = True,
        wire: torch.dtype | None = None,
    ):
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
        self.events: list[str] = []
        self.packed: dict[int, torch.Tensor] = {}
        self.scales = 0

        def launch(bucket: Bucket) -> Sent:
            self.events.append(bucket.name)
            self.packed[bucket.index] = bucket.flat.clone()
            return Sent()

        def asked_scale() -> float:
            self.scales += 1
            return scale

        self.parameters = named_parameters(model, optimizer)
        self.buckets = GradientBuckets(
            plan(self.parameters, bucket_bytes, wire),
            launch,
            asked_scale,
            lambda: self.events.append("poll"),
            keep_gradients=keep_gradients,
        )

    def launched(self) -> list[str]:
        return [event for event in self.events if event != "poll"]


LINEAR_BYTES = (9 + 3) * 4


def forward(layers: list[torch.nn.Module], log: Log) -> torch.Tensor:
    """Through all layers; backward writes down when it reaches each, just before that layer's own gradients."""
    hidden = torch.ones(2, 3)
    for index, layer in enumerate(layers):
        hidden = layer(hidden)
        hidden.register_hook(lambda _, index=index: log.events.append(f"layer {index}"))
    return hidden.sum()


def test_a_bucket_leaves_during_backward_as_soon_as_it_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "POLL_EVERY_S", 0.0)
    model = chain()
    log = Log(model, LINEAR_BYTES)
    forward(list(model), log).backward()
    assert log.launched() == [
        "layer 3",
        "bucket 0",
        "layer 2",
        "bucket 1",
        "layer 1",
        "bucket 2",
        "layer 0",
        "bucket 3",
    ]
    assert log.events.count("poll") == 8, "operations under way move on with every gradient"
    log.buckets.flush()
    assert len(log.launched()) == 8, "nothing is left to launch"


def test_gradients_that_follow_close_upon_each_other_move_operations_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a bucket that leaves always does."""
    monkeypatch.setattr(hooks, "POLL_EVERY_S", 60.0)
    model = chain()
    log = Log(model, LINEAR_BYTES)
    forward(list(model), log).backward()
    assert log.launched()[1::2] == ["bucket 0", "bucket 1", "bucket 2", "bucket 3"]
    assert log.events.count("poll") == 5, "the first gradient, and the four that complete a bucket"


def test_without_overlap_all_leave_after_backward_in_the_same_order() -> None:
    """With the same numbers; and from one step to the next it can be turned on again."""
    model, twin = chain(), chain()
    log, usual = Log(model, LINEAR_BYTES), Log(twin, LINEAR_BYTES)
    forward(list(twin), usual).backward()
    log.buckets.overlap = False
    forward(list(model), log).backward()
    assert log.events == ["layer 3", "layer 2", "layer 1", "layer 0"]
    log.buckets.flush()
    assert log.events[4:] == ["bucket 0", "bucket 1", "bucket 2", "bucket 3"]
    assert all(torch.equal(log.packed[at], usual.packed[at]) for at in range(4))
    assert log.buckets.used == usual.buckets.used == set(range(8))
    log.buckets.reset()
    log.buckets.overlap = True
    log.events.clear()
    forward(list(model), log).backward()
    assert log.launched()[:4] == ["layer 3", "bucket 0", "layer 2", "bucket 1"]


def test_buckets_leave_in_index_order_whatever_the_order_of_gradients() -> None:
    model = chain(3)
    log = Log(model, LINEAR_BYTES)
    # Used in another order than registered: bucket 2 is complete first, then 0, then 1.
    forward([model[1], model[2], model[0]], log).backward()
    assert log.launched() == ["layer 2", "layer 1", "bucket 0", "layer 0", "bucket 1", "bucket 2"]


@pytest.mark.parametrize(
    "numel, nodes, byte_s, wanted",
    [
        (10, 1, 1e-9, 25 * 2**20),
        (10, 2, math.inf, 2**20),
        (2**20, 2, 8e-9, 2**20),
        (2**22 + 4, 3, 8e-9, 2**22 + 4),
        (2**29, 2, 8e-9, 25 * 2**20),
        (10, 2, 0.8e-9, 4 * 2**20),
        (2**22 + 4, 3, 0.8e-9, 2**22 + 4),
        (2**29, 2, 0.8e-9, 25 * 2**20),
    ],
)
def test_the_usual_size_lets_small_models_overlap_between_nodes(
    numel: int, nodes: int, byte_s: float, wanted: int
) -> None:
    """On a fast network not in pieces that cost more than they hide."""
    tensor = torch.nn.Parameter(torch.empty(numel, device="meta"))
    assert usual_bytes([NamedParameter("w", tensor, 0, 0)], nodes, byte_s) == wanted


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("bucket_bytes", [1, LINEAR_BYTES, 10**9])
def test_what_a_bucket_holds(bucket_bytes: int, keep: bool) -> None:
    model, twin = chain(), chain()
    log = Log(model, bucket_bytes, scale=0.5, keep_gradients=keep)
    x = torch.arange(6.0).view(2, 3)
    model(x).square().sum().backward()
    twin(x).square().sum().backward()
    wanted = dict(twin.named_parameters())
    for bucket in log.buckets.buckets:
        for member, extent in zip(bucket.parameters, bucket.ranges, strict=True):
            gradient = wanted[member.name].grad
            assert gradient is not None
            found = log.packed[bucket.index][extent.start : extent.stop].view(gradient.shape)
            assert torch.equal(found, gradient * 0.5)
            assert (member.tensor.grad is not None) == keep
    assert log.scales == 1, "the scale belongs to the step, and may cost an exchange"


def test_without_syncing_gradients_add_up_and_the_last_backward_sends_the_sum() -> None:
    model, twin = chain(1), chain(1)
    log = Log(model, 10**9)
    log.buckets.syncing = False
    for factor in (1.0, 2.0):
        model(torch.ones(1, 3) * factor).sum().backward()
        assert log.launched() == []
    log.buckets.syncing = True
    model(torch.ones(1, 3) * 5).sum().backward()
    twin(torch.ones(1, 3) * 8).sum().backward()
    assert log.launched() == ["bucket 0"]
    weight = log.packed[0][3:].view(3, 3)  # the bias was registered last, so it comes first
    gradient = twin[0].weight.grad
    assert isinstance(gradient, torch.Tensor) and torch.equal(weight, gradient)


def test_a_parameter_used_only_while_accumulating_counts_as_used() -> None:
    model = chain(2)
    log = Log(model, 10**9)
    log.buckets.syncing = False
    model[1](torch.ones(1, 3)).sum().backward()
    log.buckets.syncing = True
    model[0](torch.ones(1, 3)).sum().backward()
    assert log.launched() == [], "the second layer's gradients have not come in this backward"
    log.buckets.flush()
    assert log.buckets.used == {0, 1, 2, 3}
    assert log.packed[0][:3].tolist() == [1, 1, 1], "the accumulated gradient travels all the same"


def test_unused_parameters_travel_as_zeros_and_are_known() -> None:
    model = chain(3)
    log = Log(model, LINEAR_BYTES)
    model[1](torch.ones(1, 3)).sum().backward()
    log.buckets.flush()
    assert log.launched() == ["bucket 0", "bucket 1", "bucket 2"]
    assert log.buckets.used == {2, 3}
    assert not log.packed[0].any() and log.packed[1].all() and not log.packed[2].any()
    log.buckets.reset()
    assert log.buckets.used == set()
    model(torch.ones(1, 3)).sum().backward()
    assert log.launched()[3:] == ["bucket 0", "bucket 1", "bucket 2"], "a new step begins"


def test_gradients_are_let_go_as_soon_as_they_are_packed() -> None:
    """Else a whole gradient would stay in memory beside its buckets."""
    model = chain(3)
    gradients: list[weakref.ref[torch.Tensor]] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda tensor: gradients.append(weakref.ref(tensor.grad)))
    log = Log(model, LINEAR_BYTES, keep_gradients=False)
    model(torch.ones(1, 3)).sum().backward()
    assert len(log.launched()) == 3 and len(gradients) == 6
    assert [reference() for reference in gradients] == [None] * 6


def test_a_gradient_ready_twice_in_one_step_is_refused() -> None:
    model = chain(2)
    Log(model, 10**9)
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(UsageError, match=r"'1\.bias'.*no_sync"):
        model(torch.ones(1, 3)).sum().backward()


def test_a_sparse_gradient_is_refused_by_name() -> None:
    model = torch.nn.Embedding(5, 3, sparse=True)
    Log(model, 10**9)
    with pytest.raises(UsageError, match="'weight' is sparse"):
        model(torch.tensor([1, 2])).sum().backward()


def test_close_removes_the_hooks() -> None:
    model = chain(1)
    log = Log(model, 10**9)
    log.buckets.close()
    model(torch.ones(1, 3)).sum().backward()
    assert log.events == [] and log.buckets.used == set()


def test_named_parameters_has_tied_ones_once_frozen_ones_not_and_knows_groups() -> None:
    model = chain(3)
    model[2].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(
        [{"params": [model[0].bias, model[2].bias]}, {"params": [model[0].weight, model[1].weight]}], lr=1.0
    )
    named = named_parameters(model, optimizer)
    assert [(item.name, item.group, item.index) for item in named] == [
        ("0.weight", 1, 0),
        ("0.bias", 0, 1),
        ("1.weight", 1, 2),
        ("2.bias", 0, 3),
    ]


def drop_one(model: torch.nn.Sequential) -> list[torch.nn.Parameter]:
    return list(model.parameters())[:-1]


def add_stranger(model: torch.nn.Sequential) -> list[torch.nn.Parameter]:
    return [*model.parameters(), torch.nn.Parameter(torch.zeros(7, 2))]


def make_complex(model: torch.nn.Sequential) -> list[torch.nn.Parameter]:
    model.register_parameter("turning", torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64)))
    return list(model.parameters())


@pytest.mark.parametrize(
    "parameters_of, message",
    [
        (drop_one, r"'1\.bias' is trainable, but the optimizer does not have it"),
        (add_stranger, r"1 parameters that are not trainable ones of the model: \[\[7, 2\]\]"),
        (make_complex, r"'turning' is torch\.complex64"),
    ],
)
def test_model_and_optimizer_must_fit(
    parameters_of: Callable[[torch.nn.Sequential], list[torch.nn.Parameter]], message: str
) -> None:
    model = chain(2)
    optimizer = torch.optim.SGD(parameters_of(model), lr=1.0)
    with pytest.raises(UsageError, match=message):
        named_parameters(model, optimizer)
