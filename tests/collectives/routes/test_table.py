"""The table of routes: its rows lead to modules that offer what a route must, and a route is one file and one row."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from closed_form import DTYPES, expected, numbers, ops_for
from crew import Crew, groups

from commlab.collectives import routes
from commlab.collectives.allreduce import allreduce
from commlab.collectives.operations import broadcast
from commlab.collectives.select import CHOICES
from commlab.errors import UsageError

PAGE = Path(__file__).parents[3] / "docs" / "add-an-algorithm.md"


@pytest.mark.parametrize("name", routes.names())
def test_every_row_leads_to_a_route(name: str) -> None:
    row = routes.row_of(name)
    route = routes.load(row.file)
    for offered in ("CASTS", "reason_against", "attach", "allreduce", "reduce_chunks", "gather_chunks"):
        assert hasattr(route, offered), f"{row.file} has no {offered}"
    for offered in ("CASTS", "load_of", "attach", "allreduce") if row.few else ():
        assert hasattr(routes.load(row.few), offered), f"{row.few} has no {offered}"
    assert name in CHOICES


def test_every_file_of_the_folder_is_in_a_row() -> None:
    files = {path.stem for path in Path(routes.__file__).parent.glob("*.py")} - {"__init__", "route"}
    rows = [routes.row_of(name) for name in routes.names()]
    assert files == {file for row in rows for file in (row.file, row.few, row.halves) if file}


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The page's route, in the table for the length of a test."""
    code = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M)[1]
    name = "commlab.collectives.routes.ordered"
    module: Any = ModuleType(name)
    module.__package__ = "commlab.collectives.routes"
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        patch.setitem(routes.ROUTES, "ordered", routes.Row("ordered"))  # type: ignore[arg-type]
        yield module
    assert "ordered" not in routes.names()


def test_the_page_adds_a_route(ordered: ModuleType) -> None:
    assert routes.load("ordered") is ordered
    assert '"ordered": Row("ordered"),' in PAGE.read_text()
    for size in (2, 3, 5):
        crew, everyone = Crew(size), groups(size)
        try:
            for numel in (1, 7, 1000):
                for dtype in DTYPES:
                    for op in ops_for(dtype):

                        def one(rank: int, numel: int = numel, dtype: torch.dtype = dtype, op: str = op) -> bool:
                            tensor = numbers(rank, numel, dtype, op)
                            got = allreduce(tensor, op, "w", "ordered", group=everyone[rank])  # noqa: B023
                            return torch.equal(got, expected(op, len(everyone), numel, dtype))  # noqa: B023

                        assert all(crew.all(one)), (size, numel, dtype, op)

            def refused(rank: int) -> str:
                with pytest.raises(UsageError) as error:
                    broadcast(torch.zeros(3), 0, "w", "ordered", group=everyone[rank])  # noqa: B023
                return str(error.value)

            for rank, words in enumerate(crew.all(refused)):
                assert f"rank {rank}: algorithm ordered is not to be had: ordered is for allreduce" in words
        finally:
            crew.close()


def test_without_the_row_the_route_is_unknown() -> None:
    [alone] = groups(1)
    with pytest.raises(UsageError, match=r"unknown algorithm 'ordered'; there are auto, ring, .*, hierarchical"):
        allreduce(torch.zeros(3), algorithm="ordered", group=alone)
