"""Precisions on 2, 3 and 4 ranks: 16 bits follow fp32's loss, and a step that overflows anywhere happens nowhere."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training
from lessons import STEPS, taught
from mpi_ranks import Ranks
from mpi_strategies import OURS
from mpi_windows import close_all, few_ranks, window_group

import commlab
from commlab.runtime.control import gather_bytes
from commlab.runtime.group import Group
from commlab.trainer.data.batches import Blocks
from commlab.trainer.data.corpus import load_corpus
from commlab.trainer.model import build_model, loss_sum

SEQ_LEN = 32


@pytest.fixture(scope="module", autouse=True)
def close_groups() -> Iterator[None]:
    yield
    close_all()


@cache
def in_fp32(strategy: str, group: Group) -> tuple[list[float], list[bytes]]:
    """The losses and the digests of every step."""
    _, losses, digests, _ = taught(strategy, group, max_grad_norm=5.0)
    return losses, digests


@pytest.mark.parametrize("strategy", [*OURS, "ddp"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("wire", ["as is", "the precision's"])
def test_16_bits_follow_the_loss_of_fp32(ranks: Ranks, strategy: str, precision: str, wire: str) -> None:
    if strategy == "ddp" and wire != "as is":
        pytest.skip("torch's own sends gradients as they are")
    options = {"wire": precision} if wire != "as is" else {}
    for group in few_ranks(ranks):
        wanted, fp32 = in_fp32(strategy, group)
        engine, got, digests, updates = taught(
            strategy, group, precision=precision, autocast="on", max_grad_norm=5.0, **options
        )
        assert engine.precision.casts and engine.precision.reason == "autocast on"
        assert all(updates) and engine.skipped_steps == 0
        assert wanted[-1] < wanted[0] / 3, "there was nothing to follow"
        for step, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
            assert abs(mine - theirs) <= 0.02 * theirs, f"step {step}: {mine:.4f}, in fp32 {theirs:.4f}"
        assert digests[0] != fp32[0], "nothing was computed in 16 bits"


BAD = 7
"""The step that overflows, or is left out."""

FACTORS = (math.inf, math.nan, 1e38)
"""What the loss of one rank is multiplied by in that step. The last one overflows only in the gradients."""


def scaled(optimizer: str, clip: float | None, wire: str | None) -> dict[str, Any]:
    return {
        "precision": "fp16",
        "autocast": "off",
        "max_grad_norm": clip,
        "optimizer": optimizer,
        "wire": wire,
        "scale": 16.0,
        "growth_interval": 4,
    }


@cache
def left_out(
    strategy: str, group: Group, optimizer: str, clip: float | None, wire: str | None
) -> tuple[float, list[bytes]]:
    """The last scale and the digests of every step, where one step is not taken at all."""
    engine, _, digests, _ = taught(strategy, group, skip=BAD, **scaled(optimizer, clip, wire))
    return engine.precision.scale, digests


@pytest.mark.parametrize("strategy", [*OURS, "ddp"])
@pytest.mark.parametrize("optimizer, clip", [("AdamW", None), ("SGD", 1.0)])
@pytest.mark.parametrize("factor", FACTORS, ids=str)
def test_an_inf_on_one_rank_skips_the_step_on_all(
    ranks: Ranks, strategy: str, optimizer: str, clip: float | None, factor: float
) -> None:
    """Bit for bit what comes out when the step is left out; the scale halves, and grows again after 4 good steps."""
    if strategy == "ddp" and (optimizer == "SGD" or factor == 1e38):
        pytest.skip("one case of torch's own is enough")
    # Each wire with every factor and every optimizer, in half of the combinations.
    wire = "fp16" if strategy != "ddp" and (FACTORS.index(factor) + (optimizer == "SGD")) % 2 else None
    for group in few_ranks(ranks):

        def tamper(loss: torch.Tensor, step: int) -> torch.Tensor:
            return loss * factor if step == BAD and group.rank == group.size - 1 else loss  # noqa: B023

        hurt, _, digests, updates = taught(strategy, group, tamper=tamper, **scaled(optimizer, clip, wire))
        scale, wanted = left_out(strategy, group, optimizer, clip, wire)
        assert updates == [step != BAD for step in range(STEPS)]
        assert hurt.skipped_steps == 1
        assert digests == wanted, (
            f"different from step {[a == b for a, b in zip(digests, wanted, strict=True)].index(False)} on"
        )
        assert digests[BAD] == digests[BAD - 1]
        assert hurt.precision.scale == scale == 16.0 * 2 * 0.5 * 2 * 2 * 2


@pytest.mark.parametrize("strategy", OURS)
def test_a_scale_that_is_too_high_comes_down_by_itself(ranks: Ranks, strategy: str) -> None:
    for group in few_ranks(ranks):
        engine, losses, digests, updates = taught(
            strategy, group, precision="fp16", autocast="on", wire="fp16", scale=2.0**24
        )
        first = updates.index(True)
        assert 2 <= first <= 16
        assert len(set(digests[:first])) == 1, "a skipped step changed something"
        assert engine.skipped_steps == updates.count(False)
        assert losses[-1] < losses[0]
        assert engine.precision.scale < 2.0**24


@cache
def text() -> Blocks:
    tokens = load_corpus(str(Path(json.__file__).parent)).train
    return Blocks(tokens[: 2 * STEPS * SEQ_LEN + 1], SEQ_LEN)


@cache
def gpt2_losses(strategy: str, group: Group | None, precision: str) -> list[float]:
    """Mean loss per token of 20 steps of 1 x 32 tokens a rank, on 2 ranks; ``single`` does the work of both."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "config.json")
        shape = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": SEQ_LEN, "vocab_size": 257}
        config.write_text(json.dumps({"model_type": "gpt2", **shape}))
        model = build_model(str(config), seq_len=SEQ_LEN, vocab_size=257, dropout=0.0, seed=7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    autocast = "off" if precision == "fp32" else "on"
    group = training.alone() if group is None else group
    engine = commlab.strategy(strategy, model, optimizer, group, precision=precision, autocast=autocast)
    losses, each = [], 2 // group.size
    for step in range(STEPS):
        samples = range(2 * step + group.rank, 2 * step + group.rank + each)
        with engine.autocast():
            loss, count = loss_sum(engine.model, *text().batch(np.array(samples))[:2])
        engine.backward(loss, count, 2 * SEQ_LEN)
        assert engine.step()
        engine.zero_grad()
        losses.append(float(loss.detach()))
    engine.close()
    rows = gather_bytes(group, torch.tensor(losses).numpy().tobytes(), "losses")
    total = torch.stack([torch.frombuffer(bytearray(row), dtype=torch.float32) for row in rows]).sum(0)
    return (total / (2 * SEQ_LEN)).tolist()


@pytest.mark.parametrize("strategy", [*OURS, "ddp"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gpt2_with_autocast_follows_fp32(ranks: Ranks, strategy: str, precision: str) -> None:
    group = window_group(ranks, 0, 1)
    if group is not None:
        wanted, got = gpt2_losses("single", None, "fp32"), gpt2_losses(strategy, group, precision)
        assert wanted[-1] < wanted[0] - 1, "there was nothing to follow"
        for step, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
            assert abs(mine - theirs) <= 0.02 * theirs, f"step {step}: {mine:.4f}, in fp32 {theirs:.4f}"
        assert got != wanted
