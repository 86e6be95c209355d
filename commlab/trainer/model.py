"""GPT-2 from transformers: named shapes, the same weights on every rank, and losses as sums.

Importing this loads neither torch nor transformers: flags are checked against :func:`describe_model` before that.
"""

from __future__ import annotations

import difflib
import gc
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..job.limits import available_memory
from . import gpt2_config

if TYPE_CHECKING:
    import torch

IGNORED = -100
"""Labels of this value carry no loss (torch's own default ``ignore_index``)."""


@dataclass(frozen=True)
class ModelShape:
    """The properties of a model that are known before it is built."""

    name: str
    seq_len: int
    """Default length of a sequence, in tokens."""
    positions: int
    """The longest sequence, in tokens."""
    vocab_size: int | None
    """How many token ids the model has; None: as many as the tokenizer."""
    learning_rate: float
    """Default peak of the learning rate."""
    config: dict[str, Any]
    """The arguments of transformers' GPT2Config."""
    weights: str | None = None
    """The model folder of transformers whose weights training starts from; None: they are drawn by the seed."""
    tokenizer: str | None = None
    """The model folder whose tokenizer belongs to the model, if it has one."""


def _shape(name: str, seq_len: int, vocab_size: int | None, learning_rate: float, **config: Any) -> ModelShape:
    return ModelShape(name, seq_len, config["n_positions"], vocab_size, learning_rate, config)


PRESETS = {
    shape.name: shape
    for shape in (
        _shape("gpt2-tiny", 128, None, 3e-3, n_layer=4, n_embd=128, n_head=4, n_positions=128),
        # The paper's (arXiv 2206.06356): trained on 512 tokens (n_ctx), with room for 1024.
        _shape("gpt2-100m", 512, 26679, 1.5e-4, n_layer=12, n_embd=768, n_head=12, n_positions=1024),
        _shape("gpt2", 1024, 50257, 1.5e-4, n_layer=12, n_embd=768, n_head=12, n_positions=1024),
    )
}


def describe_model(name: str) -> ModelShape:
    """The shape behind a preset's name or the path of a transformers config file or model folder. UsageError for
    anything else."""
    if name in PRESETS:
        return PRESETS[name]
    gpt2_config.require_readable(name)
    if not os.path.isfile(name) and not os.path.isdir(name):
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; nothing is downloaded"
        raise UsageError(
            f"unknown model {name!r}: give one of {', '.join(PRESETS)}, or the path of a GPT-2 config.json or"
            f" model folder{hint}"
        )
    found = gpt2_config.read(name)
    config, positions = found.config, found.config["n_positions"]
    seq_len = min(config.get("n_ctx", positions), positions)
    return ModelShape(name, seq_len, positions, config["vocab_size"], 1.5e-4, config, found.weights, found.tokenizer)


def build_model(
    name: str,
    *,
    seq_len: int,
    vocab_size: int,
    dropout: float | None = None,
    seed: int = 0,
    separator: int | None = None,
) -> torch.nn.Module:
    """A transformers GPT2LMHeadModel in float32 on the CPU, in training mode; the same weights on every rank for the
    same seed.

    ``vocab_size``: how many ids the tokenizer has. gpt2-tiny has the same number; other models keep their own number,
    so that their size, and with it the bytes that ranks exchange, stays what the name promises. ``separator``: the
    tokenizer's end of a document, for the model's bos and eos ids. ``dropout`` None: a config file's own rates, 0 for
    the presets. The caller's random state is left as it was.
    Errors: UsageError where the sequence is longer than the model's positions, or the tokenizer has more ids than the
    model.
    """
    shape = describe_model(name)
    if seq_len > shape.positions:
        raise UsageError(f"--seq-len {seq_len} is longer than the {shape.positions} positions of model {name!r}")
    model_vocab_size = vocab_size if shape.vocab_size is None else shape.vocab_size
    if vocab_size > model_vocab_size:
        raise UsageError(
            f"the tokenizer has {vocab_size} ids, more than the {model_vocab_size} of model {name!r};"
            f" take a smaller tokenizer, or a config file with vocab_size {vocab_size}"
        )
    needed, (left, limit) = 4 * gpt2_config.numel({**shape.config, "vocab_size": model_vocab_size}), available_memory()
    if needed > left:
        raise UsageError(
            f"model {name!r} takes {needed / 1e9:,.1f} GB, and {left / 1e9:,.1f} GB of memory are left"
            f"{f' ({limit})' if limit else ''}; take a smaller model, or another machine"
        )
    GPT2Config, GPT2LMHeadModel = import_gpt2()
    import torch

    arguments = {**shape.config, "vocab_size": model_vocab_size}
    if dropout is not None or name in PRESETS:
        arguments |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout or 0.0)
    # GPT-2's own 50256 lies outside a small vocabulary, which generation would trip over.
    for key in ("bos_token_id", "eos_token_id"):
        token = arguments.get(key)
        if token is None or not 0 <= token < model_vocab_size:
            arguments[key] = separator if separator is not None else model_vocab_size - 1
    try:
        config = GPT2Config(**arguments)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: torch.nn.Module = (
                GPT2LMHeadModel(config) if shape.weights is None else _loaded(shape.weights, config)
            )
    except UsageError:
        raise
    except Exception as error:  # transformers, torch and safetensors raise of many kinds; the cause stays attached
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(
            f"transformers cannot {'build' if shape.weights is None else 'load'} model {name!r}: {text}"
        ) from error
    return model.train()


def _loaded(folder: str, config: Any) -> torch.nn.Module:
    """The model of a folder, in float32. UsageError where its weights are not exactly those of the config."""
    from transformers.utils import logging

    _, GPT2LMHeadModel = import_gpt2()
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is an error below
    try:
        model, report = GPT2LMHeadModel.from_pretrained(
            folder, config=config, local_files_only=True, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    for kind, text in (("missing_keys", "lack"), ("unexpected_keys", "have an unknown"), ("mismatched_keys", "misfit")):
        if report.get(kind):
            found = sorted(map(str, report[kind]))
            raise UsageError(
                f"the weights of {folder!r} {text} {found[0]!r} and {len(found) - 1} more; they are not those of its"
                " config.json, or of a GPT-2 with a language-model head"
            )
    float32: torch.nn.Module = model.float()
    return float32


def import_gpt2() -> tuple[Any, Any]:
    """(GPT2Config, GPT2LMHeadModel), from their own modules and with the garbage collector paused.

    Imports make some 10^5 long-lived objects and no garbage, and the collector walks these objects again and again;
    docs/data.md has the times.
    """
    with _collector_paused():
        from transformers.models.gpt2.configuration_gpt2 import GPT2Config
        from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
    return GPT2Config, GPT2LMHeadModel


@contextmanager
def _collector_paused() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def loss_sum(model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(sum of the token losses in nats, a float32 scalar with a gradient; number of tokens that carry a loss).

    ``input_ids`` and ``labels``: [n, seq_len], labels[i, j] being the token after input_ids[i, j], or IGNORED. Sums and
    counts rather than means, so that ranks and micro-batches of different sizes weigh every token the same: the caller
    divides once, by the global count. Without samples (n = 0) one row of ignored labels runs instead: the sum is 0 and
    so is every gradient, but backward passes through every parameter, so a rank that has nothing to train on at a
    ragged end still takes part in the exchange.
    """
    import torch

    if not len(input_ids):
        input_ids = input_ids.new_zeros((1, input_ids.shape[1]))
        labels = labels.new_full(input_ids.shape, IGNORED)
    logits = model(input_ids=input_ids, use_cache=False).logits
    # flatten is a view: labels are shifted already, so no part of the largest tensor of the step is copied. Under
    # autocast logits have 16 bits, in which a sum of thousands of losses would drown; .float() does nothing in fp32.
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, int((labels != IGNORED).sum())


def evaluate(
    model: torch.nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor, int]]
) -> tuple[float, int, int]:
    """(sum of losses in nats, tokens, bytes of text) over batches of (input ids, labels, bytes), without dropout; the
    model's mode is restored.

    Each rank sums over its own batches; add the three sums over ranks before :func:`bits_per_byte`.
    """
    import torch

    device = next(model.parameters()).device
    was_training = model.training
    total, token_count, byte_count = 0.0, 0, 0
    model.eval()
    try:
        with torch.no_grad():
            for input_ids, labels, batch_bytes in batches:
                loss, tokens = loss_sum(model, input_ids.to(device), labels.to(device))
                total, token_count, byte_count = total + float(loss), token_count + tokens, byte_count + batch_bytes
    finally:
        model.train(was_training)
    return total, token_count, byte_count


def save_model(model: torch.nn.Module, folder: str) -> None:
    """Write a folder (made if missing) that ``transformers.GPT2LMHeadModel.from_pretrained(folder)`` opens.

    One rank calls this. ``model``: what :func:`build_model` returned, not a wrapper around it.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # which would draw over the trainer's own
    model.save_pretrained(folder)  # type: ignore[operator]


def bits_per_byte(loss_sum_nats: float, byte_count: int) -> float:
    """Bits per byte of text, which can be compared between tokenizers, as losses per token cannot. UsageError for no
    bytes."""
    if not byte_count:
        raise UsageError("the held-out text that was evaluated has no bytes; give more text")
    return loss_sum_nats / math.log(2) / byte_count
