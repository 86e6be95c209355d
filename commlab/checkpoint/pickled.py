"""The one file that pickles: for calls whose caller has said ``allow_pickle=True``, because the contract of another
library demands it. Nothing on disk is ever pickled, and nothing that a stranger could have sent: a group's members have
shown each other the job's token, or met in the launcher's store."""

from __future__ import annotations

import pickle
from typing import Any


def dumps(obj: Any) -> bytes:
    """The object as bytes."""
    return pickle.dumps(obj)


def loads(data: bytes) -> Any:
    """The object that a rank of this group has pickled."""
    return pickle.loads(data)
