"""A file with the values of flags, in TOML: ``--config run.toml`` reads it, and ``--print-config`` writes one."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..job.version import __version__
from .flags import Knob, knobs_of, near_name


def read(path: str, cls: type) -> dict[str, Any]:
    """The fields of ``cls`` that the file gives. Keys are the names of flags without their dashes in front:
    ``batch-size`` or ``batch_size``. UsageError for a file that can't be read, an unknown key and a value of another
    type, with the key."""
    where, knobs = f"--config {path!r}", knobs_of(cls)
    values: dict[str, Any] = {}
    for key, value in _load(path, where).items():
        name = key.replace("-", "_")
        if name not in knobs:
            hint = near_name(name, knobs).replace("_", "-")
            raise UsageError(f"{where}: unknown key {key!r}{hint}; --print-config shows all")
        if name in values:
            raise UsageError(f"{where}: {key!r} is there twice, with - and with _; give it once")
        values[name] = _typed(f"{where}: {key}", knobs[name], value)
    return values


def rendered(config: Any) -> str:
    """The fields of ``config`` as a file that :func:`read` reads; what is None is left open."""
    lines = [f"# commlab {__version__}: python -m commlab.train --config FILE"]
    group = ""
    for name, knob in knobs_of(type(config)).items():
        if knob.group != group:
            group = knob.group
            lines += ["", f"# {group}"]
        key, value = name.replace("_", "-"), getattr(config, name)
        if value is None and "none" in knob.choices:
            value = "none"
        lines.append(f"# {key}: not given" if value is None else f"{key} = {_toml(value)}")
    return "\n".join(lines)


def _load(path: str, where: str) -> dict[str, Any]:
    for module in ("tomllib", "tomli"):
        try:
            toml: Any = import_module(module)
            break
        except ImportError:
            continue
    else:
        raise UsageError(f"{where}: TOML needs Python 3.11 or the package tomli: pip install tomli, or give flags")
    try:
        found: dict[str, Any] = toml.loads(Path(path).read_text(encoding="utf-8-sig"))
        return found
    except OSError as error:
        raise UsageError(f"{where} cannot be read: {error.strerror or error}") from error
    except RecursionError:
        raise UsageError(f"{where} is nested too deeply; a line gives one flag: batch-size = 8") from None
    except ValueError as error:
        raise UsageError(f"{where} is not TOML ({error}); a line gives one flag: batch-size = 8") from error


def _typed(where: str, knob: Knob, value: Any) -> Any:
    if isinstance(value, dict):
        raise UsageError(f"{where} is a table; a line gives one flag: batch-size = 8")
    if knob.kind is str and isinstance(value, bool) and {"on", "off"} <= set(knob.choices):
        return "on" if value else "off"
    if knob.many and isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return tuple(value)
    if knob.kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UsageError(f"{where} must be a finite number, got one of {len(str(abs(value)))} digits") from None
    if not isinstance(value, knob.kind) or (knob.kind is int and isinstance(value, bool)):
        wanted = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[knob.kind]
        raise UsageError(
            f"{where} must be {wanted}{', or an array of texts' if knob.many else ''}, got {_shown(value)}"
        )
    return (value,) if knob.many else value


def _shown(value: Any) -> str:
    return _toml(value) if isinstance(value, (str, bool, int, float)) else str(value)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)


def merged(file: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The values of a file and of flags, which win: --epochs also over its steps, and --steps over its epochs."""
    stops = {"steps", "epochs"} & flags.keys()
    kept = {name: value for name, value in file.items() if not (stops and name in ("steps", "epochs"))}
    return {**kept, **flags}
