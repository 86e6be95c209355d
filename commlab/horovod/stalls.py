"""The words for operations that some ranks do not announce: which, for how long, and whom they wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .channel import Channel


def stalled_words(channel: Channel, now_s: float) -> str:
    """Which operations wait for which ranks, and for how long."""
    silent: list[int] = []
    head = channel.group.progress.head()
    if channel.waits_for is not None and head is not None:
        silent = [channel.ranks[peer] for peer in head.peers()]
    lacking: dict[tuple[int, ...], list[str]] = {}
    oldest_s = 0.0
    for name, submission in sorted(channel.submissions.items(), key=lambda item: item[1].since_s):
        waited_s = now_s - submission.since_s
        if waited_s < channel.settings.warn_s / 2:
            continue
        oldest_s = max(oldest_s, waited_s)
        row = channel.table.get(name)
        known = row is not None and channel.group.rank in row.requests
        absent = [
            rank
            for peer, rank in enumerate(channel.ranks)
            if row is not None and peer not in row.requests and peer not in channel.joined
        ]
        lacking.setdefault(tuple(absent if known and absent else silent), []).append(name)
    texts = []
    for ranks, names in lacking.items():
        who = f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}" if ranks else "other ranks"
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        texts.append(f"{', '.join(map(repr, names[:8]))}{more}: {who} {'has' if len(ranks) == 1 else 'have'} not")
    return (
        f"has waited {oldest_s:.1f} s for ranks that have not announced these operations: {'; '.join(texts)}. "
        "Every rank must call the same operations by the same names"
    )
