"""Reports of training runs, made up."""

from __future__ import annotations

import dataclasses
from typing import Any

from bench.training.jobs import Measured


def measured(step_s: float = 1.0, **changes: Any) -> Measured:
    """The report of a run whose steps take ``step_s``, with ``changes``."""
    parts = {"compute_s": 0.6 * step_s, "exchange_s": 0.3 * step_s, "update_s": 0.1 * step_s}
    found = Measured(
        1000,
        step_s,
        **parts,
        loss=2.0,
        held_out_bits=4.0,
        bytes_sent=10**6,
        interface_bytes=None,
        memory_bytes=2**20,
        nodes=1,
        versions={},
    )
    return dataclasses.replace(found, **changes)
