"""Jobs of the trainer: the report of a run, and the reason of a failure."""

from __future__ import annotations

from bench.training.jobs import measured, reason_of


def test_a_run_as_the_metrics_tell_it() -> None:
    step = {"tokens": 8, "forward_s": 1.0, "backward_s": 2.0, "exchange_s": 3.0, "update_s": 4.0, "loss": 1.0}
    lines = [{"nodes": 2, "versions": {}}]
    lines += [{**step, "step_s": step_s, "interface_bytes_sent": 7} for step_s in (90.0, 80.0, 10.0, 12.0, 11.0)]
    summary = {"last_loss": 1.5, "held_out_bits_per_byte": 2.5, "bytes_sent_per_rank_and_step": [5, 6]}
    lines.append({"summary": {**summary, "memory_bytes_per_rank": [1, 2]}})
    found = measured(lines)
    assert (found.step_s, found.bytes_sent, found.interface_bytes, found.memory_bytes) == (11.0, 6, 7, 3)
    assert (found.compute_s, found.exchange_s, found.update_s) == (3.0, 3.0, 4.0)
    for line, wait_s in zip(lines[1:6], (9, 9, 1, 5, 0.5), strict=True):
        line |= {"slowest_compute_s": 3.0 + wait_s, "waited_s": min(3.0, wait_s)}
    found = measured(lines)
    assert (found.compute_s, found.exchange_s) == (4.0, 2.0), "what is waited for a slower rank is its computation"


def test_reasons() -> None:
    assert reason_of("step 1\rstep 2\ncommlab: strategy horovod needs Horovod\nmore\n", 2) == (
        "strategy horovod needs Horovod"
    )
    assert reason_of("step 1\rKilled\n\n", 137) == "exit code 137: Killed"
    assert reason_of("", 1) == "exit code 1: it said nothing"
