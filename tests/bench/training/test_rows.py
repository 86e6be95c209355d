"""The rows of the paper's table: the records of their training runs."""

from __future__ import annotations

from measured import measured

from bench.training.rows import HEAD, cells, reduced


def test_numbers_are_medians_of_rounds_and_of_their_ratios() -> None:
    rounds = [measured(step_s) for step_s in (1.0, 3.0, 2.0)]
    single = [measured(step_s) for step_s in (4.0, 6.0, 2.0)]
    found = reduced("dps", 2, rounds, single, [])
    assert found["tokens_per_s"] == 500 and found["step_ms"] == 2000
    assert [found[f"{part}_ms"] for part in ("compute", "exchange", "update")] == [1200, 600, 200]
    assert found["speed_of_single"][0] == 2, "of 4, 2 and 1: not the ratio of the medians"
    assert found["exchange_update_samples_ms"] == [400, 1200, 800]
    assert found["wrong"] == 0 and found["bytes_sent"] == 10**6


def test_what_a_library_hides_in_backward_is_seen_against_another_computation() -> None:
    own = measured(2.0, compute_s=1.7, exchange_s=0.01, update_s=0.1, interface_bytes=5e6)
    found = reduced("horovod", 2, [own], [], [measured(1.0)])
    assert (found["compute_ms"], found["exchange_ms"], found["update_ms"]) == (600, 1300, 100)
    assert found["exchange_is"] != "measured" and found["bytes_sent"] is None
    shown = dict(zip(HEAD, cells(found), strict=True))
    assert (shown["compute"], shown["exchange"], shown["sent MB"], shown["link MB"]) == ("~600.0", "~1300.0", "", "5")
    assert "speed_of_single" not in found


def test_another_loss_is_wrong() -> None:
    found = reduced("ps", 2, [measured(loss=2.1)], [measured()], [])
    assert found["wrong"] == 1
    assert cells(found)[HEAD.index("loss")] == "2.1000 WRONG"
