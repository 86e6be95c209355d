"""A BPE of the text's own: every text can be encoded, equal texts give equal entries, and the cache is not trusted."""

from __future__ import annotations

import builtins
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training import alone

from commlab.errors import AgreedError, UsageError
from commlab.runtime.group import Group
from commlab.trainer.config import Config
from commlab.trainer.data import bpe, loading, tokenizer
from commlab.trainer.data.corpus import encode, encode_with_bytes, load_corpus
from commlab.trainer.data.loading import load_together

TEXTS = [f"def area_{at}(radius):\n    return 3 * radius ** {at}  # naïve, 东京\n".encode() * 3 for at in range(60)]
SIZE = 400


@pytest.fixture(scope="module")
def learned() -> tokenizer.TrainedTokenizer:
    return bpe.learned(TEXTS, SIZE, None)


def test_entries(learned: tokenizer.TrainedTokenizer) -> None:
    assert learned.vocab_size <= SIZE
    assert learned.separator == 0
    ids = learned.encode(TEXTS[7])
    assert len(ids) < len(TEXTS[7]) / 3, "pairs were learned"
    assert bpe.learned(TEXTS, bpe.SMALLEST, None).vocab_size == bpe.SMALLEST
    assert bpe.learned([b"ab"], SIZE, None).vocab_size == bpe.SMALLEST, "no pair occurs twice"


@given(st.text(max_size=60))
@settings(max_examples=80)
def test_every_text_comes_back(learned: tokenizer.TrainedTokenizer, text: str) -> None:
    for content in (text, f"{text}<|endoftext|>", "🚂" + text):
        ids, token_bytes = learned.encode_with_bytes(content.encode())
        assert np.array_equal(ids, learned.encode(content.encode()))
        assert learned.decode(ids.tolist()) == content
        assert token_bytes.sum() == len(content.encode())
        assert (token_bytes >= 0).all()
        assert 0 not in ids, "only a document's end is one"


def test_half_a_character_is_replaced(learned: tokenizer.TrainedTokenizer) -> None:
    ids = learned.encode("🚂".encode()).tolist()
    assert len(ids) == 4, "never seen: a token per byte"
    assert learned.decode(ids[:2]) == "\N{REPLACEMENT CHARACTER}"
    assert tokenizer.ByteTokenizer().decode("é".encode()[:1]) == "\N{REPLACEMENT CHARACTER}"


def test_pieces_have_the_tokens_of_the_whole(
    learned: tokenizer.TrainedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chooser = random.Random(3)
    words = [
        "\n",
        " ",
        "\n\n",
        "\t",
        "radius",
        "(",
        "é",
        "12",
        "'s",
        "\r\n",
        "\u2003",
        "return ",
        "\x85",
        "a",
        "b",
        "c",
    ]
    text = "".join(chooser.choices(words, k=4000)).encode()
    whole = learned.encode(text)
    monkeypatch.setattr(tokenizer, "_PIECE_CHARACTERS", 5)
    pieces = learned.pieces(text)
    assert len(pieces) > 60
    assert b"".join(pieces) == text
    assert np.array_equal(np.concatenate([learned.encode(piece) for piece in pieces]), whole)
    assert learned.pieces(b"") == [b""]
    assert any(piece.startswith(b" r") for piece in pieces), "cut between two words of one line"


def test_text_without_an_end_of_a_word_is_cut(
    learned: tokenizer.TrainedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long line: the library never gets more of it than a bounded piece."""
    monkeypatch.setattr(tokenizer, "_PIECE_CHARACTERS", 50)
    monkeypatch.setattr(tokenizer, "_LONGEST_CHARACTERS", 70)
    for text in ("é" * 1000, " " * 1000, "a" * 70, "a" * 71, "ab " * 23 + "c" * 300, "a" * 49 + " b"):
        pieces = learned.pieces(text.encode())
        assert b"".join(pieces) == text.encode()
        assert max(len(piece.decode()) for piece in pieces) <= 70
        counts = [count for piece in pieces for count in learned.encode_with_bytes(piece)[1]]
        assert sum(counts) == len(text.encode())
    assert learned.pieces(b"ab " * 23)[0] == (b"ab " * 23)[:50]


def test_long_runs_are_cut_for_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNA: a word of the library is never longer than 64 characters; ordinary text is learned from as it is."""
    ordinary = "".join(f"a line of {number} ordinary words\n" for number in range(9000))
    assert max(map(len, bpe._pieces([ordinary.encode()]))) == bpe._PIECE_CHARACTERS
    for run in ("ACGT" * 5000, " " * 5000, "東京" * 5000):
        pieces = bpe._pieces([f"one {run} two".encode()])
        assert "".join(pieces) == f"one {run} two"
        assert max(len(word) for piece in pieces for word in piece.split()) <= bpe.LONGEST_WORD if run.strip() else 9
        assert len(pieces) >= len(run) // bpe.LONGEST_WORD
    monkeypatch.setattr(bpe, "LONG_CHARACTERS", 1000)
    assert sum(map(len, bpe._pieces([b"x " * 500, b"A" * 7000]))) in range(1000 + 900, 1000 + 1100)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 200])
def test_parts_are_the_whole(learned: tokenizer.TrainedTokenizer, monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    texts = [b"", *TEXTS, b"", b"the end", b""]
    wanted = np.concatenate([part for text in texts for part in (learned.encode(text), [0])])
    monkeypatch.setattr(tokenizer, "_PIECE_CHARACTERS", 40)
    rows = [encode(texts, learned, index, parts) for index in range(parts)]
    assert np.array_equal(np.concatenate(rows), wanted)
    rows, counts = zip(*(encode_with_bytes(texts, learned, index, parts) for index in range(parts)), strict=True)
    assert np.array_equal(np.concatenate(rows), wanted)
    assert np.concatenate(counts).sum() == sum(map(len, texts))
    assert (np.concatenate(counts)[wanted == 0] == 0).all()


def kept(cache: Path) -> Path:
    [path] = cache.iterdir()
    return path


def test_what_was_learned_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "not" / "there"
    first = bpe.vocabulary(TEXTS, SIZE, cache)
    assert kept(cache).read_text() == first == bpe.vocabulary(TEXTS, SIZE, None), "learned twice, the same entries"
    learns: list[int] = []
    monkeypatch.setattr(bpe, "_learn", lambda texts, size, show: learns.append(size) or "{}")
    assert bpe.vocabulary(TEXTS, SIZE, cache) == first
    assert not learns
    bpe.vocabulary(TEXTS, SIZE + 1, cache)
    bpe.vocabulary([*TEXTS[:-1], TEXTS[-1] + b"!"], SIZE, cache)
    bpe.vocabulary([TEXTS[0] + TEXTS[1], *TEXTS[2:]], SIZE, cache)
    monkeypatch.setattr("tokenizers.__version__", "0.0")
    bpe.vocabulary(TEXTS, SIZE, cache)
    assert learns == [SIZE + 1, SIZE, SIZE, SIZE], "whatever is not the same is learned anew"


@pytest.mark.parametrize("damage", ["cut", "altered", "empty"])
def test_a_damaged_one_is_learned_again(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = bpe.vocabulary(TEXTS, SIZE, tmp_path)
    content = kept(tmp_path).read_bytes()
    # Altered, it still is a tokenizer.json, with two entries exchanged.
    swapped = content.replace(b'"!":', b'"?!":').replace(b'"\\"":', b'"!":')
    assert swapped != content
    kept(tmp_path).write_bytes({"cut": content[:-9], "altered": swapped, "empty": b""}[damage])
    assert bpe.vocabulary(TEXTS, SIZE, tmp_path) == first
    assert "was altered; it is learned anew" in capsys.readouterr().out
    assert kept(tmp_path).read_bytes() == content


def test_a_cache_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert bpe.vocabulary(TEXTS, SIZE, tmp_path / "file" / "folder") == bpe.vocabulary(TEXTS, SIZE, None)
    assert "not kept for the next run" in capsys.readouterr().out


def test_of_much_text_a_share_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "LEARN_BYTES", 500)
    monkeypatch.setattr(bpe, "_PIECE_CHARACTERS", 7)
    texts = ["é".encode() * 1000, b"a" * 2000]
    pieces = list(bpe._pieces(texts))
    assert "".join(pieces) == "é" * 125 + "a" * 250
    assert max(map(len, pieces)) == 7


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tokenizers"]:
        monkeypatch.delitem(sys.modules, name)
    found = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "tokenizers":
            raise ImportError("No module named 'tokenizers'")
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"needs the package tokenizers .*; pip install tokenizers, or"):
        bpe.vocabulary(TEXTS, SIZE, None)


@pytest.mark.parametrize(("name", "size"), [("bytes", None), ("bpe", 4096), ("bpe:257", 257), ("bpe.json", None)])
def test_names(name: str, size: int | None) -> None:
    assert bpe.size_of(name) == size


@pytest.mark.parametrize("name", ["bpe:", "bpe:256", "bpe:x", "bpe:-5", "bpe:4k"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match=r"after bpe: comes the number of entries, 257 .* or more; give bpe:4096"):
        Config(tokenizer=name)


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/a")
    assert Config().tokenizer_cache == Path("/a/commlab/tokenizers")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/b")
    assert Config().tokenizer_cache == Path("/b/.cache/commlab/tokenizers")
    assert Config(tokenizer="bpe").tokenizer == "bpe:4096", "a checkpoint says how many"


def test_ranks_that_read_other_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, with a peer that it is told of."""
    path = tmp_path / "text.json"
    path.write_text(json.dumps([text.decode() for text in TEXTS]))
    group = alone()
    alone_loaded = load_together(group, str(path), f"bpe:{SIZE}", tmp_path / "cache")
    assert np.array_equal(alone_loaded.train, load_corpus(str(path), f"bpe:{SIZE}").train)
    calls = iter(["same", "other"])

    def exchange(group: Group, record: bytes, name: str) -> list[bytes]:
        assert name == "what is trained on"
        return [record, record if next(calls) == "same" else bytes(16)]

    for words in (rf"--tokenizer 'bpe:{SIZE}' differs: rank 1 of 1 read other", r"text differs: rank 1 of 1 .*--data"):
        monkeypatch.setattr(loading, "exchange_records", exchange)
        with pytest.raises(AgreedError, match=words):
            load_together(group, str(path), f"bpe:{SIZE}", tmp_path / "cache")
        calls = iter(["other"])
