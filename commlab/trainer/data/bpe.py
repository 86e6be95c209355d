"""A byte-level BPE, learned from the training text itself and kept in the user's cache: --tokenizer bpe, or bpe:SIZE.

R. Sennrich, B. Haddow, A. Birch, "Neural machine translation of rare words with subword units", ACL 2016; on bytes, as
in GPT-2. Importing this loads neither torch nor numpy: flags are checked with it.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UsageError
from .. import display

if TYPE_CHECKING:
    from .tokenizer import TrainedTokenizer

DEFAULT_SIZE = 4096
"""3.5 bytes of Python per token; 8192 reach 3.8, and double a small model's largest tensors (docs/data.md)."""
END_OF_TEXT = "<|endoftext|>"
SMALLEST = 256 + 1
"""The fewest entries: all bytes and the end of a text."""
LEARN_BYTES = 64 << 20
"""The most text that is learned from; of more text, the beginning of every document, in proportion, because the other
ranks wait."""

LONGEST_WORD = 64
"""Longer runs of characters without a space, or of spaces, are cut for learning. A merge costs the library the length
of each word that has the pair, so a text without spaces (DNA) would cost its length times the number of entries; cut,
it costs 64 times the pairs that are merged. Text of ordinary words is learned from as it is."""
LONG_CHARACTERS = 8 << 20
"""The most characters of such runs that are learned from."""

_PIECE_CHARACTERS = 1 << 16
_LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD}}}(?=\S)|\s{{{LONGEST_WORD}}}(?=\s)")


def size_of(name: str) -> int | None:
    """The number of entries that a --tokenizer asks for; None where the tokenizer is not bpe. UsageError for a number
    that is too small."""
    kind, colon, size = name.partition(":")
    if kind != "bpe":
        return None
    if not colon:
        return DEFAULT_SIZE
    if not size.isdecimal() or int(size) < SMALLEST:
        raise UsageError(
            f"--tokenizer {name!r}: after bpe: comes the number of entries, {SMALLEST} (all bytes and an end of text)"
            f" or more; give bpe:{DEFAULT_SIZE}, or bpe, which is the same"
        )
    return int(size)


def learned(texts: Sequence[bytes], size: int, cache: Path | None, show: bool = False) -> TrainedTokenizer:
    """The tokenizer of :func:`vocabulary`, ready for use."""
    return opened(vocabulary(texts, size, cache, show), size)


def opened(text: str, size: int) -> TrainedTokenizer:
    """The tokenizer that :func:`vocabulary` has returned as text, perhaps on another rank."""
    from tokenizers import Tokenizer

    from .tokenizer import TrainedTokenizer

    found = Tokenizer.from_str(text)
    # A text that spells the end of a text does not end there.
    found.encode_special_tokens = True
    return TrainedTokenizer(f"bpe:{size}", found)


def vocabulary(texts: Sequence[bytes], size: int, cache: Path | None, show: bool = False) -> str:
    """A tokenizer.json of ``size`` entries or, where ``texts`` have no more pairs that occur twice, of fewer. It comes
    from the folder ``cache`` if it was learned before from the same texts; else it is learned now and put there.

    The same texts, size and version of tokenizers give the same entries. ``show``: print that it is learned, with a
    progress bar.
    Errors: UsageError where tokenizers is not installed. A cache that cannot be written gives a warning.
    Cost: 4 s of CPU for 12 MB; once.
    """
    try:
        from tokenizers import __version__ as version
    except ImportError as error:
        raise UsageError(
            f"--tokenizer bpe needs the package tokenizers ({error}); pip install tokenizers, or give --tokenizer bytes"
        ) from error
    key = _key(texts, size, version)
    kept = None if cache is None else _read(cache, key)
    if kept is not None:
        return kept
    if show:
        display.show(f"tokenizer: learning bpe:{size} from the training text")
    made = _learn(texts, size, show)
    if cache is not None:
        try:
            _write(cache, key, made)
        except OSError as error:
            display.show(f"tokenizer: not kept for the next run, {cache} cannot be written: {error}")
    return made


def _learn(texts: Sequence[bytes], size: int, show: bool) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        # Sorted: the library has an order of its own, but the entries should not depend on it.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces: Iterable[str] = _pieces(texts)
    if show and display.is_terminal(sys.stderr):
        from tqdm import tqdm

        pieces = tqdm(pieces, desc="tokenizer", unit="piece", delay=1, leave=False)
    tokenizer.train_from_iterator(pieces, trainer)
    return str(tokenizer.to_str())


def _pieces(texts: Sequence[bytes]) -> list[str]:
    """What is learned from: ordinary text, and of the rest an equal share that makes ``LONG_CHARACTERS`` at most."""
    cut = list(_cut(texts))
    every = -(-sum(len(piece) for piece, is_long in cut if is_long) // LONG_CHARACTERS)
    ranks = itertools.count()
    return [piece for piece, is_long in cut if not is_long or next(ranks) % every == 0]


def _cut(texts: Sequence[bytes]) -> Iterator[tuple[str, bool]]:
    """The texts' beginnings in pieces, each with whether it was cut from a run that is longer than LONGEST_WORD."""
    total = sum(map(len, texts))
    for text in texts:
        beginning = text if total <= LEARN_BYTES else text[: len(text) * LEARN_BYTES // total]
        characters = beginning.decode(errors="ignore")  # the beginning may end inside a character
        for at in range(0, len(characters), _PIECE_CHARACTERS):
            piece, begin = characters[at : at + _PIECE_CHARACTERS], 0
            for run in _LONG_RUN.finditer(piece):
                if begin < run.start():
                    yield piece[begin : run.start()], False
                yield run.group(), True
                begin = run.end()
            if begin < len(piece):
                yield piece[begin:], False


def _key(texts: Sequence[bytes], size: int, version: str) -> str:
    found = sha256(f"commlab bpe 2, {size} entries, {LEARN_BYTES}, tokenizers {version}".encode())
    for text in texts:
        found.update(len(text).to_bytes(8, "little"))
        found.update(text)
    return found.hexdigest()[:32]


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:32]


def _read(cache: Path, key: str) -> str | None:
    """The text that was kept under ``key``, if its file is unchanged: the name of a file has the digest of its
    content."""
    with suppress(OSError):
        for path in sorted(cache.glob(f"{key}-*.json")):
            content = path.read_bytes()
            if path.name == f"{key}-{_digest(content)}.json":
                return content.decode()
            display.show(f"tokenizer: {path} was altered; it is learned anew")
            path.unlink()
    return None


def _write(cache: Path, key: str, text: str) -> None:
    """Write aside and rename, so that another job finds the whole file or none."""
    content = text.encode()
    cache.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(prefix=f".{key}-", dir=cache)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(aside, cache / f"{key}-{_digest(content)}.json")
    except BaseException:
        with suppress(OSError):
            os.unlink(aside)
        raise
