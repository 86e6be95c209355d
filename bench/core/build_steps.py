"""Long commands with a name, a moving line, a time limit and a log: what a person waiting for a build wants to see."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

POLL_S = 0.2
QUIET_LINE_S = 30.0  # without a terminal: one line this often, so that a CI log shows life and stays short
SHOWN_LINES = 20


class BuildError(RuntimeError):
    """A step failed; the message names the step and the log."""


class Steps:
    """Runs commands one after the other, all their output in one log file, one line each on the screen."""

    def __init__(self, log: Path, timeout_s: float) -> None:
        self.log = log
        self.timeout_s = timeout_s
        self.number = 0

    def run(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Run to the end or raise BuildError. The command's process group is of its own and ended whatever happens."""
        self.number += 1
        limit_s = timeout_s or self.timeout_s
        with open(self.log, "ab" if self.number > 1 else "wb") as log:
            log.write(f"\n==== {self.number}: {name}\n".encode())
            log.flush()
            start_of_step = log.tell()
            started_s = time.monotonic()
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = self._watch(process, name, started_s, limit_s, start_of_step)
            finally:
                end_group(process)
        took_s = time.monotonic() - started_s
        if status is None:
            raise BuildError(
                f"step {self.number} ({name}) was still running after {limit_s:.0f} s and was stopped; log: {self.log}"
            )
        if status != 0:
            why = cause(self.log, start_of_step)
            raise BuildError(f"step {self.number} ({name}) failed with exit code {status}:\n{why}\nlog: {self.log}")
        show(f"[{self.number}] {name}: {took_s:.0f} s", last=True)

    def _watch(
        self, process: subprocess.Popen[bytes], name: str, started_s: float, limit_s: float, offset: int
    ) -> int | None:
        """Show progress until the command ends (its exit code) or the time is up (None)."""
        spinner, shown_s = 0, started_s
        while (status := process.poll()) is None:
            now_s = time.monotonic()
            if now_s - started_s > limit_s:
                return None
            if sys.stdout.isatty() or now_s - shown_s > QUIET_LINE_S:
                shown_s, spinner = now_s, spinner + 1
                mark = "|/-\\"[spinner % 4] if sys.stdout.isatty() else "..."
                show(f"[{self.number}] {name} {mark} {now_s - started_s:.0f} s {progress(self.log, offset)}")
            time.sleep(POLL_S)
        return status


def progress(log: Path, offset: int) -> str:
    """How far cmake is, and with which file: the last ``[ 42%] ...`` (make) or ``[7/19] ...`` (ninja) after
    ``offset``."""
    with open(log, "rb") as stream:
        stream.seek(max(offset, log.stat().st_size - 65536))
        lines = re.findall(r"\[ *(\d+%|\d+/\d+)\] ([^\n]*)", stream.read().decode(errors="replace"))
    if not lines:
        return ""
    done, doing = lines[-1]
    return f"{done} {doing.split('/')[-1][:60]}"


def cause(log: Path, offset: int) -> str:
    """The lines of this step around its first error, as compilers and pip write it; without one, its last lines."""
    lines = log.read_bytes()[offset:].decode(errors="replace").splitlines()
    first = next(
        (k for k, line in enumerate(lines) if re.search(r"(?i)\berror:|cmake error|\*\*\* .*error", line)), len(lines)
    )
    return "\n".join(lines[max(0, min(first - 2, len(lines) - SHOWN_LINES)) :][:SHOWN_LINES])


def show(line: str, last: bool = False) -> None:
    """On a terminal the line replaces the one before; elsewhere every line stays."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{line}", end="\n" if last else "", flush=True)
    else:
        print(line, flush=True)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the command's process group: asked first, killed after 3 s."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


@contextmanager
def file_lock(path: Path, timeout_s: float, log: Path) -> Iterator[None]:
    """One holder at a time on this machine; the kernel frees it when its holder dies. Waits ``timeout_s`` at most."""
    deadline_s = time.monotonic() + timeout_s
    with open(path, "a") as handle:
        announced = False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise BuildError(
                        f"another process still holds {path} after {timeout_s:.0f} s; its log: {log}"
                    ) from None
                if not announced:
                    show(f"another process is building this wheel, waiting for it; its log: {log}", last=True)
                    announced = True
                time.sleep(POLL_S)
        yield
