"""The corpus: a text as two rows of tokens, one for training and one held out; encoded whole, or in one share per
rank."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import UsageError
from ..display import is_terminal
from .bpe import learned, size_of
from .text import Text, read_text
from .tokenizer import Tokenizer, open_tokenizer

_BATCH_BYTES = 4 << 20
"""How much text is encoded in one call, at most, where the library's threads have the machine to themselves: while it
works, the library takes about a hundred times as much."""
_LONG_TOKEN_BYTES = 100
"""Where tokens stand for more bytes than this, it is the tokenizer that is at fault, and not a short text."""


@dataclass(frozen=True)
class Corpus:
    """The tokens of a text: those to train on, and those held out; no byte of the text is in both.

    Ids have the smallest dtype that fits the vocabulary: int32, uint16 or uint8 (1 byte per byte of text with the bytes
    tokenizer).
    """

    train: np.ndarray
    """Ids to train on."""
    held_out: np.ndarray
    """Ids that are held out."""
    held_out_bytes: np.ndarray
    """How many bytes of text each held-out token stands for; separators: 0."""
    tokenizer: Tokenizer
    source: str
    documents: int
    text_bytes: int
    skipped_files: int
    notes: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def separator(self) -> int | None:
        return self.tokenizer.separator

    def digest(self) -> str:
        """Equal exactly for equal training tokens; 30 ms for 12 MB."""
        return blake2b(np.ascontiguousarray(self.train).view(np.uint8).data, digest_size=16).hexdigest()

    def summary(self) -> str:
        """One line for the log: where the text is from, how much text there is, and what was left out."""
        held_out_bytes = int(self.held_out_bytes.sum())
        skipped = f", {self.skipped_files} files that are not UTF-8 text skipped" if self.skipped_files else ""
        skipped += "".join(f", {note}" for note in self.notes)
        return (
            f"{self.source}: {self.documents} documents, {self.text_bytes / 1e6:.2f} MB{skipped};"
            f" {len(self.train):,} tokens to train on, {len(self.held_out):,} held out ({held_out_bytes:,} bytes,"
            f" {held_out_bytes / len(self.held_out):.2f} per token); vocabulary of {self.vocab_size:,}"
        )


def load_corpus(
    paths: str | Sequence[str] | None = None,
    tokenizer: str = "bytes",
    cache: Path | None = None,
    text_field: str | None = None,
) -> Corpus:
    """Read a text, tokenize it, and hold out a twentieth, all in this process.

    ``paths`` and ``text_field``: as for :func:`commlab.trainer.data.text.read_text`. ``cache``: the folder of learned
    tokenizers, None for none.
    Errors: UsageError, also for a tokenizer that cannot be had.
    Cost: the text once in memory, plus its tokens; less than 0.1 s of CPU for the default with the bytes tokenizer.
    """
    text = read_text(paths, text_field)
    size = size_of(tokenizer)
    opened = open_tokenizer(tokenizer) if size is None else learned(text.train, size, cache)
    return assemble(text, opened, encode(text.train, opened), *encode_with_bytes(text.held_out, opened))


class _Piece(NamedTuple):
    """A stretch of a document, encoded in one go."""

    text: bytes
    ends_document: bool


def _share(texts: Sequence[bytes], tokenizer: Tokenizer, index: int, shares: int) -> list[_Piece]:
    """The index-th of ``shares`` shares, about equal in bytes; all shares, in order, are the texts."""
    pieces = [
        _Piece(piece, at == len(cut) - 1)
        for text in texts
        for cut in [tokenizer.pieces(text)]
        for at, piece in enumerate(cut)
    ]
    begins = np.cumsum([0, *(len(piece.text) for piece in pieces)])
    holders = begins[:-1] * shares // max(int(begins[-1]), 1)
    # Empty documents at the very end begin where the text ends.
    return [piece for piece, holder in zip(pieces, holders, strict=True) if min(holder, shares - 1) == index]


def encode(
    texts: Sequence[bytes], tokenizer: Tokenizer, index: int = 0, shares: int = 1, show: bool = False
) -> np.ndarray:
    """Ids of the index-th of ``shares`` shares of ``texts``, with a separator after each document; all shares, in
    order, are the whole. ``show``: a progress bar, should encoding take some seconds."""
    pieces = _share(texts, tokenizer, index, shares)
    end = _end(tokenizer)
    rows: list[np.ndarray] = []
    for batch in _shown(list(_batches(pieces, _BATCH_BYTES if shares == 1 else 1)), show):
        for piece, ids in zip(batch, tokenizer.encode_all([piece.text for piece in batch]), strict=True):
            rows += [ids, end] if piece.ends_document else [ids]
    return _joined(rows, dtype_for(tokenizer))


def encode_with_bytes(
    texts: Sequence[bytes], tokenizer: Tokenizer, index: int = 0, shares: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The ids that :func:`encode` gives, and how many bytes of text each id stands for."""
    end = _end(tokenizer)
    rows: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for piece in _share(texts, tokenizer, index, shares):
        ids, token_bytes = tokenizer.encode_with_bytes(piece.text)
        rows += [ids, end] if piece.ends_document else [ids]
        counts += [token_bytes, np.zeros_like(end)] if piece.ends_document else [token_bytes]
    return _joined(rows, dtype_for(tokenizer)), _joined(counts, np.dtype(np.int32))


def assemble(
    text: Text, tokenizer: Tokenizer, train: np.ndarray, held_out: np.ndarray, held_out_bytes: np.ndarray
) -> Corpus:
    """The corpus of ids that were encoded from ``text``. UsageError where there are too few of them to train on, with
    the reason: the text is too short, or the tokenizer takes nearly all of the text for one token."""
    ids = len(train) + len(held_out)
    held_out_text = len(held_out) >= 2 and bool(held_out_bytes[1:].any())
    unknown = 0.0 if tokenizer.unknown is None or not len(train) else float((train == tokenizer.unknown).mean())
    if unknown > 0.5 and text.text_bytes <= _LONG_TOKEN_BYTES * ids:
        raise UsageError(
            f"--tokenizer {tokenizer.name!r} lacks the words of {text.source}: {unknown:.0%} of the tokens are the one"
            " for unknown words; give a tokenizer of this kind of text"
        )
    if len(train) >= 2 and held_out_text:
        origin = text.source, text.documents, text.text_bytes, text.skipped_files, text.notes
        return Corpus(train, held_out, held_out_bytes, tokenizer, *origin)
    if text.text_bytes > _LONG_TOKEN_BYTES * max(ids, 1):
        raise UsageError(
            f"--tokenizer {tokenizer.name!r} makes {ids} token{'s' * (ids != 1)} of the {text.text_bytes:,} bytes of"
            f" {text.source}: it cuts the text nowhere (has it a pre_tokenizer?), or knows none of its words; give"
            " another tokenizer"
        )
    raise UsageError(
        f"{text.source} is too short: {text.text_bytes} bytes make {len(train)} tokens to train on and"
        f" {len(held_out)} held out, and each part needs 2 at least, the second for text; give more text"
    )


def dtype_for(tokenizer: Tokenizer) -> np.dtype:
    """The smallest dtype that holds all ids."""
    size = tokenizer.vocab_size
    return np.dtype(np.uint8 if size <= 1 << 8 else np.uint16 if size <= 1 << 16 else np.int32)


def _end(tokenizer: Tokenizer) -> np.ndarray:
    return np.array([] if tokenizer.separator is None else [tokenizer.separator], np.int32)


def _joined(rows: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate([row.astype(dtype, copy=False) for row in rows]) if rows else np.zeros(0, dtype)


def _batches(pieces: Sequence[_Piece], size_bytes: int) -> Iterator[list[_Piece]]:
    """The pieces, in order, as batches of at most ``size_bytes`` or of one piece."""
    batch: list[_Piece] = []
    total = 0
    for piece in pieces:
        if batch and total + len(piece.text) > size_bytes:
            yield batch
            batch, total = [], 0
        batch.append(piece)
        total += len(piece.text)
    if batch:
        yield batch


def _shown(batches: list[list[_Piece]], show: bool) -> Iterable[list[_Piece]]:
    if not (show and is_terminal(sys.stderr)):
        return batches
    from tqdm import tqdm

    return tqdm(batches, desc="tokenizing", unit="batch", delay=2, leave=False)  # type: ignore[no-any-return]
