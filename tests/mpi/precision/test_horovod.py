"""Horovod in 16 bits, on all ranks of the launch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import SAMPLES, STEPS, learner, lesson, taught
from mpi_ranks import Ranks

import commlab
from commlab import apex
from commlab.chunks import split
from commlab.precision.loss_scale import LossScale
from commlab.runtime.control import gather_bytes

LEAVES = "Horovod's thread, which takes part in what MPI does until the process ends"


def test_horovod_in_16_bits(ranks: Ranks) -> None:
    """On all ranks of the launch: follows fp32 on both wires, and an inf on one rank skips the step on all."""
    pytest.importorskip("horovod.torch")
    group = ranks.world
    _, wanted, _, _ = taught("horovod", group)
    for precision, wire in (("bf16", None), ("fp16", None), ("fp16", "fp16")):
        engine, got, _, updates = taught("horovod", group, precision=precision, autocast="on", wire=wire)
        assert all(updates) and engine.precision.casts
        for step, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
            assert abs(mine - theirs) <= 0.02 * theirs, f"step {step}: {mine:.4f}, in fp32 {theirs:.4f}"

    def tamper(loss: torch.Tensor, step: int) -> torch.Tensor:
        return loss * math.inf if step == 7 and group.rank == 3 else loss

    options: dict[str, Any] = {"precision": "fp16", "autocast": "off", "max_grad_norm": 1.0}
    hurt, _, digests, updates = taught("horovod", group, tamper=tamper, **options)
    _, _, flagged, _ = taught("horovod", group, skip=7, **options)
    assert updates == [step != 7 for step in range(STEPS)] and hurt.skipped_steps == 1
    assert digests == flagged


def test_horovod_with_apex(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stand-in for Apex: the same as ``allreduce`` with it, to the rounding of Horovod's fp16 sums."""
    pytest.importorskip("horovod.torch")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "tests/helpers/fake_apex"))
    monkeypatch.setattr(apex, "_sees_gpu", lambda: True)

    def curve(strategy: str) -> list[float]:
        model = learner()
        optimizer = apex.fused_adam(model.parameters(), lr=0.02)
        # Low, because Horovod adds in fp16 before it divides: sums overflow where means do not.
        low = LossScale(value=16.0)
        engine = commlab.strategy(strategy, model, optimizer, ranks.world, precision="apex", loss_scale=low)
        losses = []
        for step in range(STEPS):
            inputs, targets = lesson(step)
            own = split(SAMPLES, ranks.size)[ranks.rank]
            loss = (engine.model(inputs[own.start : own.stop].half()).float() - targets[own.start : own.stop]).square()
            engine.backward(loss.sum(), own.numel, SAMPLES)
            assert engine.step()
            engine.zero_grad()
            losses.append(float(loss.detach().sum()))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
        engine.close()
        rows = gather_bytes(ranks.world, torch.tensor(losses).numpy().tobytes(), "losses")
        return torch.stack([torch.frombuffer(bytearray(row), dtype=torch.float32) for row in rows]).sum(0).tolist()

    mine, wanted = curve("horovod"), curve("allreduce")
    assert wanted[-1] < wanted[0] / 3
    assert mine == pytest.approx(wanted, rel=0.02)
