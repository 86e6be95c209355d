"""Checkpoints on disk: what was acknowledged loads, whatever killed its writer; what was altered never does."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from checkpoint_writer import Server, State
from hypothesis import given, settings
from hypothesis import strategies as st
from training import RAGGED, Recipe, Run, build, digest, go_on

import commlab
from commlab.checkpoint import Checkpoints
from commlab.checkpoint import files as store
from commlab.checkpoint.nested import pack, unpack
from commlab.errors import UsageError
from commlab.precision.loss_scale import LossScale
from commlab.runtime.raw import bytes_of

RECIPE = Recipe(max_grad_norm=0.5, optimizer="AdamW")


def checkpoints_of(run: Run, folder: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(folder, run.model, run.engine, run.scheduler, keep)


def two_checkpoints(folder: Path) -> list[bytes]:
    """Of steps 2 and 4; the parameters' digests after each step."""
    run = build("single", training.alone(), RECIPE)
    checkpoints = checkpoints_of(run, folder)
    for step in (2, 4):
        go_on(run, range(step - 2, step))
        checkpoints.save(step, {"cursor": step})
    return run.digests


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, two_checkpoints(folder)


def restored(folder: Path) -> tuple[int | None, list[str], bytes]:
    """(step, what was refused, digest of the parameters), in a new model."""
    run = build("single", training.alone(), RECIPE)
    checkpoints = checkpoints_of(run, folder)
    found = checkpoints.restore()
    assert found is None or found[1] == {"cursor": found[0]}
    return None if found is None else found[0], checkpoints.refused, digest(run.model)


def test_a_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    """Random state, too: the third step draws numbers."""
    run = build("single", training.alone(), RECIPE)
    checkpoints = checkpoints_of(run, tmp_path)
    go_on(run, range(2))
    torch.manual_seed(5)
    torch.rand(3)
    checkpoints.save(2, {"text": "ü", "tuple": (1, (2.5, None)), "list": [True, float("inf")], 3: 0.1})
    drawn = torch.rand(3)
    go_on(run, range(2, len(RAGGED)))
    again = build("single", training.alone(), RECIPE)
    found = checkpoints_of(again, tmp_path).restore()
    assert found == (2, {"text": "ü", "tuple": (1, (2.5, None)), "list": [True, float("inf")], 3: 0.1})
    assert torch.equal(torch.rand(3), drawn)
    assert again.engine.steps == 2
    go_on(again, range(2, len(RAGGED)))
    assert again.digests == run.digests[2:]
    assert again.norms == run.norms[2:]
    assert again.scheduler.state_dict() == run.scheduler.state_dict()


def test_loss_scale_and_skipped_steps_come_back(tmp_path: Path) -> None:
    run = build("single", training.alone(), RECIPE, precision="fp16", autocast="off")
    run.engine.precision.loss_scale = LossScale(2.0**100)  # overflows at once
    for step in range(2):
        training.backward(run.engine, RECIPE, step)
        assert not run.engine.step()
        run.engine.zero_grad()
    assert (run.engine.skipped_steps, run.engine.precision.scale) == (2, 2.0**98)
    checkpoints_of(run, tmp_path).save(2)
    again = build("single", training.alone(), RECIPE, precision="fp16", autocast="off")
    checkpoints_of(again, tmp_path).restore()
    assert again.engine.skipped_steps == 2
    assert again.engine.precision.scale == 2.0**98


def test_buffers_and_frozen_parameters_come_back(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Module, Checkpoints]:
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        model[0].bias.requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine = commlab.strategy("single", model, torch.optim.SGD(trained, lr=0.1), training.alone())
        return model, Checkpoints(tmp_path, model, engine)

    model, checkpoints = make()
    model(torch.randn(5, 3))
    checkpoints.save(1)
    again, others = make()
    assert not torch.equal(again[1].running_mean, model[1].running_mean)
    others.restore()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.filterwarnings("ignore")
def test_buffers_of_every_dtype_come_back(tmp_path: Path) -> None:
    """A6: bool, whole numbers of every width, complex, float8, quantized: bit for bit."""
    names = "bool uint8 int8 int16 uint16 uint32 uint64 complex32 complex64 complex128 float8_e4m3fn float8_e8m0fnu"
    dtypes = [getattr(torch, name) for name in names.split() if hasattr(torch, name)]

    def make(seed: int) -> tuple[torch.nn.Module, Checkpoints]:
        model = torch.nn.Linear(2, 2)
        for at, dtype in enumerate(dtypes):
            raw = torch.arange(16 * 4).add(seed).remainder(2 if dtype is torch.bool else 251).to(torch.uint8)
            model.register_buffer(f"b{at}", raw.view(dtype)[:3])
        model.register_buffer("q", torch.quantize_per_tensor(torch.arange(4.0) + seed, 0.5, 3, torch.qint8))
        scales, zero_points = torch.tensor([0.5, 0.25]), torch.tensor([0, 1])
        numbers = torch.arange(4.0).add(seed).view(2, 2)
        model.register_buffer("c", torch.quantize_per_channel(numbers, scales, zero_points, 1, torch.quint8))
        engine = commlab.strategy("single", model, torch.optim.SGD(model.parameters(), lr=0.1), training.alone())
        return model, Checkpoints(tmp_path, model, engine)

    model, checkpoints = make(0)
    checkpoints.save(1)
    again, others = make(1)
    wanted = {name: bytes_of(tensor).clone() for name, tensor in model.named_buffers()}
    assert not any(torch.equal(bytes_of(tensor), wanted[name]) for name, tensor in again.named_buffers())
    others.restore()
    assert len(wanted) > 12
    assert all(torch.equal(bytes_of(tensor), wanted[name]) for name, tensor in again.named_buffers())


def test_the_newest_stay(tmp_path: Path) -> None:
    run = build("single", training.alone(), RECIPE)
    checkpoints = checkpoints_of(run, tmp_path, keep=3)
    for step in (1, 2, 10, 11, 12):
        checkpoints.save(step)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".writer", *(f"step-{step:010d}" for step in (10, 11, 12))]
    with pytest.raises(UsageError, match=r"checkpoints already, the newest .*step-0000000012; --resume goes on"):
        checkpoints.require_none()
    checkpoints_of(run, tmp_path / "other").require_none()


def files(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.iterdir())


@settings(max_examples=100)
@given(st.data())
def test_no_altered_checkpoint_loads(saved: tuple[Path, list[bytes]], data: st.DataObject) -> None:
    """One bit flipped, or the end cut off, of either file: the one before it is used, and that is said."""
    folder, digests = saved
    file = data.draw(st.sampled_from(files(store.newest_first(folder)[0])), "file")
    content = file.read_bytes()
    if data.draw(st.booleans(), "flip"):
        bit = data.draw(st.integers(0, 8 * len(content) - 1), "bit")
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
    else:
        altered = bytearray(content[: data.draw(st.integers(0, len(content) - 1), "length")])
    file.write_bytes(altered)
    try:
        step, refused, found = restored(folder)
    finally:
        file.write_bytes(content)
    assert (step, found) == (2, digests[1])
    assert len(refused) == 1 and refused[0].startswith("step-0000000004: ")
    assert file.name in refused[0]


def test_whole_checkpoints_load(saved: tuple[Path, list[bytes]]) -> None:
    """What the test above would also pass without."""
    folder, digests = saved
    assert restored(folder) == (4, [], digests[3])


def test_what_else_can_be_wrong(tmp_path: Path) -> None:
    digests = two_checkpoints(tmp_path)
    newest, older = store.newest_first(tmp_path)
    part = newest / "rank-0-of-1.safetensors"
    kept = part.read_bytes()
    for change, words in (
        (lambda: part.unlink(), "rank-0-of-1.safetensors is missing"),
        # Of the same size, and whole: only its content tells.
        (lambda: shutil.copy(older / part.name, part), "was altered"),
        (lambda: part.write_bytes(kept + b"\0"), f"has {len(kept) + 1} bytes, and was written with {len(kept)}"),
    ):
        change()
        step, refused, found = restored(tmp_path)
        assert (step, found) == (2, digests[1])
        assert words in refused[0]
    part.write_bytes(kept)
    manifest = (newest / store.MANIFEST).read_text()
    (newest / store.MANIFEST).write_text(manifest.replace('"step": 4', '"step": 4 '))
    assert "altered" in restored(tmp_path)[1][0]
    (newest / store.MANIFEST).unlink()
    assert "manifest.json is missing" in restored(tmp_path)[1][0]
    (newest / store.MANIFEST).write_text(manifest)
    newest.rename(newest.with_name("step-0000000007"))
    assert "was renamed: it is of step 4" in restored(tmp_path)[1][0]
    (older / store.MANIFEST).write_text("{}")
    with pytest.raises(UsageError, match=r"none of the 2 checkpoints .* is whole: step-0000000007.*; step-0000000002"):
        restored(tmp_path)
    assert restored(tmp_path / "empty")[0] is None


def test_one_that_was_refused_makes_room(tmp_path: Path) -> None:
    """For one of the same step; until that is there it stays."""
    two_checkpoints(tmp_path)
    (store.newest_first(tmp_path)[0] / store.MANIFEST).write_text("{}")
    run = build("single", training.alone(), RECIPE)
    checkpoints = checkpoints_of(run, tmp_path)
    checkpoints.restore()
    go_on(run, range(2, 4))
    assert checkpoints.save(4, {"cursor": 4}).name == "step-0000000004-1"
    assert [path.name for path in store.newest_first(tmp_path)] == ["step-0000000004-1", "step-0000000002"]
    assert restored(tmp_path) == (4, [], digest(run.model))


def test_links_and_files_among_checkpoints_are_in_nobodys_way(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    (tmp_path / "step-0000000008").symlink_to("/nowhere")
    (tmp_path / "step-0000000009").touch()
    (tmp_path / ".step-0000000001.removed").symlink_to("/nowhere")
    run = build("single", training.alone(), RECIPE)
    checkpoints = checkpoints_of(run, tmp_path)
    assert checkpoints.restore() == (4, {"cursor": 4})
    checkpoints.save(6, {"cursor": 6})
    assert [path.name for path in store.newest_first(tmp_path)] == ["step-0000000006", "step-0000000004"]
    with pytest.raises(UsageError, match="Not a directory"):
        store.newest_first(tmp_path / "step-0000000004/manifest.json")


class Counting(torch.nn.Linear):
    """Keeps a number that is no tensor."""

    calls = 0

    def get_extra_state(self) -> object:
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


def of(
    folder: Path, optimizer: str = "AdamW", *, shape: tuple[int, ...] = (2, 6), schedule: Any = None, swap: bool = False
) -> tuple[torch.nn.Module, Any, Checkpoints]:
    """A model of one layer and a parameter of ``shape``, in two groups."""
    model = Counting(3, 2)
    model.extra = torch.nn.Parameter(torch.arange(12.0).reshape(shape))
    groups = [{"params": [model.weight, model.bias]}, {"params": [model.extra], "lr": 0.5}]
    made = getattr(torch.optim, optimizer)(groups[::-1] if swap else groups, lr=0.1)
    engine = commlab.strategy("single", model, made, training.alone())
    engine.backward(model(torch.ones(1, 3)).sum() + model.extra.square().sum())
    engine.step()
    return model, engine, Checkpoints(folder, model, engine, schedule and schedule(made))


def step_lr(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2)


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"optimizer": "SGD"}, "of an optimizer AdamW, and this one is SGD, whose dampening, momentum"),
        ({"shape": (6, 2)}, r"parameter 'extra': saved with shape \[2, 6\], and here it is \[6, 2\]"),
        ({"shape": (12,)}, r"parameter 'extra': saved with shape \[2, 6\], and here it is \[12\]"),
        ({"swap": True}, "saved in the optimizer's group 0, and here it is 1"),
        ({"schedule": cosine}, "saved with a StepLR, and the scheduler is a CosineAnnealingLR"),
    ],
)
def test_what_can_not_go_on_from_a_checkpoint(tmp_path: Path, other: dict[str, Any], words: str) -> None:
    """State that would be taken for another's: of another class, shape or group."""
    _, _, checkpoints = of(tmp_path, schedule=step_lr)
    checkpoints.save(1)
    checkpoints.close()
    model, _, another = of(tmp_path, **{"schedule": step_lr, **other})
    before = digest(model)
    with pytest.raises(UsageError, match=words):
        another.restore()
    assert digest(model) == before


@pytest.mark.parametrize(("first", "then"), [(step_lr, None), (None, step_lr)])
def test_a_schedule_of_one_program_alone_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: Any, then: Any
) -> None:
    _, _, checkpoints = of(tmp_path, schedule=first)
    checkpoints.save(1)
    checkpoints.close()
    of(tmp_path, schedule=then)[2].restore()
    assert ("is lost" if then is None else "starts anew") in caplog.text


def test_extra_state_comes_back(tmp_path: Path) -> None:
    model, _, checkpoints = of(tmp_path)
    model.calls = 7
    checkpoints.save(1)
    checkpoints.close()
    model, _, checkpoints = of(tmp_path)
    checkpoints.restore()
    assert model.calls == 7


def test_state_follows_the_parameters_dtype(tmp_path: Path) -> None:
    """As under torch's load_state_dict(), without which the optimizer's next step raises."""
    runs = []
    for dtype in (torch.bfloat16, torch.float32):
        model = torch.nn.Linear(3, 2).to(dtype)
        optimizer = torch.optim.AdamW(model.parameters())
        engine = commlab.strategy("single", model, optimizer, training.alone())
        runs.append((model, engine, Checkpoints(tmp_path, model, engine)))
        engine.backward(model(torch.ones(1, 3, dtype=dtype)).sum())
        engine.step()
    runs[0][2].save(1)
    runs[1][2].restore()
    model, engine, _ = runs[1]
    assert {value.dtype for value in engine.optimizer.state[model.weight].values()} == {torch.float32}
    engine.zero_grad()
    engine.backward(model(torch.ones(1, 3)).sum())
    engine.step()


def test_another_model_is_refused_before_anything_is_changed(saved: tuple[Path, list[bytes]]) -> None:
    model = torch.nn.Linear(3, 2)
    before = digest(model)
    engine = commlab.strategy("single", model, torch.optim.SGD(model.parameters(), lr=0.1), training.alone())
    with pytest.raises(UsageError, match=r"'bias' has shape or size none in the checkpoint, and .2. in this model"):
        Checkpoints(saved[0], model, engine).restore()
    assert digest(model) == before


def test_parts_of_different_steps_are_refused() -> None:
    run = go_on(build("single", training.alone(), RECIPE), range(1))
    first = {**run.engine.state_dict()}
    go_on(run, range(1, 2))
    with pytest.raises(UsageError, match=r"rank 0: the parts to load differ in 'steps': 2, 1; .* of one checkpoint"):
        run.engine.load_state_dict(run.engine.state_dict(), first)


def test_state_of_every_kind() -> None:
    state = {
        "tensor": "a name that is also a tag",
        "dict": {1: {2.5: None, True: (torch.arange(3), [torch.tensor(2.0), ()])}},
        "bf16": torch.randn(4, 3).bfloat16().t(),
        "empty": torch.empty(0, 3),
        "float": 0.1 + 0.2,
        "bytes": [b"", bytes(range(256)), bytearray(b"bytes")],
    }
    again = unpack(*pack(state))
    assert again["bytes"] == state["bytes"] and [type(each) for each in again["bytes"]] == [bytes, bytes, bytearray]
    assert again["dict"][1][2.5] is None
    assert torch.equal(again["dict"][1][True][0], torch.arange(3))
    assert isinstance(again["dict"][1][True][1][1], tuple)
    assert torch.equal(again["bf16"], state["bf16"]) and again["empty"].shape == (0, 3)
    assert {key: again[key] for key in ("tensor", "float")} == {key: state[key] for key in ("tensor", "float")}
    with pytest.raises(UsageError, match=r"cannot hold state\['a'\]\[1\], a set"):
        pack({"a": [1, {2}]})


def test_a_full_disk_is_an_error_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = two_checkpoints(tmp_path)
    run = build("single", training.alone(), RECIPE)
    checkpoints = checkpoints_of(run, tmp_path)
    checkpoints.restore()

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UsageError, match=r"No space left on device.*is touched"):
        patch.setattr(os, "fsync", no_space)
        checkpoints.save(5)
    assert restored(tmp_path) == (4, [], digests[3])
    checkpoints.save(5, {"cursor": 5})
    assert restored(tmp_path)[0] == 5


@pytest.fixture(scope="module")
def writers() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def newest_is_at_least(step: int, folder: Path, state: State) -> int:
    """The step of the newest checkpoint; every number in it is of that step."""
    found = state.checkpoints.restore()
    assert not state.checkpoints.refused, "nothing but a whole checkpoint may be seen"
    if found is None:
        assert step == 0
        return 0
    assert found[0] >= step and found[1] == {"step": found[0]}
    state.check(found[0])
    return found[0]


def test_killed_at_random_moments_nothing_acknowledged_is_lost(writers: Server, tmp_path: Path) -> None:
    draw, newest = random.Random(1), 0
    state: Any = State(tmp_path)
    for _ in range(30):
        pid = writers.start(tmp_path)
        time.sleep(draw.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
        newest = newest_is_at_least(max([newest, *writers.acknowledged()]), tmp_path, state)
    assert newest > 0, "no writer lived long enough for one checkpoint"


def test_killed_before_every_call_that_changes_the_disk(writers: Server, tmp_path: Path) -> None:
    state, newest, crash_at, died = State(tmp_path), 0, 0, True
    while died:
        crash_at += 1
        writers.start(tmp_path, crash_at)
        acknowledged = writers.acknowledged()
        died = not acknowledged
        newest = newest_is_at_least(max([newest, *acknowledged]), tmp_path, state)
        assert crash_at < 100
    assert crash_at > 10, "there are more calls than that, and before each of them a writer died"
