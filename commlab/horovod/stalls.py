"""The words for operations that some ranks do not announce: which, for how long, and whom they wait for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def stalled_words(waiting: Mapping[str, float], lacking: Mapping[str, Sequence[int]], silent: Sequence[int]) -> str:
    """``waiting``: for how many seconds each operation has waited; ``lacking``: which ranks have not announced it, of
    those that this rank has announced itself and the others have answered; ``silent``: who has not answered."""
    by_ranks: dict[tuple[int, ...], list[str]] = {}
    for name, _ in sorted(waiting.items(), key=lambda item: -item[1]):
        by_ranks.setdefault(tuple(lacking.get(name) or silent), []).append(name)
    texts = [f"{_listed(names)}: {_ranks(ranks)} not" for ranks, names in by_ranks.items()]
    return (
        f"has waited {max(waiting.values(), default=0.0):.1f} s for ranks that have not announced these operations: "
        f"{'; '.join(texts)}. Every rank must call the same operations by the same names: see its own output"
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{', '.join(map(repr, names[:8]))}{more}"


def _ranks(ranks: Iterable[int]) -> str:
    numbers = [str(rank) for rank in ranks]
    if not numbers:
        return "other ranks have"
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(numbers)} {'have' if len(numbers) > 1 else 'has'}"
