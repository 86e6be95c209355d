"""Types of command-line arguments that several benchmarks take: counts, lists of sizes, lists of names."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from .stats import parse_bytes


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def counts(text: str) -> list[int]:
    return [count(number) for number in text.split(",")]


def sizes(text: str) -> list[int]:
    try:
        return [parse_bytes(size) for size in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def names(*known: str) -> Callable[[str], list[str]]:
    """The type of an argument that lists some of ``known``, separated by commas."""

    def parse(text: str) -> list[str]:
        named = text.split(",")
        unknown = [name for name in named if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        return named

    return parse
