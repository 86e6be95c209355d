"""A function on several ranks of this machine, without a launcher: ``horovod.run(train, np=2)``."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import PeerLostError, UsageError


def run(
    func: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    np: int = 1,
    *,
    env: Mapping[str, str] | None = None,
    start_timeout: float | None = None,
    verbose: int = 1,
    **options: Any,
) -> list[Any]:
    """Call ``func(*args, **kwargs)`` on ``np`` ranks, each a process of its own, and return what each of them returned,
    in rank order. ``env``: variables of the ranks beside those of this process.

    Function, arguments and results are pickled, by cloudpickle where it is there. What a rank raises is raised here,
    with its traceback, and the others are ended. On other machines ranks are launched by mpirun or torchrun:
    ``options`` that name hosts are a UsageError; others mean nothing here.
    """
    hosts = options.get("hosts") or options.get("hostfile")
    if hosts and str(hosts).split(":")[0] not in ("localhost", "127.0.0.1", socket.gethostname()):
        raise UsageError(
            f"horovod.run on hosts {hosts!r}: ranks are started on this machine only; use mpirun or torchrun"
        )
    from ..checkpoint.pickled import dumps_any, loads

    work = dumps_any((func, tuple(args), dict(kwargs or {})))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(work, rank, np, port, dict(env or {}), answers), daemon=False)
        for rank in range(np)
    ]
    for each in ranks:
        each.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < np:
            try:
                rank, failed, data = answers.get(timeout=0.2)
            except queue.Empty:
                gone = [rank for rank, each in enumerate(ranks) if rank not in results and each.exitcode is not None]
                if gone and answers.empty():
                    time.sleep(0.2)
                    if answers.empty():
                        codes = ", ".join(f"rank {rank} (exit code {ranks[rank].exitcode})" for rank in gone)
                        raise PeerLostError(f"horovod.run: {codes} ended without a result") from None
                continue
            if failed:
                raise RuntimeError(f"horovod.run: rank {rank} raised:\n{data}")
            results[rank] = loads(data)
        for each in ranks:
            each.join()
    finally:
        for each in ranks:
            if each.exitcode is None:
                each.terminate()
            each.join(5)
    return [results[rank] for rank in range(np)]


def _rank(work: bytes, rank: int, size: int, port: int, env: dict[str, str], answers: Any) -> None:
    from ..checkpoint.pickled import dumps_any, loads

    os.environ.update(env)
    if size > 1:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), HOROVOD_RANK=str(rank), HOROVOD_SIZE=str(size),
        )  # fmt: skip
        for name in ("PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
            os.environ.pop(name, None)
    try:
        func, args, kwargs = loads(work)
        answers.put((rank, False, dumps_any(func(*args, **kwargs))))
    except BaseException:
        answers.put((rank, True, traceback.format_exc()))
        raise
