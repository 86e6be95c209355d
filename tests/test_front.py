"""What people see first: one version, files that machines read, and commands that exist."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import yaml
from pictures import steps_of

import commlab
from commlab.schedules.step import messages_sent

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
PAGES = ["CONTRIBUTING.md", "SECURITY.md"]


def targets() -> set[str]:
    [phony] = re.findall(r"^\.PHONY: ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.M)
    return set(phony.replace("\\", " ").split())


def test_the_version_stands_in_four_places() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f'name = "commlab-torch"\nversion = "{commlab.__version__}"' in project
    assert f"\nversion: {commlab.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGES.md").read_text(), re.M)[0] == commlab.__version__


@pytest.mark.parametrize("file", [*WORKFLOWS, *FORMS, ROOT / "CITATION.cff"], ids=lambda file: file.name)
def test_machines_can_read_it(file: Path) -> None:
    text = file.read_text()
    read = yaml.safe_load(text)
    if file in WORKFLOWS:
        assert {"name", "permissions", "jobs"} <= set(read)
        called = {name for words in re.findall(r"run: make ((?:[a-z-]+\b(?!=) ?)+)", text) for name in words.split()}
        assert called <= targets()
        assert all("timeout-minutes" in job for job in read["jobs"].values())
    elif file in FORMS and file.name != "config.yml":
        assert {"name", "description", "body"} <= set(read)
        ids = [item["id"] for item in read["body"]]
        assert len(ids) == len(set(ids))


def test_every_workflow_and_form_is_seen() -> None:
    assert {file.name for file in WORKFLOWS} == {"ci.yml", "weekly.yml"}
    assert len(FORMS) == 4
    assert {"venv", "test", "examples", "docs", "wheel", "wheel-check", "lint", "test-mpis"} <= targets()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_calls_targets_that_exist_and_links_to_files(page: str) -> None:
    text = (ROOT / page).read_text()
    called = {name for words in re.findall(r"(?:    |`)make ([a-z -]+?) *(?:`|#|\n)", text) for name in words.split()}
    assert called <= targets(), called - targets()
    assert all((ROOT / path).exists() for path in re.findall(r"\]\((?!https?:)([^)#]+)", text))


def test_ci_runs_the_same_targets() -> None:
    """``.ci/run`` is what a change must pass; the workflows run its parts side by side."""
    run = (ROOT / ".ci/run").read_text()
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    for target in ("lint", "test", "examples", "docs"):
        assert re.search(rf"^make {target}$", run, re.M), target
        assert re.search(rf"make {target}( |$)", workflow, re.M), target
    # Compiling by Zig takes longer than .ci/run has left; the workflow has a machine for it.
    assert "make wheel\n" in workflow and "make wheel-check\n" in workflow


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of docs/site that mkdocs' hooks build on."""
    monkeypatch.syspath_prepend(str(ROOT / "docs/site"))
    import drawing
    import reference

    yield drawing, reference
    for name in ("drawing", "reference"):
        del sys.modules[name]


def test_every_public_name_is_on_an_api_page(site: Any) -> None:
    """The site's API pages are read from the sources: a name that is public and on no page would be missing there."""
    _, reference = site
    names = [name for _, names in reference.REFERENCE.values() for name in names]
    assert len(names) == len(set(names))
    assert {*commlab.__all__} - {"__version__"} <= {name.rpartition(".")[2] for name in names}
    navigation = (ROOT / "docs/site/mkdocs.yml").read_text()
    assert all(f"      - reference/{page}.md\n" in navigation for page in reference.REFERENCE)


@pytest.mark.parametrize(("name", "size"), [("ring", 4), ("halving", 6), ("tree", 8), ("direct", 4)])
def test_a_picture_has_an_arrow_for_each_message(site: Any, name: str, size: int) -> None:
    drawing, _ = site
    picture = ET.fromstring(drawing.svg(name, size))
    arrows = [path for path in picture.iter("{http://www.w3.org/2000/svg}path") if "marker-end" in path.attrib]
    assert len(arrows) == sum(map(messages_sent, steps_of(name, size, size)))


def test_every_page_is_in_the_navigation() -> None:
    """mkdocs says so too, but only where it is installed."""
    navigation = (ROOT / "docs/site/mkdocs.yml").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    missing = [page for page in pages if not re.search(rf"^ +- (?:.*: )?{re.escape(page)}$", navigation, re.M)]
    assert not missing
