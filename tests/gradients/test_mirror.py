"""Buffers in two memories. Here both are the host's: what is tested is that everything is copied, in time and no
earlier; on a GPU, that the copies are (tests/gradients/test_mirror.py there, with a real one)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import training
from crew import Crew, by_turns, crew_of, groups
from training import EVEN, RAGGED, Recipe, alone, go_on

from commlab import native
from commlab.chunks import Range
from commlab.gradients import bucket, mirror
from commlab.gradients.hooks import Waitable
from commlab.gradients.mirror import Mirror
from commlab.strategies import flat

SIZE = 3
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and a torch built for CUDA")
needs_kernels = pytest.mark.skipif(not native.cuda_backend().startswith("native"), reason="needs the CUDA kernels")


class LateMirror(Mirror):
    """Copies come late: when somebody waits, or has asked often enough. Until then the target holds NaNs."""

    made = 0
    patience = 3

    def __init__(self, host: torch.Tensor, device: torch.device):
        super().__init__(host, device)
        assert not host.numel() or self.host.data_ptr() != self.device.data_ptr()
        type(self).made += 1
        self._later: Callable[[], object] | None = None
        self._asked = 0

    def to_host(self, extent: Range | None = None) -> None:
        assert self._later is None, "the last copy was never waited for"
        there = self.host if extent is None else self.host[extent.start : extent.stop]
        there.fill_(torch.nan)
        self._later, self._asked = lambda: super(LateMirror, self).to_host(extent), 0

    def arrived(self) -> bool:
        self._asked += 1
        if self._asked > self.patience:
            self.wait()
        return self._later is None

    def wait(self) -> None:
        if self._later is not None:
            self._later()
            self._later = None


@pytest.fixture
def mirrored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (bucket, flat):
        monkeypatch.setattr(module, "mirrors", lambda device: True)
        monkeypatch.setattr(module, "Mirror", LateMirror)
    LateMirror.made = 0
    yield
    assert LateMirror.made > 0


crew = crew_of(SIZE)


RECIPES = {
    "plain": Recipe(samples=EVEN, max_grad_norm=1.0),
    "ragged, accumulated": Recipe(samples=RAGGED, accumulation=2, max_grad_norm=0.5),
    "Adam": Recipe(samples=EVEN, optimizer="Adam"),
}


def trained(crew: Crew, strategy: str, recipe: Recipe, **options: Any) -> list[bytes]:
    """Every step's digest, the same on all ranks."""
    everyone = groups(SIZE)

    def work(rank: int) -> tuple[bytes, ...]:
        with by_turns:
            model = training.make_model(recipe)
        run = training.build(strategy, everyone[rank], recipe, model, bucket_bytes=300, **options)
        run = go_on(run, range(len(recipe.samples)))
        run.engine.update_parameters(lambda model: model.gain.fill_(0.75))
        run.digests.append(training.digest(run.model))
        run.engine.close()
        return tuple(run.digests)

    found = set(crew.all(work))
    assert len(found) == 1, "ranks have different parameters"
    return list(found.pop())


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("strategy, options", [("allreduce", {}), ("dps", {}), ("ps", {}), ("dps", {"wire": "bf16"})])
def test_the_same_bits_as_without(crew: Crew, request: Any, strategy: str, options: Any, recipe: str) -> None:
    wanted = trained(crew, strategy, RECIPES[recipe], **options)
    request.getfixturevalue("mirrored")
    assert trained(crew, strategy, RECIPES[recipe], **options) == wanted


@pytest.mark.parametrize("strategy", ["allreduce", "dps"])
def test_buckets_are_launched_in_order_and_after_their_copies(
    mirrored: None, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During backward what has arrived goes on; the rest waits for the end."""
    monkeypatch.setattr(LateMirror, "patience", 1)
    run = training.build(strategy, alone(), Recipe(all_used=True), bucket_bytes=100)
    engine, launched, in_flush = run.engine, [], []
    flush, launch = engine.buckets.flush, engine.buckets._launch

    def watched(each: bucket.Bucket) -> Waitable:
        assert not each.flat.isnan().any(), "launched before its copy was done"
        launched.append(each.index)
        return launch(each)

    def flushed() -> None:
        in_flush.append(len(launched))
        flush()

    engine.buckets._launch = watched
    engine.buckets.flush = flushed  # type: ignore[method-assign]
    training.backward(engine, run.recipe, 0)
    engine.step()
    assert launched == list(range(len(engine.buckets.buckets)))
    assert 0 < in_flush[0] < len(launched), "some during backward, some after it"


def test_nothing_is_pinned_without_a_gpu() -> None:
    if not torch.cuda.is_available():
        mirror.pin(object.__new__(Mirror), [torch.zeros(4)])
        assert not mirror._pinned


@needs_gpu
class TestOnGpu:
    @needs_kernels
    def test_copies_are_asynchronous_and_ordered(self) -> None:
        numel = 1 << 24
        host = torch.zeros(numel)

        class Owner:
            pass

        owner = Owner()
        mirror.pin(owner, [host])
        assert mirror._pinned and host.is_pinned()
        made = Mirror(host, torch.device("cuda", 0))
        torch.cuda.synchronize()
        torch.cuda._sleep(100_000_000)
        made.device.fill_(3.0)
        made.to_host()
        assert not made.arrived(), "to_host waits for what the current stream does, and the host does not"
        made.wait()
        assert made.arrived() and bool((host == 3.0).all())
        host[: numel // 2] = 5.0
        made.to_device(Range(0, 10))
        assert made.device[:12].tolist() == [5.0] * 10 + [3.0] * 2
        del owner
        assert not mirror._pinned

    @pytest.mark.parametrize("strategy", ["allreduce", "dps", "ps"])
    @pytest.mark.parametrize("wire", [None, "fp16"])
    def test_training_equals_the_cpus(self, strategy: str, wire: str | None) -> None:
        """To the rounding of sums that a GPU adds in another order."""
        recipe = Recipe(samples=EVEN, max_grad_norm=1.0, all_used=True)
        wanted = training.train(strategy, alone(), recipe, wire=wire)
        model = training.make_model(recipe).cuda()
        run = training.build(strategy, alone(), recipe, model, wire=wire)
        for step in range(len(recipe.samples)):
            inputs, targets = training.samples(step, recipe.samples[step])
            errors = run.engine.model(inputs.cuda()) - targets.cuda()
            run.engine.backward(errors.square().sum(), len(inputs), len(inputs))
            run.engine.step()
            run.engine.zero_grad()
            run.scheduler.step()
        assert all(parameter.is_cuda for parameter in model.parameters())
        tolerance = 2e-3 if wire else 1e-5
        for mine, theirs in zip(model.parameters(), wanted.model.parameters(), strict=True):
            assert torch.allclose(mine.cpu(), theirs, rtol=tolerance, atol=tolerance)
