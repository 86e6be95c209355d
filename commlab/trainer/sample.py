"""A sample of what was learned: the trained model goes on from a line of held-out text."""

from __future__ import annotations

import textwrap
import time
from typing import Any, NamedTuple

import numpy as np
import torch

from .data.corpus import Corpus

PROMPT_BYTES = 40
TOP_K = 40
"""Each token is drawn from this many of the likeliest tokens."""


class Sample(NamedTuple):
    """Text without characters that a terminal would obey."""

    prompt: str
    generated: str
    tokens: int
    """Fewer than asked for where the model ended the document, or time was up."""

    def shown(self, asked: int, seed: int) -> str:
        """The sample as lines for the log. ``asked``: how many tokens were to be generated."""
        of = f" of {asked}" if self.tokens < asked else ""
        lines = [f"sample: {self.tokens}{of} tokens, each drawn from the {TOP_K} likeliest, seed {seed}"]
        for title, text in (("held-out text:", self.prompt), ("the model goes on:", self.generated)):
            lines += [f"  {title}", textwrap.indent(text, "    | ", lambda _: True)]
        return "\n".join(lines)


def generate(model: Any, corpus: Corpus, tokens: int, *, seed: int, limit_s: float) -> Sample:
    """At most ``tokens`` tokens of ``model`` (a transformers GPT2LMHeadModel), after the first ``PROMPT_BYTES`` bytes
    of the held-out text; in ``limit_s`` seconds at most, but for the token that is being made. The same seed gives the
    same text. One rank calls this; the model's mode and the caller's random state are left as they were."""
    context = _prompt(corpus, model.config.n_positions)
    made: list[int] = []
    device = next(model.parameters()).device
    end_s = time.perf_counter() + limit_s
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            while len(made) < tokens and (left_s := end_s - time.perf_counter()) > 0:
                new = _generate(model, corpus, [*context, *made], tokens - len(made), left_s)
                made += new
                if new[-1] == corpus.separator:
                    break
    finally:
        model.train(was_training)
    shown = [token for token in made if token != corpus.separator]
    return Sample(_harmless(corpus.tokenizer.decode(context)), _harmless(corpus.tokenizer.decode(shown)), len(shown))


def _prompt(corpus: Corpus, positions: int) -> list[int]:
    """The beginning of the first held-out document that is not empty."""
    begin = int(np.argmax(corpus.held_out_bytes > 0))
    ids, token_bytes = corpus.held_out[begin:], corpus.held_out_bytes[begin:]
    count = max(1, min(int(np.searchsorted(np.cumsum(token_bytes), PROMPT_BYTES, "right")), positions // 2))
    found = [int(token) for token in ids[:count]]
    within = found[: found.index(corpus.separator)] if corpus.separator in found else found
    return within or found[:1]


def _generate(model: Any, corpus: Corpus, text: list[int], tokens: int, limit_s: float) -> list[int]:
    """One to ``tokens`` more ids, as many as the model has positions for behind the end of ``text``."""
    from transformers import GenerationConfig

    positions: int = model.config.n_positions
    vocab_size: int = model.config.vocab_size
    # A model that is out of positions goes on from the last half of them.
    kept = text if len(text) < positions else text[-max(1, positions // 2) :]
    ids = torch.tensor([kept], device=next(model.parameters()).device)
    # Where the tokenizer has no separator, transformers would end at the model's own end token, which is an ordinary
    # token here: so the end is an id that no token has.
    end = vocab_size if corpus.separator is None else corpus.separator
    settings = GenerationConfig(
        do_sample=True,
        top_k=TOP_K,
        max_new_tokens=min(tokens, max(1, positions - len(kept))),
        max_time=limit_s,
        eos_token_id=end,
        pad_token_id=0,
        # A model may have ids that the tokenizer lacks.
        suppress_tokens=list(range(corpus.vocab_size, vocab_size)) or None,
    )
    made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return [int(token) for token in made[0, len(kept) :]]


def _harmless(text: str) -> str:
    """Control characters, which would move a terminal's cursor or change its colours, as U+FFFD."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
