"""The server's state machine: 100 random interleavings against a plain replay of its log, the SSP rule, bad input."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from interleaved import ENTRIES, Run, Story, adam, gradient, sgd

from commlab.errors import CommlabError
from commlab.native.norm import clip_factor
from commlab.ps.consistency import Consistency, parse
from commlab.ps.messages import WIRE_CODES, Header, Kind
from commlab.ps.server.server import Server
from commlab.ps.server.shard import Shard

KINDS = {
    "bsp": Story(0, "bsp"),
    "bsp, clipped": Story(0, "bsp", max_grad_norm=0.5, servers=3),
    "bsp, some unused": Story(0, "bsp", skipping=True, workers=4),
    "bsp, bf16 wire": Story(0, "bsp", wire=torch.bfloat16, factory=adam),
    "ssp:0": Story(0, "ssp:0", servers=1),
    "ssp:1": Story(0, "ssp:1", leavers={1: 1}),
    "ssp:4": Story(0, "ssp:4", clocks=8, workers=2, factory=adam),
    "asp": Story(0, "asp", skipping=True, factory=adam),
    "asp, some leave": Story(0, "asp", leavers={0: 0, 2: 2}, wire=torch.float16),
    "one worker": Story(0, "bsp", workers=1, servers=1),
    "bsp, frames": Story(0, "bsp", framed=True, workers=4),
    "bsp, frames, some unused": Story(0, "bsp", framed=True, skipping=True, max_grad_norm=0.5),
    "bsp, frames, unused, at once": Story(0, "bsp", framed=True, skipping=True, wire=torch.bfloat16, factory=adam),
    "bsp, pulls after pushes": Story(0, "bsp", after=True, workers=3),
    "bsp, frames, pulls after pushes": Story(0, "bsp", after=True, framed=True, workers=4, servers=1),
    "ssp:1, frames": Story(0, "ssp:1", framed=True, leavers={1: 1}),
    "asp, frames": Story(0, "asp", framed=True, skipping=True, wire=torch.float16, servers=1),
}


def replayed(run: Run, server: int) -> list[torch.Tensor]:
    """The values that plain torch gets from the log, one update after the other, every slice a tensor of its own."""
    story, slices = run.story, run.servers[server].ledger.shard.slices
    values = [
        run.first_value(owned).view(ENTRIES[owned.entry].shape if not ENTRIES[owned.entry].shape else -1)
        for owned in slices
    ]
    optimizers = [story.factory([value]) for value in values]
    for record in run.logs[server]:
        for at in record.slices:
            owned = slices[at]
            dtype = ENTRIES[owned.entry].dtype
            sent = [
                gradient(worker, clock, owned.entry, owned.start, owned.stop, story.wire or dtype)
                for worker, clock, _ in record.pushes
            ]
            wide = [numbers.float() for numbers in sent]
            total = wide[0].clone()
            for numbers in wide[1:]:
                total += numbers
            if story.consistency == "bsp":
                total /= story.workers
            if record.factor != 1.0:
                total *= record.factor
            values[at].grad = total.to(dtype).view(values[at].shape)
            assert record.hypers.groups is not None
            optimizers[at].param_groups[0].update(record.hypers.groups[ENTRIES[owned.entry].group])
            optimizers[at].step()
    return values


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", KINDS)
def test_any_interleaving_equals_a_replay_of_its_log(kind: str, seed: int) -> None:
    """Bit for bit; and every push is in the log exactly once."""
    run = Run(replace(KINDS[kind], seed=1000 * seed + len(kind))).run()
    for server in run.servers:
        ledger = server.ledger
        for owned, value in zip(ledger.shard.slices, replayed(run, ledger.index), strict=True):
            assert torch.equal(ledger.shard.pieces[owned.number], value), (ledger.index, owned)
        made = Counter(
            (worker, clock, index)
            for record in ledger.log or ()
            for worker, clock, _ in record.pushes
            for index in record.slices
        )
        assert set(made.values()) <= {1}
        wanted = {
            (worker, clock, index) for (where, worker, _, index), clock in run.pushed.items() if where == ledger.index
        }
        assert set(made) == wanted
        assert ledger.closed


def test_bsp_is_the_same_bits_in_any_order() -> None:
    runs = [Run(replace(KINDS["bsp, clipped"], seed=seed)).run() for seed in range(8)]
    for run in runs[1:]:
        for mine, first in zip(run.servers, runs[0].servers, strict=True):
            assert all(
                torch.equal(a, b) for a, b in zip(mine.ledger.shard.pieces, first.ledger.shard.pieces, strict=True)
            )
    factors = {record.factor for run in runs for log in run.logs for record in log}
    assert len(factors) == runs[0].story.clocks and max(factors) < 1.0, "clipped, alike on all servers, in every clock"


def test_the_norm_that_servers_agree_on_is_the_whole_gradients() -> None:
    run = Run(KINDS["bsp, clipped"]).run()
    for clock in range(run.story.clocks):
        means = [
            torch.stack(
                [gradient(worker, clock, at, 0, entry.numel, entry.dtype).double() for worker in range(3)]
            ).mean(0)
            for at, entry in enumerate(ENTRIES)
        ]
        norm = float(torch.cat(means).norm())
        [factor] = {record.factor for log in run.logs for record in log if record.pushes[0][1] == clock}
        assert factor == pytest.approx(clip_factor(norm, 0.5), rel=1e-6)


def staleness_of(run: Run) -> Counter[int]:
    return sum((worker.staleness for server in run.servers for worker in server.ledger.workers), Counter())


def test_staleness_is_recorded_for_every_read_and_bounded() -> None:
    for kind, most in (("bsp", 0), ("ssp:0", 0), ("ssp:1", 1), ("ssp:4", 4), ("asp", None)):
        seen: Counter[int] = Counter()
        for seed in range(6):
            run = Run(replace(KINDS[kind], seed=seed, slow=1, clocks=8, leavers={})).run()
            recorded = staleness_of(run)
            assert recorded == Counter(int(stale) for *_, stale in run.reads)
            seen += recorded
        if most is None:
            assert max(seen) > 4, "asp lets workers run apart"
        else:
            assert max(seen) == most, f"{kind} uses its room, and no more"


class Hasty(Consistency):
    """Without the wait."""

    def may_read(self, clock: int, contained: int) -> bool:
        return True


class Blind(Hasty):
    """Without the server's own check, too."""

    def keeps(self, lacking: int) -> bool:
        return True


class HastyServer(Server):
    consistency: type[Consistency] = Hasty

    def __init__(self, shard, rules, index=0, names=None, log=None):  # type: ignore[no-untyped-def]
        given = rules.consistency
        changed = self.consistency(given.name, given.staleness, given.averages)
        super().__init__(shard, rules._replace(consistency=changed), index, names, log)


class BlindServer(HastyServer):
    consistency = Blind


def test_without_the_wait_the_servers_own_check_fails() -> None:
    caught = 0
    for seed in range(10):
        try:
            Run(Story(seed, "ssp:1", clocks=6, slow=1), HastyServer).run()
        except CommlabError as error:
            assert "which ssp:1 does not allow" in str(error)
            caught += 1
    assert caught >= 8, "nearly every order of messages shows it"


def test_without_the_wait_values_lack_what_ssp_promises() -> None:
    """The same seen from outside, so that the check itself is not all there is."""
    lacking = 0
    for seed in range(10):
        try:
            Run(Story(seed, "ssp:1", clocks=6, slow=1), BlindServer).run()
        except AssertionError as error:
            lacking += "lacks" in str(error)
    assert lacking >= 8


def served(consistency: str = "bsp", workers: int = 2) -> Run:
    """A server that has its first values, and workers that have sent nothing yet."""
    return Run(Story(0, consistency, workers=workers, servers=1))


def send(run: Run, worker: int, header: Header, data: torch.Tensor | None = None) -> list[tuple[int, Header, str]]:
    """Deliver one message; the answers, with their text."""
    body = torch.empty(0, dtype=torch.uint8) if data is None else data.view(-1).view(torch.uint8)
    assert run._deliver(worker, 0, header._replace(length=body.numel()), body)
    ledger = run.servers[0].ledger
    outbox, ledger.outbox = ledger.outbox, []
    return [
        (peer, head, bytes(text.numpy()).decode(errors="ignore") if text is not None else "")
        for peer, head, text in outbox
    ]


FP32 = WIRE_CODES[torch.float32]


@pytest.mark.parametrize(
    ("header", "numbers", "reason"),
    [
        (Header(Kind.PUSH, 99, 1, wire=FP32), 7, "parts 99..99 do not lie side by side on server 0"),
        (Header(Kind.PUSH, 1, 0, wire=FP32), 7, "do not lie side by side"),
        (Header(Kind.PUSH, 1, 1, wire=FP32), 6, "'bias' takes 28 B, and 24 B came"),
        (Header(Kind.PUSH, 1, 1, wire=WIRE_CODES[torch.float64]), 7, "'bias' is float32 and can't travel as float64"),
        (Header(Kind.PUSH, 1, 1, wire=77), 7, "can't travel as code 77"),
        (Header(Kind.PUSH, 1, 1, clock=3, wire=FP32), 7, "for clock 3, and it is at clock 0"),
        (Header(Kind.PULL, 99, 1, wire=FP32), 0, "do not lie side by side"),
        (Header(Kind.CLOCK, clock=5), 0, "can't end clock 5: it is at clock 0"),
        (Header(Kind.VALUES, 1, 1), 0, "VALUES is not a request"),
    ],
)
@pytest.mark.parametrize("consistency", ["bsp", "asp"])
def test_bad_messages_are_answered_to_who_sent_them(
    header: Header, numbers: int, reason: str, consistency: str
) -> None:
    """And the server lives on, with what it had."""
    run = served(consistency)
    dtype = header.dtype or torch.float32
    before = [piece.clone() for piece in run.servers[0].ledger.shard.pieces]
    [(peer, answer, text)] = send(run, 1, header, torch.ones(numbers, dtype=dtype))
    assert (peer, answer.kind) == (1, Kind.ERROR) and reason in text
    assert all(torch.equal(a, b) for a, b in zip(run.servers[0].ledger.shard.pieces, before, strict=True))
    good = Header(Kind.PUSH, 1, 1, wire=FP32)
    for worker in range(2):
        assert send(run, worker, good, torch.ones(7))[0][1].kind == Kind.ACK
    assert not torch.equal(run.servers[0].ledger.shard.pieces[1], before[1])


def test_push_before_the_first_value_is_refused() -> None:
    run = served()
    run.servers[0] = Server(Shard(run.placement, 0, run.story.factory, 2), run.servers[0].ledger.rules)
    for kind in (Kind.PUSH, Kind.PULL):
        data = torch.ones(7) if kind == Kind.PUSH else None
        [(_, answer, text)] = send(run, 0, Header(kind, 1, 1, wire=FP32), data)
        assert answer.kind == Kind.ERROR and "before it had a first value" in text
    assert send(run, 0, Header(Kind.INIT, 1, 1, wire=FP32), torch.ones(7))[0][1].kind == Kind.ACK
    assert send(run, 0, Header(Kind.PULL, 1, 1, wire=FP32))[0][1].kind == Kind.VALUES


def test_a_second_push_in_one_clock_is_refused_under_bsp() -> None:
    run = served()
    push = Header(Kind.PUSH, 1, 1, wire=FP32)
    assert send(run, 0, push, torch.ones(7))[0][1].kind == Kind.ACK
    [(_, answer, text)] = send(run, 0, push, torch.full((7,), 5.0))
    assert answer.kind == Kind.ERROR and "twice in clock 0" in text
    before = run.servers[0].ledger.shard.pieces[1].clone()
    send(run, 1, push, torch.ones(7))
    assert torch.allclose(run.servers[0].ledger.shard.pieces[1], before - 0.1), "the second one left no trace"


def test_workers_that_disagree_on_hyperparameters_are_refused() -> None:
    run = served()
    push = Header(Kind.PUSH, 1, 1, wire=FP32)

    def send_lr(worker: int, lr: float) -> None:
        text = b'{"groups": [{"lr": %g}, {"lr": 1}], "scale": 1.0}' % lr
        send(run, worker, Header(Kind.HYPER), torch.frombuffer(bytearray(text), dtype=torch.uint8))

    send_lr(0, 0.5)
    send_lr(1, 0.25)
    send(run, 0, push, torch.ones(7))
    [(peer, answer, text)] = send(run, 1, push, torch.ones(7))
    assert peer == 1 and answer.kind == Kind.ERROR
    assert "worker 1 to be updated with lr=0.25 in group 0 in clock 0, by worker 0 with lr=0.5" in text
    send_lr(1, 0.5)
    before = run.servers[0].ledger.shard.pieces[1].clone()
    assert send(run, 1, push, torch.ones(7))[0][1].kind == Kind.ACK
    assert torch.allclose(run.servers[0].ledger.shard.pieces[1], before - 0.5), "and can still do better"


def test_bsp_tells_who_waits_for_a_worker_that_has_left() -> None:
    run = served()
    push, pull = Header(Kind.PUSH, 1, 1, wire=FP32), Header(Kind.PULL, 1, 1, clock=1, wire=FP32)
    send(run, 0, push, torch.ones(7))
    send(run, 0, Header(Kind.CLOCK, clock=0))
    assert send(run, 0, pull) == []
    answers = {peer: (head.kind, text) for peer, head, text in send(run, 1, Header(Kind.LEAVE))}
    assert answers[1][0] == Kind.ACK and answers[0][0] == Kind.ERROR
    assert "worker 0 waits at clock 1 for worker 1 (at clock 0), which has left" in answers[0][1]


@pytest.mark.parametrize(("consistency", "waits"), [("ssp:1", True), ("asp", False)])
def test_a_worker_that_leaves_holds_nobody_back(consistency: str, waits: bool) -> None:
    run = served(consistency)
    for clock in range(2):
        send(run, 0, Header(Kind.CLOCK, clock=clock))
    assert (send(run, 0, Header(Kind.PULL, 1, 1, clock=2, wire=FP32)) == []) == waits
    kinds = [head.kind for _, head, _ in send(run, 1, Header(Kind.LEAVE))]
    assert sorted(kinds) == ([Kind.ACK, Kind.VALUES] if waits else [Kind.ACK])
    [(_, answer, text)] = send(run, 1, Header(Kind.PUSH, 1, 1, wire=FP32), torch.ones(7))
    assert answer.kind == Kind.ERROR and "which has left" in text


def test_who_waits_too_long_is_told_for_whom() -> None:
    run = served("ssp:0", workers=3)
    server = run.servers[0]
    send(run, 0, Header(Kind.CLOCK, clock=0))
    send(run, 2, Header(Kind.CLOCK, clock=0))
    server.ledger.now_s = 100.0
    send(run, 0, Header(Kind.PULL, 1, 1, clock=1, wire=FP32))
    server.ledger.now_s = 109.0
    server.give_up(10.0)
    assert not server.ledger.outbox
    server.ledger.now_s = 112.0
    server.give_up(10.0)
    [(peer, answer, text)] = server.ledger.outbox
    assert peer == 0 and answer.kind == Kind.ERROR and text is not None
    assert "worker 0 has waited 12.0 s at clock 1 for worker 1 (at clock 0)" in bytes(text.numpy()).decode()


def test_consistency_as_text() -> None:
    assert parse("bsp") == Consistency("bsp", 0, True)
    assert parse("ssp:4") == Consistency("ssp:4", 4, False)
    assert parse("asp") == Consistency("asp", None, False)
    for wrong in ("ssp", "ssp:", "ssp:-1", "ssp:x", "bsp:1", "BSP", ""):
        with pytest.raises(CommlabError, match="give bsp"):
            parse(wrong)


def test_sgd_is_what_it_is_called() -> None:
    """The replay would not notice an optimizer that is never called."""
    run = Run(replace(KINDS["one worker"], clocks=1, factory=sgd)).run()
    shard = run.servers[0].ledger.shard
    for owned, value in zip(shard.slices, shard.pieces, strict=True):
        entry = ENTRIES[owned.entry]
        lr = 0.05 if entry.group else 0.1
        wanted = (
            run.first_value(owned).double()
            - lr * gradient(0, 0, owned.entry, owned.start, owned.stop, entry.dtype).double()
        )
        assert torch.allclose(value.double().view(-1), wanted, atol=5e-3 if entry.dtype == torch.bfloat16 else 1e-6)
