"""bench.step: the records of its contestants."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from bench.step import Spent, cells, records


def test_the_fastest_peer_that_is_right_is_compared_with() -> None:
    samples = {"dps": ([2.0, 3.0], 0), "gloo": ([1.0, 1.0], 4), "ddp": ([4.0, 6.0], 0), "horovod": ([8.0, 8.0], 0)}
    steppers: dict[str, Any] = {
        name: SimpleNamespace(samples_s=times, wrong=wrong, spent=[Spent(0.25, 8), Spent(0.5, 10)])
        for name, (times, wrong) in samples.items()
    }
    ranks: Any = SimpleNamespace(size=2)
    found = {record["contestant"]: record for record in records(steppers, ranks, "gpt2-tiny", 10)}
    assert found["dps"]["best_peer"] == "ddp" and found["dps"]["ratio_best_peer"][0] == 0.5
    assert "best_peer" not in found["ddp"] and found["horovod"]["kind"] == "peer" and found["dps"]["kind"] == "commlab"
    assert (found["dps"]["cpu_us"], found["dps"]["switches"]) == (375_000.0, 9), "medians of all steps"
    assert cells(found["dps"])[-1].endswith(" ddp") and cells(found["ddp"])[-1] == ""
