"""A dataclass whose fields are flags: each field describes its flag once; help, parsing and checks follow from that."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.metadata
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from ..errors import UsageError
from ..strategies.options import require_known
from .display import show

_OFF = {"max_grad_norm": "0", "wire": "none"}
"""The values by which flags turn off what the options of a strategy turn off with None."""


_OTHER = ("--config", "--print-config", "--help", "--version")


class Flags:
    """The spelling of the command line, for errors about the options of a strategy: ``--servers 2``."""

    def name(self, option: str) -> str:
        return _flag(option)

    def setting(self, option: str, value: object) -> str:
        if value is None:
            value = _OFF[option]
        elif isinstance(value, bool):
            value = "on" if value else "off"
        return f"{_flag(option)} {value}"


@dataclass(frozen=True)
class Knob:
    """The flag of a field, as :func:`knob` describes it."""

    group: str
    help: str
    kind: type
    choices: Sequence[str] = ()
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    many: bool = False


class CommandLine(NamedTuple):
    """What stands on the command line."""

    values: dict[str, Any]
    """The fields that were given."""
    config: str | None
    """The file of --config."""
    print_config: bool


def knob(default: Any, group: str, help: str, kind: type = str, **limits: Any) -> Any:
    """A dataclass field that is also a flag of the field's name; ``kind`` is str, int, float, or bool for a flag that
    takes no value and is False by default.

    ``limits``: ``choices`` of a text; ``least`` and ``most`` (themselves allowed), ``above`` and ``below`` (themselves
    not) of a number.
    ``many``: the field is a tuple of texts.
    ``help`` describes a default of None; any other default is added to the help.
    """
    return dataclasses.field(default=default, metadata={"knob": Knob(group, help, kind, **limits)})


def knobs_of(cls: type) -> dict[str, Knob]:
    """The flag of each field."""
    return {field.name: field.metadata["knob"] for field in dataclasses.fields(cls)}


def parse(cls: type, argv: Sequence[str] | None, *, usage: str, description: str, speak: bool) -> CommandLine:
    """The fields given in ``argv`` (sys.argv's where None), as values. --help and --version print, where ``speak``, and
    end with exit code 0."""
    parser = _Parser(usage=usage, description=description, allow_abbrev=False, add_help=False)
    knobs = knobs_of(cls)
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(knob.group for knob in knobs.values())}
    for field in dataclasses.fields(cls):
        knob = knobs[field.name]
        shown = (
            ""
            if field.default is None or knob.kind is bool
            else f" (default: {field.default if knob.kind is not float else format(field.default, 'g')})"
        )
        if knob.kind is bool:
            groups[knob.group].add_argument(_flag(field.name), action="store_const", const="yes", help=knob.help)
            continue
        metavar = "|".join(knob.choices) or {int: "N", float: "X", str: field.name.upper()}[knob.kind]
        # Values stay text here: errors of _value and check_fields are better than argparse's.
        several: dict[str, Any] = {"nargs": "+", "action": "extend"} if knob.many else {}
        groups[knob.group].add_argument(
            _flag(field.name), metavar=metavar, help=knob.help.replace("%", "%%") + shown, **several
        )
    other = parser.add_argument_group("other")
    other.add_argument(
        "--config", metavar="FILE", help="TOML file of flags, batch-size = 8 and so on; flags beside it win"
    )
    other.add_argument("--print-config", action="store_true", help="show all values as a file for --config, and stop")
    other.add_argument(
        "--help", "-h", action=_Print, nargs=0, const=speak, default=argparse.SUPPRESS, help="show this and stop"
    )
    other.add_argument(
        "--version", action=_Print, nargs=0, const=speak, default=argparse.SUPPRESS, help="show the version and stop"
    )
    texts, rest = parser.parse_known_args(argv)
    if rest:
        hint = near_name(rest[0].split("=")[0], [*map(_flag, knobs), *_OTHER])
        raise UsageError(f"unknown flag {rest[0]!r}{hint}; --help lists all")
    given = vars(texts)
    config, print_config = given.pop("config"), given.pop("print_config")
    values = {name: _value(name, knobs[name], text) for name, text in given.items() if text is not None}
    return CommandLine(values, config, print_config)


def check_fields(config: Any) -> None:
    """UsageError for the first field that is not among its choices or outside its bounds; None is always allowed."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None:
            _check(field.name, field.metadata["knob"], value)


def _check(name: str, knob: Knob, value: Any) -> None:
    flag = _flag(name)
    if knob.choices:
        require_known(name, value, knob.choices)
    if knob.kind is str:
        if not value or (knob.many and "" in value):
            raise UsageError(f"{flag} is empty; leave it out, or give a value")
        if "\0" in "".join(value):
            raise UsageError(f"{flag} {value!r} has a NUL character, which no path and no name can have")
        return
    if knob.kind is bool:
        return
    if not math.isfinite(value):
        raise UsageError(f"{flag} must be a finite number, got {value}")
    for limit, text, inside in (
        (knob.least, "at least", knob.least is None or value >= knob.least),
        (knob.most, "at most", knob.most is None or value <= knob.most),
        (knob.above, "more than", knob.above is None or value > knob.above),
        (knob.below, "less than", knob.below is None or value < knob.below),
    ):
        if not inside:
            raise UsageError(f"{flag} must be {text} {limit}, got {value}")


def _value(name: str, knob: Knob, text: Any) -> Any:
    if knob.many:
        return tuple(text)
    try:
        return knob.kind(text)
    except ValueError:
        raise UsageError(
            f"{_flag(name)} must be a {'whole ' if knob.kind is int else ''}number, got {text!r}"
        ) from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def near_name(name: str, names: Iterable[str]) -> str:
    """The known name nearest to ``name``, as the end of a sentence; "" where none is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists all flags")


class _Print(argparse.Action):
    """--help and --version, printed by one rank and not by all of them."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        if self.const:
            show(parser.format_help() if self.dest == "help" else f"commlab {_version()}")
        parser.exit()


def _version() -> str:
    try:
        return importlib.metadata.version("commlab-torch")
    except importlib.metadata.PackageNotFoundError:
        return "(run from its sources, not installed)"
