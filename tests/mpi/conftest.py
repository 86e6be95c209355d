"""One launch of mpirun, groups of 1 .. P ranks inside it.

A verdict is collective: every rank hears how a test went on the others before any of them leaves it, and all of them
fail when one did. So an assertion that fails on one rank leaves nobody waiting, and rank 0, the only one that prints,
tells what went wrong elsewhere. A test that hangs all the same is ended by the watchdog, with every rank's stack.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import sys
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import IO

import pytest
import torch
from hung import STACKS
from mpi_ranks import Ranks

import commlab
from commlab.job.topology import usable_cores
from commlab.runtime import waiting

WATCHDOG_S = 150
GRACE_S = 3
"""How much later rank 0 ends the launch: by then the others have shown their stacks too."""
_ranks: Ranks | None = None
_watched_stderr = 2
_shown: IO[str] | None = None
"""Where a hanging test shows this rank's stacks: a file for launch.py to tell of, or the launch's output."""


@pytest.hookimpl(trylast=True)  # after the terminal's own
def pytest_configure(config: pytest.Config) -> None:
    global _ranks, _watched_stderr
    if not config.getoption("--with-mpi", default=False):
        return
    _ranks = Ranks()
    torch.set_num_threads(1)
    # Where ranks share cores, who looks again at once takes the core from the rank that it waits for: a fifth of the
    # CPU that the tests took was such looking.
    if _ranks.size > usable_cores():
        waiting.SPIN_S = 0.0
    # An optimizer's constructor loads it: seconds, in which those ranks would wait that have loaded it before.
    importlib.import_module("torch._dynamo")
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        _watched_stderr = os.dup(2)
    if _ranks.rank:
        config.pluginmanager.unregister(name="terminalreporter")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("mpi")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed and _ranks is not None and _ranks.rank:
        os.write(_watched_stderr, f"rank {_ranks.rank}: {report.longrepr}\n".encode())


def _watch(item: pytest.Item) -> None:
    """From now on a watchdog waits for the test's end."""
    global _shown
    assert _ranks is not None
    if _shown is None:
        folder = os.environ.get(STACKS)
        file = os.open(Path(folder) / str(_ranks.rank), os.O_RDWR | os.O_CREAT) if folder else _watched_stderr
        _shown = os.fdopen(file, "w")
    if _shown.seekable():
        _shown.seek(0)
        _shown.truncate()
        _shown.write(f"{item.nodeid}\n")
        _shown.flush()
    # Not pytest's own, which does not end the process.
    last = _ranks.rank == 0
    faulthandler.dump_traceback_later(WATCHDOG_S + last * GRACE_S, exit=last, file=_shown)


def _told(failure: BaseException | None, test: Path) -> str:
    """A failure as other ranks tell it: its traceback from the test on."""
    if failure is None:
        return ""
    frames = failure.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != str(test):
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(failure), failure, frames or failure.__traceback__))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    if _ranks is not None:
        _watch(item)
    # A fixture that fails on one rank would leave it one test ahead of all others.
    return (yield from _together(item, "setup"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    return (yield from _together(pyfuncitem, "call"))


def _together(item: pytest.Item, when: str) -> Generator[None, object, object]:
    """Do a part of a test, and fail on all ranks where it has failed on one."""
    if _ranks is None:
        return (yield)
    failure: BaseException | None = None
    skipped: BaseException | None = None
    result: object = None
    try:
        result = yield
    except pytest.skip.Exception as error:
        skipped = error
    except (Exception, pytest.fail.Exception) as error:
        failure = error
    verdicts = _ranks.verdicts(_told(failure, item.path).encode()[-4000:])
    others = {
        rank: words.decode(errors="replace") for rank, words in enumerate(verdicts) if words and rank != _ranks.rank
    }
    for rank, words in others.items():
        item.add_report_section(when, f"of rank {rank}", words)
    if others or failure is not None:
        _ranks.forget()
        if failure is not None:
            raise failure
        pytest.fail(f"failed on other ranks: {', '.join(map(str, others))} of {_ranks.size}", pytrace=False)
    if skipped is not None:
        raise skipped
    return result


@pytest.fixture
def ranks() -> Ranks:
    assert _ranks is not None
    _ = _ranks.world  # operations that are given no group find one
    return _ranks


def pytest_sessionfinish(exitstatus: int) -> None:
    sys.stdout.flush()
    if _ranks is not None and exitstatus == 0:
        commlab.shutdown()
