"""``python -m bench.training.killed``: the ranks of one host for :mod:`bench.death`, forked from a process that has
torch, one after the other.

Requests come as lines of JSON on stdin. ``{"begin": {...}}`` forks a rank, with the fields of :class:`RankRequest`;
``{"end": "kill"}`` sends the rank SIGKILL, ``{"end": "wait"}`` waits for its end. On stdout the host says what happens:
``listening``, on which port rank 0 awaits the others; ``ready``, once the rank has exchanged something; ``raised``,
when and with which words an exchange raised; ``killed`` and when; ``ended``. Times are those of the host's monotonic
clock, in seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

WARM_UPS = 2
LIMIT_S = 120
"""After so long a rank ends by itself, whatever it waits for."""


@dataclass(frozen=True)
class RankRequest:
    """What the rank is, and what it does until it is killed or misses another one."""

    rank: int
    size: int
    variables: dict[str, str]
    """Of its environment: the launcher's, and what a row changes. Rank 0's has no MASTER_PORT: rank 0 chooses it."""
    exchanged_bytes: int
    """Of float32 in one allreduce."""
    memory_bytes: int
    """The rank has written to so much memory beside."""


def say(**fields: Any) -> None:
    os.write(1, json.dumps(fields).encode() + b"\n")


def main() -> int:
    import torch
    import torch.distributed

    import commlab
    import commlab.transport.torchdist

    torch.set_num_threads(1)
    say(event="up", version=commlab.__version__)
    child = 0
    for line in sys.stdin:
        request = json.loads(line)
        if "begin" in request:
            child = os.fork()
            if not child:
                _run(RankRequest(**request["begin"]))
            continue
        if request["end"] == "kill":
            at_s = time.monotonic()
            os.kill(child, signal.SIGKILL)
            say(event="killed", at_s=at_s)
        os.waitpid(child, 0)
        say(event="ended", at_s=time.monotonic())
    return 0


def _run(request: RankRequest) -> NoReturn:
    signal.alarm(LIMIT_S)
    code = 1
    with suppress(BaseException):
        code = 0 if _exchange(request) else 1
    os._exit(code)


def _exchange(request: RankRequest) -> bool:
    import torch

    import commlab

    os.environ.update(request.variables)
    listening = [_listen()] if request.rank == 0 else []
    held = [torch.ones(1 << 20) for _ in range(request.memory_bytes >> 22)]
    tensor = torch.full((request.exchanged_bytes // 4,), float(request.rank))
    try:
        group = commlab.init(transport="torch", nodes="1", window="off", links="tcp", timeout_s=60)
        listening.clear()  # commlab's own store holds the port now
        for _ in range(WARM_UPS):
            commlab.allreduce(tensor, "max", group=group)
        say(event="ready", held_bytes=sum(each.nbytes for each in held))
        while True:
            commlab.allreduce(tensor, "max", group=group)
    except commlab.PeerLostError as error:
        say(event="raised", at_s=time.monotonic(), text=str(error))
        return True
    except BaseException as error:
        say(event="failed", text=repr(error))
        raise


def _listen() -> Any:
    """A store on a port that the kernel chooses, and the word to all where it is.

    A port that somebody else has found free may be taken by the time that rank 0 opens it. The store that commlab opens
    at MASTER_PORT shares this one's server, since torch lets several in one process do so.
    """
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    os.environ["MASTER_PORT"] = str(store.port)
    say(event="listening", port=store.port)
    return store


if __name__ == "__main__":
    sys.exit(main())
