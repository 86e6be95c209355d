"""What is measured: commlab's own contestants, the floor, and the peers, each in a small file of its own.

``PEERS``: the name of a peer -> the blocks that the peer contributes to a case. A peer that is not there contributes a
record that says why.
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
