"""The rules of options: each is broken by some choice, and refuses it in a program's words and in a command line's."""

from __future__ import annotations

import dataclasses
import string
from typing import Any, NamedTuple

import pytest
import torch
from crew import groups
from training import alone

import commlab
from commlab.errors import UsageError
from commlab.native.dtypes import WIRES
from commlab.precision.modes import PRECISIONS
from commlab.strategies import STRATEGIES
from commlab.strategies.options import KNOWN, RULES, Choice, Options, Rule
from commlab.trainer.config import Config


class Case(NamedTuple):
    """A choice that breaks one rule, in both spellings, and what the message must say beside the options."""

    rule: tuple[str, ...]
    strategy: str
    options: dict[str, Any]
    size: int
    flags: str
    keywords: tuple[str, ...]
    """What the message of commlab.strategy() names: options, values, and the way out."""
    spoken: tuple[str, ...]
    """The same of the command line's."""


CASES = (
    Case(
        ("max_grad_norm",), "dps", {"max_grad_norm": -0.5}, 1, "--max-grad-norm -0.5",
        ("max_grad_norm must be positive, not -0.5", "max_grad_norm=None turns clipping off"),
        ("--max-grad-norm must be positive, not -0.5", "--max-grad-norm 0 turns clipping off"),
    ),
    Case(
        ("overlap", "strategy"), "horovod", {"overlap": False}, 1, "--strategy horovod --overlap off",
        ("overlap=False: strategy horovod sends no buckets", "leave it on, or take one of ps, dps, allreduce"),
        ("--overlap off: --strategy horovod sends no buckets", "leave it on, or take one of ps, dps, allreduce"),
    ),
    Case(
        ("algorithm", "strategy"), "ddp", {"algorithm": "ring"}, 1, "--strategy ddp --algorithm ring",
        ("algorithm='ring' has no meaning for strategy ddp", "leave it out, or take one of ps, dps, allreduce"),
        ("--algorithm ring has no meaning for --strategy ddp", "leave it out, or take one of ps, dps, allreduce"),
    ),
    Case(
        ("algorithm", "strategy"), "ps", {"algorithm": "hierarchical"}, 2, "--strategy ps --algorithm hierarchical",
        ("algorithm='hierarchical'", "strategy ps pushes and pulls", "algorithm='auto'", "strategy allreduce"),
        ("--algorithm hierarchical", "--strategy ps pushes and pulls", "--algorithm auto", "--strategy allreduce"),
    ),
    Case(
        ("shard", "strategy"), "allreduce", {"shard": "node"}, 2, "--strategy allreduce --shard node",
        ("shard='node' with strategy allreduce", "only ps and dps push", "leave it out, or take strategy ps or"),
        ("--shard node with --strategy allreduce", "only ps and dps push", "leave it out, or take --strategy ps"),
    ),
    Case(
        ("shard", "servers"), "dps", {"servers": 2, "shard": "job"}, 4, "--servers 2 --shard job",
        ("shard='job' with servers=2", "leave one of the two out"),
        ("--shard job with --servers 2", "leave one of the two out"),
    ),
    Case(
        ("wire", "strategy"), "single", {"wire": "fp16"}, 1, "--strategy single --wire fp16",
        ("wire='fp16' has no meaning for strategy single", "leave it out"),
        ("--wire fp16 has no meaning for --strategy single", "leave it out"),
    ),
    Case(
        ("wire", "strategy"), "ddp", {"wire": "bf16"}, 1, "--strategy ddp --precision bf16",
        ("wire='bf16'", "strategy ddp sends gradients as they are", "give wire=None, or take one of ps, dps"),
        ("--wire bf16", "--strategy ddp sends gradients as they are", "give --wire none, or take one of ps, dps"),
    ),
    Case(
        ("wire", "strategy"), "horovod", {"wire": "bf16"}, 1, "--strategy horovod --wire bf16",
        ("wire='bf16' with strategy horovod", "give wire='fp16' or wire=None, or take strategy allreduce"),
        ("--wire bf16 with --strategy horovod", "give --wire fp16 or --wire none, or take --strategy allreduce"),
    ),
    Case(
        ("autocast", "precision"), "dps", {"autocast": "on", "precision": "apex"}, 1, "--autocast on --precision apex",
        ("autocast='on' has no meaning for precision='apex'", "give precision='bf16' or precision='fp16'"),
        ("--autocast on has no meaning for --precision apex", "give --precision bf16 or --precision fp16"),
    ),
    Case(
        ("apex_level", "precision"), "dps", {"apex_level": "O2", "precision": "fp16"}, 1,
        "--apex-level O2 --precision fp16",
        ("apex_level='O2' has no meaning for precision='fp16'", "leave it out, or give precision='apex'"),
        ("--apex-level O2 has no meaning for --precision fp16", "leave it out, or give --precision apex"),
    ),
    Case(
        ("consistency", "servers"), "dps", {"consistency": "ssp:2"}, 4, "--consistency ssp:2",
        ("consistency='ssp:2' needs ranks that only serve", "servers=1 with strategy ps", "servers=2 or more with"),
        ("--consistency ssp:2 needs ranks that only serve", "--servers 1 with --strategy ps", "--servers 2 or more"),
    ),
    Case(
        ("servers", "strategy"), "allreduce", {"servers": 2}, 4, "--strategy allreduce --servers 2",
        ("servers=2 with strategy allreduce", "servers=1 with strategy ps", "or leave it out"),
        ("--servers 2 with --strategy allreduce", "--servers 1 with --strategy ps", "or leave it out"),
    ),
    Case(
        ("algorithm", "servers"), "dps", {"servers": 2, "algorithm": "hierarchical"}, 4,
        "--servers 2 --algorithm hierarchical",
        ("algorithm='hierarchical' is for collectives", "servers=2", "leave it out"),
        ("--algorithm hierarchical is for collectives", "--servers 2", "leave it out"),
    ),
    Case(
        ("precision", "servers"), "ps", {"servers": 1, "precision": "apex"}, 4,
        "--strategy ps --servers 1 --precision apex",
        ("precision='apex' with servers=1", "leave servers out, or give precision='fp16'"),
        ("--precision apex with --servers 1", "leave --servers out, or give --precision fp16"),
    ),
    Case(
        ("max_grad_norm", "consistency"), "ps", {"servers": 1, "consistency": "asp", "max_grad_norm": 1.0}, 4,
        "--strategy ps --servers 1 --consistency asp --max-grad-norm 1",
        ("max_grad_norm=1.0 needs all", "under consistency='asp'", "give max_grad_norm=None or consistency='bsp'"),
        ("--max-grad-norm 1.0 needs all", "under --consistency asp", "give --max-grad-norm 0 or --consistency bsp"),
    ),
    Case(
        ("precision", "consistency"), "dps", {"servers": 2, "consistency": "ssp:0", "precision": "fp16"}, 4,
        "--servers 2 --consistency ssp:0 --precision fp16",
        ("precision='fp16' can't be had under consistency='ssp:0'", "give precision='bf16' or consistency='bsp'"),
        ("--precision fp16 can't be had under --consistency ssp:0", "give --precision bf16 or --consistency bsp"),
    ),
    Case(
        ("nonfinite", "consistency"), "ps", {"servers": 1, "consistency": "asp", "nonfinite": "skip"}, 4,
        "--strategy ps --servers 1 --consistency asp --nonfinite skip",
        ("nonfinite='skip' can't be had under consistency='asp'", "give nonfinite='error' or consistency='bsp'"),
        ("--nonfinite skip can't be had under --consistency asp", "give --nonfinite error or --consistency bsp"),
    ),
    Case(
        ("check_replicas",), "dps", {"check_replicas": -1}, 1, "--check-replicas -1",
        ("check_replicas must be 0 or more steps, not -1", "check_replicas=0 compares"),
        ("--check-replicas must be at least 0",),
    ),
    Case(
        ("strategy",), "single", {}, 3, "--strategy single",
        ("strategy single trains on one rank, and this job has 3 ranks", "take another strategy"),
        ("--strategy single trains on one rank, and this job has 3 ranks", "take another strategy"),
    ),
    Case(
        ("servers",), "ps", {"servers": 1}, 1, "--strategy ps --servers 1",
        ("servers=1 of 1 rank leave none to train", "start more ranks, or give fewer servers"),
        ("--servers 1 of 1 rank leave none to train", "start more ranks, or give fewer servers"),
    ),
)  # fmt: skip


def broken_by(case: Case) -> Rule:
    """The rule that speaks first."""
    choice = Choice(case.strategy, Options(**case.options), case.size)
    return next(rule for rule in RULES if rule.broken(choice))


def identity(case: Case) -> str:
    return case.flags.replace("--", "").replace(" ", "-")


def test_every_rule_is_reached() -> None:
    reached = [broken_by(case) for case in CASES]
    assert [rule.options for rule in reached] == [case.rule for case in CASES]
    assert sorted(map(RULES.index, reached)) == list(range(len(RULES))), "one case for each rule"


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_a_rule_refuses_in_a_program(case: Case) -> None:
    """Before anything is built: the model and the optimizer are as they were, and nothing was sent."""
    group = alone() if case.size == 1 else groups(case.size)[case.size - 1]
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = list(optimizer.param_groups[0]["params"])
    with pytest.raises(UsageError) as refused:
        commlab.strategy(case.strategy, model, optimizer, group, **case.options)
    assert all(words in str(refused.value) for words in case.keywords), str(refused.value)
    assert "--" not in str(refused.value)
    assert group.bytes_sent == 0
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], before, strict=True))
    assert not model._forward_hooks and model.weight.grad is None


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_a_rule_refuses_on_the_command_line(case: Case) -> None:
    with pytest.raises(UsageError) as refused:
        Config.from_argv(case.flags.split()).validate_for(case.size)
    assert all(words in str(refused.value) for words in case.spoken), str(refused.value)
    assert "=" not in str(refused.value)


@pytest.mark.parametrize("case", CASES, ids=identity)
def test_a_message_names_the_options_and_the_way_out(case: Case) -> None:
    rule = broken_by(case)
    words = [*string.Formatter().parse(rule.why), *string.Formatter().parse(f"; {rule.instead}")]
    named = {name.split(".")[0] for _, name, _, _ in words if name}
    assert set(rule.options) <= named
    assert f"{{{rule.options[0]}" in rule.why, "what was chosen comes first"
    assert rule.instead
    assert named <= {"strategy", "ranks", *Options.__dataclass_fields__}


def test_what_a_rule_proposes_breaks_it_no_more() -> None:
    """Each other value that a message offers for one option alone."""
    for case in CASES:
        rule = broken_by(case)
        words = [(name, spec) for _, name, spec, _ in string.Formatter().parse(rule.instead) if name and spec]
        for name, spec in words:
            if {"strategy", "servers"} <= {option for option, _ in words}:
                continue  # offered together
            other = eval(spec)  # a literal of our own template
            strategy = other if name == "strategy" else case.strategy
            options = case.options if name == "strategy" else {**case.options, name: other}
            assert not rule.broken(Choice(strategy, Options(**options), case.size)), (case.flags, name, spec)


@pytest.mark.parametrize("option", KNOWN)
def test_unknown_names_are_refused_by_both(option: str) -> None:
    chosen: dict[str, Any] = {"strategy": "dps", option: "ringo"}
    with pytest.raises(UsageError) as keywords:
        Options(**{name: value for name, value in chosen.items() if name != "strategy"}).check(chosen["strategy"])
    with pytest.raises(UsageError) as flags:
        Config.from_argv([f"--{option.replace('_', '-')}", "ringo"])
    for message in (str(keywords.value), str(flags.value)):
        assert message.startswith(f"unknown {option.replace('_', ' ')} 'ringo'; there are ")
        assert all(name in message for name in KNOWN[option] if name is not None)
        assert ("did you mean ring?" in message) is (option == "algorithm")


def test_an_unknown_consistency_is_refused_by_both() -> None:
    with pytest.raises(UsageError, match=r"unknown consistency 'sps': give bsp .*ssp:4 .*asp"):
        Options(consistency="sps").check("ps")
    with pytest.raises(UsageError, match=r"unknown consistency 'sps': give bsp .*ssp:4 .*asp"):
        Config.from_argv(["--consistency", "sps"])


def test_known_names_are_those_that_exist() -> None:
    """The tables that need torch have exactly the names that are checked without it."""
    assert KNOWN["strategy"] == tuple(STRATEGIES)
    assert KNOWN["precision"] == tuple(PRECISIONS)
    assert KNOWN["wire"] == tuple(WIRES)


@pytest.mark.parametrize("strategy", KNOWN["strategy"])
def test_what_nobody_chose_breaks_no_rule(strategy: str) -> None:
    Options().check(strategy, 1)
    Config(strategy=strategy).validate_for(1)


def test_flags_choose_every_option() -> None:
    """But for ``elementwise`` and ``partial``: the trainer's optimizer is known, and there is one."""
    flags = (
        "--precision fp16 --autocast off --loss-scale 4 --wire bf16 --max-grad-norm 2 --bucket-mb 1 --overlap off"
        " --strategy ps --servers 1 --overlap-pulls on --nonfinite skip --buffers mean --check-replicas 7"
    )
    chosen = Config.from_argv(flags.split()).options
    assert chosen == Options(
        precision="fp16", autocast="off", loss_scale=chosen.loss_scale, wire="bf16", max_grad_norm=2.0,
        bucket_bytes=2**20, overlap=False, servers=1, overlap_pulls=True, nonfinite="skip", buffers="mean",
        check_replicas=7,
    )  # fmt: skip
    assert chosen.loss_scale is not None and chosen.loss_scale.value == 4.0
    assert Config(algorithm="tree").options.algorithm == "tree"
    assert Config(precision="apex", apex_level="O1").options.apex_level == "O1"
    assert Config(servers=2, consistency="asp").options.consistency == "asp"
    assert Config(max_grad_norm=0.0).options.max_grad_norm is None
    assert Config(precision="fp16", wire="none").options.wire is None
    assert [field.name for field in dataclasses.fields(Options) if not hasattr(Config(), field.name)] == [
        "elementwise",
        "partial",
    ]
