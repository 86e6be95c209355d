"""The table of docs/porting.md: what users do to a loop is right or refused under every strategy, and never silent."""

from __future__ import annotations

import kinds


def test_the_page_says_what_happens() -> None:
    """A1 to A19, B7: each kind under each strategy, beside plain torch; see kinds.py. Where this fails after a change
    that was meant, ``python tests/helpers/kinds.py`` writes the table anew."""
    assert kinds.table() == kinds.table_on_the_page()
