"""Two result files compared: what changed against the yardstick of its own run, and what is noise."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import compare
from bench.core import results


def write(path: Path, times: dict[str, Sequence[float]], mpi: str = "MPICH", **columns: Any) -> str:
    """A result file of one run with these contestants' samples, in microseconds."""
    kinds = {"copy": "floor", "peer": "peer"}
    common = {"type": "row", "op": "allreduce", "bytes": 1000, "dtype": "float32", "ranks": 2, **columns}
    found = [
        {**common, "contestant": name, "kind": kinds.get(name, "commlab"), "samples_us": list(samples)}
        if samples
        else {**common, "contestant": name, "kind": "peer", "missing": "gone"}
        for name, samples in times.items()
    ]
    run = {"type": "run", "hardware": {"cpu": "a"}, "versions": {"mpi": mpi, "torch": "2"}}
    results.append(path, [run, *found])
    return str(path)


def noisy(middle: float, spread: float, seed: int, rounds: int = 11) -> list[float]:
    draw = random.Random(seed)
    return [middle * math.exp(draw.uniform(-spread, spread)) for _ in range(rounds)]


def verdicts(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, str], str]:
    code = compare.main(arguments)
    text = capsys.readouterr().out
    found = {}
    for line in text.splitlines():
        words = line.split()
        if line.startswith("  ") and words and words[0] in ("ring", "tree", "direct", "halving"):
            found[words[0]] = words[-1] if words[-1] in ("faster", "slower") else "same"
    return code, found, text


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """B ran on a machine three times as slow: only what changed against the peer of its own run is a change."""
    before = {
        "ring": noisy(50, 0.1, 1),
        "tree": noisy(50, 0.1, 2),
        "direct": noisy(50, 1.0, 3),
        "halving": noisy(50, 0.1, 4),
    }
    after = {
        "ring": noisy(225, 0.1, 5),
        "tree": noisy(100, 0.1, 6),
        "direct": noisy(225, 1.0, 7),
        "halving": noisy(153, 0.1, 8),
    }
    a = write(tmp_path / "a.jsonl", {"peer": noisy(100, 0.02, 9), **before})
    b = write(tmp_path / "b.jsonl", {"peer": noisy(300, 0.02, 10), **after})
    code, found, text = verdicts(capsys, a, b)
    assert (code, found) == (0, {"ring": "slower", "tree": "faster", "direct": "same", "halving": "same"}), text
    assert "1 faster, 1 slower, 2 same" in text and "1KB of float32, 2 ranks; time / peer (" in text
    assert verdicts(capsys, a, b, "--fail-above", "20")[0] == 1
    assert verdicts(capsys, a, b, "--fail-above", "80")[0] == 0
    assert verdicts(capsys, a, b, "--against", "time")[1]["tree"] == "slower"
    assert set(verdicts(capsys, a, a)[1].values()) == {"same"}


def test_compare_small_and_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(
        tmp_path / "a.jsonl", {"peer": [100.0] * 11, "ring": [50.0] * 11, "tree": [50.0] * 11, "direct": [1.0] * 11}
    )
    b = write(tmp_path / "b.jsonl", {"peer": [100.0] * 11, "ring": [52.0] * 11, "tree": []}, mpi="Open MPI")
    code, found, text = verdicts(capsys, a, b)
    assert (code, found) == (0, {"ring": "same"}) and "mpi: MPICH -> Open MPI" in text
    assert "only in A: 1 rows" in text and "tree: gone" in text
    assert verdicts(capsys, a, b, "--least", "3")[1] == {"ring": "slower"}
    assert verdicts(capsys, a, b, "--fail-above", "50")[0] == 1, "a row that is lost is a failure"


def test_compare_keeps_two_mpis_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for mpi, us in (("MPICH", 50.0), ("Open MPI", 70.0)):
        a = write(tmp_path / "a.jsonl", {"peer": [100.0] * 11, "ring": [us] * 11}, mpi=mpi)
    _, found, text = verdicts(capsys, a, a)
    assert found == {"ring": "same"} and "2 ranks, MPICH;" in text and "2 ranks, Open MPI;" in text


@pytest.mark.parametrize("content", ["", "not json\n", '{"type": "row"}\n', '{"no": "type"}\n'])
def test_compare_refuses_what_is_no_result_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    good = write(tmp_path / "a.jsonl", {"peer": [1.0]})
    bad = tmp_path / "b.jsonl"
    bad.write_text(content)
    assert compare.main([good, str(bad)]) == 2
    assert str(bad) in capsys.readouterr().err
    assert compare.main([good, str(tmp_path / "none.jsonl")]) == 2
