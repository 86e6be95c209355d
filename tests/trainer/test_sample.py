"""What the trained model is made to say: bounded, repeatable, harmless, and only what the tokenizer knows."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from commlab.trainer.data import bpe
from commlab.trainer.data.corpus import Corpus, assemble, encode, encode_with_bytes
from commlab.trainer.data.text import Text
from commlab.trainer.data.tokenizer import ByteTokenizer, Tokenizer
from commlab.trainer.display import Display
from commlab.trainer.model import build_model
from commlab.trainer.report import Report
from commlab.trainer.sample import PROMPT_BYTES, Sample, generate

HELD_OUT = ["Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich.\n".encode() * 3]


def corpus_of(tokenizer: Tokenizer, held_out: list[bytes] | None = None) -> Corpus:
    texts = HELD_OUT if held_out is None else held_out
    text = Text([b"some text"], texts, "a test", 2, 9, 0)
    return assemble(text, tokenizer, encode(text.train, tokenizer), *encode_with_bytes(texts, tokenizer))


def tiny(vocab_size: int, likes: int | None = None, separator: int | None = 0) -> Any:
    """gpt2-tiny, untrained; or one that says nothing but the token ``likes``."""
    model: Any = build_model("gpt2-tiny", seq_len=16, vocab_size=vocab_size, seed=5, separator=separator)
    if likes is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.transformer.ln_f.bias[0] = 1.0
            model.transformer.wte.weight[likes, 0] = 1e3
    return model


def test_more_than_the_model_has_positions() -> None:
    """200 tokens of a model with 128 positions, likes 'e' more than anything."""
    corpus = corpus_of(ByteTokenizer())
    model = tiny(256, likes=ord("e"))
    state = torch.random.get_rng_state()
    made = generate(model, corpus, 200, seed=3, limit_s=60)
    assert made == Sample(HELD_OUT[0][:PROMPT_BYTES].decode(errors="replace"), "e" * 200, 200)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training


def test_the_seed_decides() -> None:
    corpus = corpus_of(ByteTokenizer())
    model = tiny(256)
    first, again, other = (generate(model, corpus, 12, seed=seed, limit_s=60) for seed in (3, 3, 4))
    assert first == again != other
    assert first.tokens == 12


def test_it_ends_with_the_document() -> None:
    made = generate(tiny(256, likes=0), corpus_of(ByteTokenizer()), 20, seed=0, limit_s=60)
    assert (made.generated, made.tokens) == ("", 0)
    assert "sample: 0 of 20 tokens" in made.shown(20, 0)


def test_it_ends_in_time() -> None:
    model = tiny(256, likes=ord("e"))
    made = generate(model, corpus_of(ByteTokenizer()), 10_000, seed=0, limit_s=0.05)
    assert 1 <= made.tokens < 10_000


def test_a_model_with_more_ids_than_the_tokenizer() -> None:
    """What the model likes best has no meaning; what is second, has."""
    tokenizer = bpe.learned(HELD_OUT, 270, None)
    model = tiny(400, likes=399)
    with torch.no_grad():
        model.transformer.wte.weight[tokenizer.encode(b"q")[0], 0] = 500.0
    made = generate(model, corpus_of(tokenizer), 5, seed=0, limit_s=60)
    assert (made.generated, made.tokens) == ("qqqqq", 5)
    assert HELD_OUT[0].decode().startswith(made.prompt)
    assert 0 < len(made.prompt.encode()) <= PROMPT_BYTES


def test_a_tokenizer_without_a_separator() -> None:
    """The model's own end of a text is an ordinary token then, and ends nothing."""
    tokenizer: Any = ByteTokenizer()
    tokenizer.separator = None
    model = tiny(256, likes=255, separator=None)
    assert model.generation_config.eos_token_id == 255
    made = generate(model, corpus_of(tokenizer), 6, seed=0, limit_s=60)
    assert (made.generated, made.tokens) == ("\N{REPLACEMENT CHARACTER}" * 6, 6)


def test_what_a_terminal_would_obey_is_replaced() -> None:
    made = generate(tiny(256, likes=0x1B), corpus_of(ByteTokenizer()), 4, seed=0, limit_s=60)
    assert made.generated == "\N{REPLACEMENT CHARACTER}" * 4


@pytest.mark.parametrize(("held_out", "prompt"), [([b"", b"ab", b"cd"], "ab"), ([b"abc"], "abc")])
def test_short_documents(held_out: list[bytes], prompt: str) -> None:
    made = generate(tiny(256, likes=ord("e")), corpus_of(ByteTokenizer(), held_out), 3, seed=0, limit_s=60)
    assert (made.prompt, made.generated) == (prompt, "eee")


def test_the_prompt_leaves_room() -> None:
    class Wide(ByteTokenizer):
        def encode_with_bytes(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
            return self.encode(text * 9), (np.arange(9 * len(text)) % 9 == 0).astype(np.int32)

    corpus = corpus_of(Wide(), [b"a" * 100])
    made = generate(tiny(256, likes=ord("e")), corpus, 2, seed=0, limit_s=60)
    assert (len(made.prompt), made.generated) == (64, "ee")


def test_a_terminal_without_the_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    written: list[Any] = []
    report: Any = SimpleNamespace(
        _display=SimpleNamespace(close=lambda: None),
        _print=Display("none", 1.0).line,
        _write=written.append,
        _metrics=SimpleNamespace(text=lambda *_: None),
        config=SimpleNamespace(sample=3, seed=8),
    )
    Report.sampled(report, Sample("ä", "東\n京", 3))
    assert raw.getvalue().decode("latin-1").splitlines() == [
        "sample: 3 tokens, each drawn from the 40 likeliest, seed 8",
        "  held-out text:",
        "    | ä",
        "  the model goes on:",
        "    | \\u6771",
        "    | \\u4eac",
    ]
    assert written == [{"sample": {"prompt": "ä", "generated": "東\n京"}}]
