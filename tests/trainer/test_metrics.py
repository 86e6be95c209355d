"""The file of metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path

from commlab.trainer.metrics import Metrics


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    """Also of a step that was left out because its loss or its gradient was not finite."""
    path = tmp_path / "run.jsonl"
    metrics = Metrics(str(path), None, append=False)
    metrics.write({"step": 0, "loss": math.nan, "grad_norm": math.inf, "parts": [1.5, -math.inf, ("a", math.nan)]})
    metrics.write({"step": 1, "loss": 0.1 + 0.2, "skipped": True, "more": {"text": "NaN", "none": None}})
    metrics.close()

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert rows == [
        {"step": 0, "loss": None, "grad_norm": None, "parts": [1.5, None, ["a", None]]},
        {"step": 1, "loss": 0.1 + 0.2, "skipped": True, "more": {"text": "NaN", "none": None}},
    ]
    assert not metrics.trouble
