"""Ranks forked from one process that has imported torch: a job of torch.distributed starts within a tenth of a second.

``python forked.py`` serves: it reads a request a line (JSON), forks the ranks, and writes what each of them returned.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]


class RankFailed(AssertionError):
    """A rank raised something, or did not return in time."""


class Forked:
    """The client. ``environ``: of the process that forks."""

    def __init__(self, **environ: str):
        from jobs import environment

        command = [sys.executable, "-W", "ignore", __file__]
        self._process = subprocess.Popen(
            command, env=environment(**environ), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(
        self,
        function: Callable[..., Any],
        size: int = 2,
        *,
        backend: str | None = "commlab",
        method: str = "tcp",
        limit_s: float = 60.0,
        silent_s: float = 30.0,
        environ: dict[str, str] | None = None,
        arguments: tuple[Any, ...] = (),
        whole_exit: bool = False,
        preload: tuple[str, ...] = (),
    ) -> list[Any]:
        """``function(rank, size, *arguments)`` on every rank of a group of ``backend`` (None: none is made); the
        results, through JSON, in rank order. ``method``: how they meet, tcp, file or env. ``silent_s``: the group's
        timeout. ``preload``: modules that the ranks need, imported once, before they are forked. ``whole_exit``: ranks
        leave as the interpreter does, and their exit codes are returned beside."""
        request = {
            "file": function.__code__.co_filename,
            "function": function.__name__,
            "size": size,
            "backend": backend,
            "method": method,
            "limit_s": limit_s,
            "silent_s": silent_s,
            "environ": environ or {},
            "arguments": arguments,
            "whole_exit": whole_exit,
            "preload": preload,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        failures = [f"rank {rank}: {text}" for rank, text in enumerate(answer["errors"]) if text]
        if failures:
            raise RankFailed("\n".join(failures))
        assert not any(answer["codes"]) or whole_exit, answer["codes"]
        if whole_exit:
            return list(zip(answer["results"], answer["codes"], strict=True))
        return list(answer["results"])

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._process.stdout.close()


def _serve() -> None:
    import pytest  # noqa: F401
    import torch
    import torch._dynamo  # which DDP's constructor and an optimizer's load: a second for each of the ranks

    import commlab.c10d.ddp_hook
    import commlab.c10d.process_group

    commlab.c10d.register()
    torch.set_num_threads(1)
    answers = os.dup(1)
    os.dup2(2, 1)  # what ranks print goes where errors go
    for line in sys.stdin:
        answer = json.dumps(_job(json.loads(line))) + "\n"
        os.write(answers, answer.encode())
    os._exit(0)  # there is nothing to tidy up, and to take all of torch apart takes seconds


def _job(request: dict[str, Any]) -> dict[str, Any]:
    from jobs import free_port

    size = request["size"]
    for name in request["preload"]:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        children: list[tuple[int, int]] = []
        for rank in range(size):
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                _rank(request, rank, port, folder, writing)
            os.close(writing)
            children.append((pid, reading))
        return _collect(children, time.monotonic() + request["limit_s"])


def _collect(children: list[tuple[int, int]], stop_s: float) -> dict[str, Any]:
    texts = {reading: b"" for _, reading in children}
    open_ends = set(texts)
    while open_ends and time.monotonic() < stop_s:
        for end in select.select(list(open_ends), [], [], 0.2)[0]:
            found = os.read(end, 65536)
            texts[end] += found
            if not found:
                open_ends.discard(end)
    results: list[Any] = []
    errors: list[str] = []
    codes: list[int] = []
    for pid, reading in children:
        late = reading in open_ends
        if late:
            os.kill(pid, signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os.close(reading)
        found = json.loads(texts[reading]) if texts[reading] and not late else {}
        results.append(found.get("result"))
        lost = (
            "did not return in time" if late else "" if "result" in found else f"ended with {codes[-1]}, saying nothing"
        )
        errors.append(found.get("error") or lost)
    return {"results": results, "errors": errors, "codes": codes}


def _rank(request: dict[str, Any], rank: int, port: int, folder: str, writing: int) -> None:
    import faulthandler
    from datetime import timedelta

    import torch.distributed as dist

    faulthandler.dump_traceback_later(max(1.0, request["limit_s"] - 2))
    os.environ.update(request["environ"])
    found: dict[str, Any] = {}
    code = 0
    try:
        size = request["size"]
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ.update(variables)
        methods = {"tcp": f"tcp://127.0.0.1:{port}", "file": f"file://{folder}/store", "env": None}
        if request["backend"] is not None:
            silent = timedelta(seconds=request["silent_s"])
            dist.init_process_group(
                request["backend"], methods[request["method"]], rank=rank, world_size=size, timeout=silent
            )
        spec = importlib.util.spec_from_file_location("ranks_under_test", request["file"])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found["result"] = getattr(module, request["function"])(rank, size, *request["arguments"])
    except BaseException:
        found["error"] = traceback.format_exc()
        code = 1
    sys.stderr.flush()
    os.write(writing, json.dumps(found).encode())
    if request["whole_exit"] and not code:
        os.close(writing)
        sys.exit(0)
    os._exit(code)


if __name__ == "__main__":
    _serve()
