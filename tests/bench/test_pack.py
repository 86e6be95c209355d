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
    embeddings = (PRESETS["gpt2-100m"].vocab_size or 0) + config["n_positions"]
    assert sum(torch.Size(shape).numel() for shape in shapes) == embeddings * width + layers * per_layer + 2 * width


def test_all_contestants_are_right() -> None:
    data = pack.TensorSet("odd", [(3, 5), (), (1,), (7, 11, 2), (501,)], torch.device("cpu"))
    found = pack.records(measure(pack.contestants(data), Ranks(), 2), data)
    assert {record["op"] for record in found} == {"pack", "unpack"}
    assert len([record for record in found if record["kind"] == "peer"]) == 3
    assert all(record["wrong"] == 0 and record["GBps"] > 0 for record in found if "missing" not in record)
    own = [record for record in found if record["kind"] == "commlab"]
    assert len(own) == 2 and all(record["against_best_other"][0] > 0 for record in own)
    for op in ("pack", "unpack"):
        assert pack.rendered(found, op).count("\n") == 1 + sum(record["op"] == op for record in found)


@pytest.mark.parametrize("op", ["pack", "unpack"])
def test_wrong_numbers_are_counted(op: str) -> None:
    data = pack.TensorSet("small", [(10,), (20,)], torch.device("cpu"))
    data.flat.copy_(data.expected)
    for target, range_ in zip(data.targets, data.ranges, strict=True):
        target.copy_(data.back[range_.start : range_.stop])
    result = data.flat if op == "pack" else data.targets
    assert data.wrong(result) == 0
    (data.flat if op == "pack" else data.targets[1])[3:5] += 1
    assert data.wrong(result) == 2
