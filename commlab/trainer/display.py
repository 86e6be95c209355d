"""How a run shows that it goes on: a bar on a terminal, elsewhere a line every some seconds, as logs want it."""

from __future__ import annotations

import os
import sys
import time
from typing import IO, Any

MODES = ("auto", "bar", "lines", "none")


class Display:
    """The progress of ``total`` steps on standard error, and the lines of a run on standard output, of one rank.

    ``mode``: "bar", "lines" (one line, without carriage returns, every ``every_s`` seconds), "none", or "auto": the bar
    where standard error is a terminal, otherwise lines. A stream that can't be written any more (its reader has left,
    its disk is full) is left alone from then on: the run goes on.
    """

    def __init__(self, mode: str, every_s: float):
        self.mode = ("bar" if is_terminal(sys.stderr) else "lines") if mode == "auto" else mode
        self._every_s = every_s
        self._bar: Any = None
        self._dead: set[int] = set()
        self._total = self._done = self._started_at = 0
        self._started_s = self._next_s = 0.0

    def start(self, total: int, done: int) -> None:
        """Training begins: ``done`` of ``total`` steps were made by a run before."""
        self._total, self._done, self._started_at = total, done, done
        self._started_s = time.perf_counter()
        self._next_s = self._started_s + self._every_s
        if self.mode == "bar":
            from tqdm import tqdm

            # A pipe has no width of its own.
            self._bar = tqdm(
                total=total, initial=done, unit="step", mininterval=1.0, dynamic_ncols=True, file=sys.stderr
            )

    def update(self, done: int, text: str) -> None:
        """``done`` steps are made; ``text``: what is to be known of the last one."""
        self._done = done
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self.mode == "lines" and (now_s := time.perf_counter()) >= self._next_s:
            self._next_s = now_s + self._every_s
            taken_s = now_s - self._started_s
            left_s = taken_s / max(1, done - self._started_at) * (self._total - done)
            self._write(sys.stderr, f"step {done} of {self._total}: {text}; {_clock(taken_s)}, {_clock(left_s)} left")

    def line(self, text: str) -> None:
        """Write lines to standard output."""
        if self._bar is not None:
            self._bar.clear()
        self._write(sys.stdout, text)
        if self._bar is not None:
            self._bar.refresh()

    def error(self, text: str) -> None:
        """Write lines to standard error."""
        if self._bar is not None:
            self._bar.clear()
        self._write(sys.stderr, text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _write(self, stream: IO[str], text: str) -> None:
        if id(stream) in self._dead:
            return
        try:
            try:
                stream.write(text + "\n")
            except UnicodeEncodeError:
                # A model may generate characters that the terminal's character set lacks.
                code = getattr(stream, "encoding", None) or "ascii"
                stream.write(text.encode(code, "backslashreplace").decode(code) + "\n")
            stream.flush()
        except (OSError, ValueError) as error:
            self._dead.add(id(stream))
            silence(stream)
            if stream is not sys.stderr:
                self._write(
                    sys.stderr, f"commlab: standard output can't be written any more ({error}); the run goes on"
                )


def show(text: str) -> None:
    """Print a line, where standard output can still be written."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        silence(sys.stdout)


def silence(stream: IO[str]) -> None:
    """What is left in the buffer of a stream that can't be written would be an error again at exit."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError, AttributeError):
        pass


def is_terminal(stream: IO[str]) -> bool:
    try:
        return stream.isatty()
    except (ValueError, AttributeError):
        return False


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
