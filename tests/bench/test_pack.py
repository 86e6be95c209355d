"""bench.pack: the shapes are the model's, every contestant is right, and a wrong number is seen."""

from __future__ import annotations

import pytest
import torch

from bench import pack
from bench.core.harness import measure
from bench.core.ranks import Ranks
from commlab.trainer.model import PRESETS


def test_the_shapes_are_gpt2_100ms() -> None:
    shapes, config = pack.gpt2_100m(), PRESETS["gpt2-100m"].config
    width, layers = config["n_embd"], config["n_layer"]
    assert len(shapes) == 148 == 12 * layers + 4
    per_layer = 12 * width**2 + 13 * width
    rows = (PRESETS["gpt2-100m"].vocab_size or 0) + config["n_positions"]
    assert sum(torch.Size(shape).numel() for shape in shapes) == rows * width + layers * per_layer + 2 * width


def test_all_contestants_are_right() -> None:
    work = pack.Work("odd", [(3, 5), (), (1,), (7, 11, 2), (501,)], torch.device("cpu"))
    found = pack.rows(measure(pack.contestants(work), Ranks(), 2), work)
    assert {row["op"] for row in found} == {"pack", "unpack"}
    assert len([row for row in found if row["kind"] == "peer"]) == 3
    assert all(row["wrong"] == 0 and row["GBps"] > 0 for row in found if "missing" not in row)
    ours = [row for row in found if row["kind"] == "commlab"]
    assert len(ours) == 2 and all(row["against_best_other"][0] > 0 for row in ours)
    for op in ("pack", "unpack"):
        assert pack.rendered(found, op).count("\n") == 1 + sum(row["op"] == op for row in found)


@pytest.mark.parametrize("op", ["pack", "unpack"])
def test_wrong_numbers_are_counted(op: str) -> None:
    work = pack.Work("small", [(10,), (20,)], torch.device("cpu"))
    work.flat.copy_(work.expected)
    for target, place in zip(work.targets, work.ranges, strict=True):
        target.copy_(work.back[place.start : place.stop])
    result = work.flat if op == "pack" else work.targets
    assert work.wrong(result) == 0
    (work.flat if op == "pack" else work.targets[1])[3:5] += 1
    assert work.wrong(result) == 2
