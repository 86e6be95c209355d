"""What commlab is measured against: each peer in a small file of its own, used as its documentation says.

``PEERS``: name -> the blocks that it contributes to a case; a peer that is not there contributes a row that says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..core.harness import Block
from . import gloo, horovod, mpi
from .case import Case

PEERS: Final[dict[str, Callable[[Case], list[Block]]]] = {
    "mpi": mpi.blocks,
    "gloo": gloo.blocks,
    "horovod": horovod.blocks,
}
