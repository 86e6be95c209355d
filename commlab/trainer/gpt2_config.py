"""A GPT-2 as transformers describes it: config.json, alone or in a model folder, checked before anything is loaded.

What GPT2Config would take and fail on later, in words of other libraries, or take for another model in silence, is
refused here, with the key and its value. Importing this loads neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError

_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_SIZES = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
"""The keys that decide the model's size, with the values that transformers takes where they are missing."""
_RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_SWITCHES = (
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
    "use_cache",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_KNOWN = {
    *(*_ALIASES, *_SIZES, *_RATES, *_SWITCHES, *_TOKEN_IDS),
    *("n_ctx", "n_inner", "layer_norm_epsilon", "initializer_range", "activation_function", "model_type", "n_special"),
}
_LARGEST_BYTES = 1 << 20
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_OTHER_WEIGHTS = ("tf_model.h5", "flax_model.msgpack", "rust_model.ot")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


class Described(NamedTuple):
    """What is found at a path."""

    config: dict[str, Any]
    """The arguments of GPT2Config."""
    weights: str | None
    """The folder whose weights the model starts from; None: it starts from weights that the seed draws."""
    tokenizer: str | None
    """The folder whose tokenizer belongs to the model; None: there is none."""


def require_readable(name: str) -> None:
    """UsageError where there is something at the path that can't be looked at."""
    try:
        os.stat(name)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return
    except OSError as error:
        raise UsageError(f"model {name!r} cannot be read: {error.strerror or error}") from error


def read(name: str) -> Described:
    """What the file or the folder ``name``, which exists, describes. UsageError where that is no GPT-2."""
    try:
        return _described(name)
    except OSError as error:
        raise UsageError(f"model {name!r} cannot be read: {error.strerror or error}") from error


def _described(name: str) -> Described:
    folder = Path(name) if Path(name).is_dir() else None
    config = _checked(name, _read_json(name, Path(name) if folder is None else folder / "config.json"))
    if folder is None:
        return Described(config, None, None)
    there = set(os.listdir(folder))
    other = sorted(there & set(_OTHER_WEIGHTS))
    if other and not there & set(_WEIGHTS):
        raise UsageError(f"model folder {name!r} has weights in {other[0]} alone; save them with torch: {_WEIGHTS[0]}")
    return Described(config, name if there & set(_WEIGHTS) else None, name if there & set(_TOKENIZER_FILES) else None)


def numel(config: dict[str, Any]) -> int:
    """How many parameters the model has."""
    width, layers = config["n_embd"], config["n_layer"]
    inner = config.get("n_inner") or 4 * width
    layer = 4 * width**2 + 4 * width + 2 * width * inner + inner + width + 4 * width
    return int((config["vocab_size"] + config["n_positions"]) * width + layers * layer + 2 * width)


def _read_json(name: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        known = sorted(entry.name for entry in Path(name).iterdir())[:5]
        found = f"it has {', '.join(known)}" if known else "it is empty"
        raise UsageError(f"model folder {name!r} has no config.json ({found}); give a folder of transformers")
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise UsageError(f"model config {name!r} is larger than 1 MiB; give the config.json, or the model's folder")
        config = json.loads(path.read_bytes())
    except RecursionError:
        raise UsageError(f"model config {name!r} cannot be read: its JSON is nested too deeply") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"model config {name!r} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"model config {name!r} describes {type(config).__name__!r}; {_WANTED}")
    return config


_WANTED = "commlab trains GPT-2 (model_type 'gpt2')"


def _checked(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config with the names that GPT2Config has itself, and all sizes."""
    if "model_type" not in config:
        raise UsageError(f'model config {name!r} has no model_type; {_WANTED}: add "model_type": "gpt2" if it is one')
    if config["model_type"] != "gpt2":
        raise UsageError(f"model config {name!r} describes {config['model_type']!r}; {_WANTED}")
    for key in config:
        near = [] if key in _KNOWN else difflib.get_close_matches(key, [*_SIZES, *_ALIASES, "n_inner"], 1, 0.85)
        if near:
            raise UsageError(f"model config {name!r} has an unknown key {key!r}; did you mean {near[0]!r}?")
    for alias, key in _ALIASES.items():
        if alias in config:
            if config.setdefault(key, config[alias]) != config[alias]:
                raise UsageError(
                    f"model config {name!r}: {alias} {config[alias]!r} and {key} {config[key]!r} are the same; give one"
                )
            del config[alias]
    config = {**_SIZES, **config}
    for key in (*_SIZES, *({"n_ctx"} & config.keys()), *(["n_inner"] if config.get("n_inner") is not None else [])):
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _wrong(name, key, value, "a positive whole number")
    if config["n_embd"] % config["n_head"]:
        raise UsageError(
            f"model config {name!r}: n_embd {config['n_embd']} can't be cut into n_head {config['n_head']} equal heads"
        )
    for key in _RATES:
        if key in config and not (_is_number(config[key]) and 0 <= config[key] < 1):
            raise _wrong(name, key, config[key], "a number from 0 to less than 1")
    for key in ("initializer_range", "layer_norm_epsilon"):
        if key in config and not (_is_number(config[key]) and config[key] > 0):
            raise _wrong(name, key, config[key], "a number above 0")
    for key in _SWITCHES:
        if key in config and not isinstance(config[key], bool):
            raise _wrong(name, key, config[key], "true or false")
    for key in _TOKEN_IDS:
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise _wrong(name, key, value, "one whole number or null")
    if not isinstance(config.get("activation_function", ""), str):
        raise _wrong(name, "activation_function", config["activation_function"], "the name of a function")
    if config.get("add_cross_attention"):
        raise UsageError(
            f"model config {name!r}: add_cross_attention needs an encoder, and there is none; leave it out"
        )
    if config.get("quantization_config"):
        raise UsageError(f"model config {name!r}: quantization_config: quantized weights are not trained; leave it out")
    return config


def _wrong(name: str, key: str, value: object, wanted: str) -> UsageError:
    return UsageError(f"model config {name!r}: {key} must be {wanted}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
