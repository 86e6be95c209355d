"""A byte-level BPE learned from the training text itself, kept in the user's cache: --tokenizer bpe, or bpe:SIZE.

R. Sennrich, B. Haddow, A. Birch, "Neural machine translation of rare words with subword units", ACL 2016; on bytes, as
in GPT-2. Importing this loads nothing: the flags are checked with it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UsageError

if TYPE_CHECKING:
    from .tokenizer import TrainedTokenizer

DEFAULT_SIZE = 4096
"""3.5 bytes of Python per token; 8192 reach 3.8, and double a small model's largest tensors (docs/data.md)."""
END_OF_TEXT = "<|endoftext|>"
SMALLEST = 256 + 1
"""All bytes and the end of a text."""
LEARN_BYTES = 64 << 20
"""Of more text than this a share is learned from, the same of every document: the other ranks wait for it."""

_PIECE_CHARACTERS = 1 << 16


def size_of(name: str) -> int | None:
    """The number of entries that a --tokenizer asks for; None where it is not bpe. UsageError for one that can't be."""
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
    """As :func:`vocabulary`, ready for use."""
    return opened(vocabulary(texts, size, cache, show), size)


def opened(text: str, size: int) -> TrainedTokenizer:
    """The tokenizer of what :func:`vocabulary` gave, perhaps on another rank."""
    from tokenizers import Tokenizer

    from .tokenizer import TrainedTokenizer

    found = Tokenizer.from_str(text)
    # A text may spell the end of a text; that does not end it.
    found.encode_special_tokens = True
    return TrainedTokenizer(f"bpe:{size}", found, byte_level=True)


def vocabulary(texts: Sequence[bytes], size: int, cache: Path | None, show: bool = False) -> str:
    """A tokenizer.json of `size` entries or, where `texts` have no more pairs that occur twice, fewer. From the folder
    `cache` if it was learned before from the same texts, else learned now and put there.

    The same texts, size and version of tokenizers give the same entries. `show`: say what is done, with a progress bar.
    Errors: UsageError where tokenizers is not installed. A cache that cannot be written is only said.
    Cost: 4 s of CPU for 12 MB; once.
    """
    try:
        from tokenizers import __version__ as version
    except ImportError as error:
        raise UsageError(
            f"--tokenizer bpe needs the package tokenizers ({error}); pip install tokenizers, or give --tokenizer bytes"
        ) from error
    key = _key(texts, size, version)
    found = None if cache is None else _read(cache, key)
    if found is not None:
        return found
    if show:
        print(f"tokenizer: learning bpe:{size} from the training text", flush=True)
    made = _learn(texts, size, show)
    if cache is not None:
        try:
            _write(cache, key, made)
        except OSError as error:
            print(f"tokenizer: not kept for the next run, {cache} cannot be written: {error}", flush=True)
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
        # Sorted: the library numbers them in its own order anyhow, but nothing should depend on that.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = list(_pieces(texts))
    if show:
        from tqdm import tqdm

        tokenizer.train_from_iterator(tqdm(pieces, desc="tokenizer", unit="piece", delay=1, leave=False), trainer)
    else:
        tokenizer.train_from_iterator(pieces, trainer)
    return str(tokenizer.to_str())


def _pieces(texts: Sequence[bytes]) -> Iterator[str]:
    total = sum(map(len, texts))
    for text in texts:
        share = text if total <= LEARN_BYTES else text[: len(text) * LEARN_BYTES // total]
        characters = share.decode(errors="ignore")  # the share may end inside a character
        for at in range(0, len(characters), _PIECE_CHARACTERS):
            yield characters[at : at + _PIECE_CHARACTERS]


def _key(texts: Sequence[bytes], size: int, version: str) -> str:
    found = sha256(f"commlab bpe 1, {size} entries, {LEARN_BYTES}, tokenizers {version}".encode())
    for text in texts:
        found.update(len(text).to_bytes(8, "little"))
        found.update(text)
    return found.hexdigest()[:32]


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()[:32]


def _read(cache: Path, key: str) -> str | None:
    """What was kept under `key`, if it is as it was written: its own digest is part of its name."""
    with suppress(OSError):
        for path in sorted(cache.glob(f"{key}-*.json")):
            content = path.read_bytes()
            if path.name == f"{key}-{_digest(content)}.json":
                return content.decode()
            print(f"tokenizer: {path} was altered; it is learned anew", flush=True)
            path.unlink()
    return None


def _write(cache: Path, key: str, text: str) -> None:
    """Aside and renamed: another job that looks finds all of it or nothing."""
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
