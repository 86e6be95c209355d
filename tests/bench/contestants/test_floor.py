"""The floor: copies that copy exactly, and the reason where there is no compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.contestants import floor
from bench.contestants.case import Case
from bench.core.harness import ContestantMissing, measure
from bench.core.ranks import Ranks


def test_floor_copies() -> None:
    """Any size, from and to odd places, and not a byte beyond."""
    try:
        ways = floor.load()
    except ContestantMissing as reason:
        pytest.skip(str(reason))
    source = torch.randint(0, 256, (5000,), dtype=torch.uint8)
    for way in ways.values():
        for numel, start, shift in ((0, 0, 0), (1, 3, 5), (63, 1, 0), (64, 0, 1), (65, 7, 9), (4801, 17, 33)):
            target = torch.zeros(5000, dtype=torch.uint8)
            way(target.data_ptr() + start, source.data_ptr() + shift, numel)
            assert torch.equal(target[start : start + numel], source[shift : shift + numel])
            assert not target[:start].any() and not target[start + numel :].any()


def test_floor_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    results = measure(floor.blocks(Case("allreduce", 8, torch.float32, 0, 1)), Ranks(), 1)
    assert "floor.cpp failed" in results[0].missing
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ContestantMissing, match="install g"):
        floor.build()
