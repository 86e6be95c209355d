"""The documentation cannot rot: its examples run, its pictures are those of the schedules, and its links, files and
modules exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import schedule_checks
import torch
from pictures import costs, picture, steps_of
from schedule_checks import ROOTED, SEGMENTS

import commlab
from commlab.schedules import ALGORITHMS
from commlab.trainer.config import Config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FRONT = [ROOT / "README.md", ROOT / "CHANGES.md"]
INVENTED = {"commlab/schedules/line.py", "bench/results/A.jsonl", "bench/results/B.jsonl", "bench/results/NAME.jsonl"}
"""Files that a page tells the reader to make."""
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")

names = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
every_page = pytest.mark.parametrize("page", [*FRONT, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))


def examples() -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", (DOCS / "api.md").read_text(), re.S | re.M))


def test_the_examples_run() -> None:
    """In a process of their own: they connect, and from there on exceptions end the process."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", examples()], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "rank 0 of 1, 1 node(s)" in run.stdout
    assert "unknown op 'average'" in run.stdout
    assert "precision apex is not to be had" in run.stdout or torch.cuda.is_available()


@pytest.mark.parametrize("name", [*commlab.__all__, "checkpoint.Checkpoints", "apex.fused_adam"])
def test_every_public_name_has_an_example(name: str) -> None:
    page = (DOCS / "api.md").read_text()
    assert f"`{name}" in page or f"`commlab.{name}" in page
    home, _, last = f"commlab.{name}".rpartition(".")
    assert re.search(rf"\bcommlab\.{name}\b|from {home} import {last}\b", examples())


@pytest.mark.parametrize(
    ("name", "size"), [("ring", 4), ("halving", 4), ("halving", 6), ("tree", 8), ("direct", 4)], ids=str
)
def test_pictures_are_those_of_the_schedules(name: str, size: int) -> None:
    drawn = picture(name, size)
    assert drawn in (DOCS / "algorithms" / f"{name}.md").read_text(), f"{name} on {size} ranks is now\n{drawn}"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_costs_are_those_of_the_schedules(name: str) -> None:
    counted = costs(name)
    assert counted in (DOCS / "algorithms" / f"{name}.md").read_text(), f"{name} costs now\n{counted}"


def test_the_worked_example_is_an_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row in the table is all that is missing: with it, it passes what every algorithm has to pass."""
    page = (DOCS / "add-an-algorithm.md").read_text()
    code, _ = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    line: Any = ModuleType("commlab.schedules.line")
    line.__package__ = "commlab.schedules"
    exec(compile(code, "docs/add-an-algorithm.md", "exec"), line.__dict__)
    monkeypatch.setitem(ALGORITHMS, "line", line)
    for segment_bytes in SEGMENTS:
        schedule_checks.check_allreduce("line", segment_bytes, "mean")
        schedule_checks.check_reduce_scatter_and_allgather("line", segment_bytes, torch.int32)
    for numel, segment_bytes in ROOTED:
        schedule_checks.check_reduce_and_broadcast("line", numel, segment_bytes)
    schedule_checks.check_what_the_network_carries("line")
    schedule_checks.check_owners("line")
    schedule_checks.check_nothing_to_send("line")
    for rank, plan in enumerate(steps_of("line", 7, 70)):
        assert {peer for item in plan for peer in (item.to, item.frm)} <= {rank - 1, rank + 1, None}
        assert sum(item.send.numel for item in plan) == 10 * (6 + (1 if rank in (0, 6) else 8))
    assert picture("line", 4) in page, picture("line", 4)
    assert costs("line") in page, costs("line")
    assert '"direct": direct, "line": line}' in page
    assert '"direct": direct}' in (ROOT / "commlab/schedules/__init__.py").read_text()


def anchors(page: Path) -> set[str]:
    """What a link can name after ``#`` in a page: its headings, as GitHub spells them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    dead = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead, f"{page.name} links to {dead}"


@every_page
def test_files_exist(page: Path) -> None:
    """Every path of the checkout that a page names, whether a file or a folder."""
    text = page.read_text()
    named = set(re.findall(r"(?<![\w./~-])((?:commlab|bench|tests|kernels)/[\w./-]*[\w/])", text)) - INVENTED
    files = [path for path in named if path.endswith("/") or Path(path).suffix]
    gone = [path for path in files if not (ROOT / path).exists()]
    assert not gone, f"{page.name} names {gone}"


@every_page
def test_modules_exist(page: Path) -> None:
    """Every ``commlab.x.y`` and ``bench.x`` that a page names is a module, or a name in one."""
    text = page.read_text()
    gone = []
    for dotted in sorted(set(re.findall(r"(?<![\w./-])((?:commlab|bench)(?:\.[A-Za-z_]\w*)+)", text))):
        first, *rest = dotted.split(".")
        place = ROOT / first
        while rest and ((place / rest[0]).is_dir() or (place / f"{rest[0]}.py").exists()):
            place /= rest.pop(0)
        home: Any = import_module(".".join(place.relative_to(ROOT).parts)) if rest else None
        for name in rest:
            if not hasattr(home, name):
                gone.append(dotted)
                break
            home = getattr(home, name)
    assert not gone, f"{page.name} names {gone}"


@every_page
def test_lines_are_short(page: Path) -> None:
    """Lines of at most 120 characters, but for a row of a table with a command or a message that can't be cut."""
    long = [line for line in page.read_text().splitlines() if len(line) > 120]
    assert not [line for line in long if not line.startswith("|")]
    assert len(long) <= 2, long


def test_the_readme_is_a_front_door() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_trainers_flags_exist() -> None:
    """Wherever a page, a script or the README calls it."""
    known = {"--" + field.name.replace("_", "-") for field in fields(Config)}
    known |= {"--help", "--config", "--print-config"}
    files = [*PAGES, ROOT / "README.md", *(path for path in (DOCS / "launch").iterdir() if path.suffix)]
    calls = [call for file in files for call in re.findall(r"-m commlab\.train((?:\\\n|[^`#|\n])*)", file.read_text())]
    given = [flag for call in calls for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", call)]
    assert len(calls) > 20
    assert len(given) > 40
    assert set(given) <= known, set(given) - known


@names
def test_the_index_has_every_page(page: Path) -> None:
    assert page.name == "README.md" or f"]({page.relative_to(DOCS)})" in (DOCS / "README.md").read_text()
