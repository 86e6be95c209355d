"""The house stands: each room on its floor, no circle, one word with one meaning, nothing pickled.

docs/design.md says why. A change that fails here belongs into another room, or the page and this file change with it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from sources import BUILT, ROOT, Defined, circles, definitions, files_of, imports, module_graph, module_of
from tree import BENCH_COMMANDS, drawn, tree_of_folders, tree_of_page

COMMLAB = files_of("commlab")
BENCH = files_of("bench")

# From top to bottom: a folder, or a file that lies in none, imports only from rows below its own.
FLOORS = (
    "__init__",
    "__main__",
    "train",
    "trainer",
    "strategies",
    "horovod",
    "c10d",
    "ps",
    "precision",
    "checkpoint",
    "apex",
    "collectives",
    "runtime",
    "gradients",
    "window",
    "transport",
    "schedules",
    "native",
    "job",
    "chunks",
    "trace",
    "errors",
)

LOOSE_FILES = {"__init__", "__main__", "errors", "trace", "chunks", "train"}
BENCH_ROOMS = {"core", "contestants", "training", "hosts", "pictures", "results"}


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def room_of(file: Path) -> str:
    """The row of ``FLOORS`` for a file of commlab."""
    return file.relative_to(ROOT).with_suffix("").parts[1]


def lines(offenders: Sequence[str]) -> str:
    return f"{len(offenders)}:\n" + "\n".join(offenders)


# --- Rooms


def test_six_files_lie_loose() -> None:
    top = ROOT / "commlab"
    assert {file.stem for file in top.glob("*.py")} == LOOSE_FILES
    assert (top / "py.typed").exists()
    assert {file.stem for file in (ROOT / "bench").glob("*.py")} == {"__init__", *BENCH_COMMANDS}
    folders = {path.name for path in (ROOT / "bench").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == BENCH_ROOMS


def test_tests_mirror_the_rooms() -> None:
    """A folder of tests has the name of the folder that it tests, below tests/ or tests/mpi/."""
    tree = tree_of_folders()
    rooms = {folder.removeprefix("commlab/") for folder in tree if folder.startswith("commlab/")}
    rooms |= {folder for folder in tree if folder.partition("/")[0] == "bench"}
    tested = {folder.removeprefix("tests/").removeprefix("mpi/") for folder in tree if folder.startswith("tests/")}
    assert {folder for folder in tested if folder.partition("/")[0] != "helpers"} <= rooms | {"mpi"}


def test_every_floor_is_lived_on() -> None:
    assert {room_of(file) for file in COMMLAB} == set(FLOORS)


def test_the_page_shows_the_folders() -> None:
    """docs/design.md has the tree of the folders as they are: ``python tests/helpers/tree.py`` prints it."""
    found = tree_of_folders()
    shown = tree_of_page((ROOT / "docs/design.md").read_text())
    missing = sorted(f"{folder}/{file}" for folder in found for file in {"", *found[folder]} - shown.get(folder, set()))
    missing = [path for path in missing if path.rstrip("/") not in shown]
    gone = sorted(f"{folder}/{file}" for folder in shown for file in {"", *shown[folder]} - found.get(folder, set()))
    gone = [path for path in gone if path.rstrip("/") not in found]
    assert (missing, gone) == ([], []), f"the page should show\n{drawn(found)}"
    assert max(map(len, drawn(found).splitlines())) <= 120


# --- Imports


def test_imports_go_downwards() -> None:
    offenders = []
    for file in COMMLAB:
        floor = FLOORS.index(room_of(file))
        for line, name in imports(file):
            if name.partition(".")[0] != "commlab":
                continue
            other = name.split(".")[1] if name.count(".") else "__init__"
            other = other if other in FLOORS else "__init__"
            built = name.startswith(BUILT)
            if not built and FLOORS.index(other) <= floor and other != room_of(file):
                offenders.append(f"{name_of(file)}:{line}: {room_of(file)} imports {name}, from above")
    assert not offenders, lines(offenders)


@pytest.mark.parametrize("top", ["commlab", "bench"])
def test_no_circle(top: str) -> None:
    """Imports of a function and imports for type checking count like any other."""
    graph = module_graph(files_of(top))
    found = [
        "\n".join(f"{module}:{graph[module][other]} imports {other}" for module, other in pairwise(circle))
        for circle in circles(graph)
    ]
    assert not found, "\n\n".join(found)


def test_one_file_imports_the_native_module() -> None:
    importers = {
        name_of(file)
        for file in [*COMMLAB, *BENCH]
        for _, name in imports(file)
        if re.match(r"commlab\._native(_missing)?\b", name)
    }
    assert importers == {"commlab/native/library.py"}


WITHOUT_TORCH = ("commlab.schedules", "commlab.strategies.options", "commlab.trainer.knobs", "commlab.trainer.config")


def test_schedules_and_flags_load_no_torch() -> None:
    """Schedules are data for anybody who reads them, and a mistyped flag is answered before torch would be loaded."""
    schedules = [".".join(module_of(file)) for file in COMMLAB if room_of(file) == "schedules"]
    program = f"""
import sys
from importlib import import_module
for name in {[*schedules, *WITHOUT_TORCH]}:
    import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{{name}} loads torch")
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# --- Words


class Retired(NamedTuple):
    """A name that had several meanings, where it may be no longer, and what each meaning is called now."""

    pattern: str
    """Of the identifier without leading underscores, in full."""
    kinds: str
    """Of :class:`sources.Defined`, or "any"."""
    rooms: str
    """Of the file's path from the root, at its beginning."""
    instead: str


PART = "(.*_)?[Pp]arts?(_.*)?"

RETIRED = (
    Retired("carried", "module", "", "piggyback"),
    Retired("chunked", "module", "", "halves"),
    Retired("coupling|replicas", "module", "", "start"),
    Retired("served", "module", "", "server_state"),
    Retired("together", "module", "", "control"),
    Retired("bringup", "module", "", "launch"),
    Retired("node_window", "module", "", "exchange"),
    Retired("signature", "module", "", "agreement"),
    Retired("figures", "module", "", "stats"),
    Retired("sides", "module", "", "training_step"),
    Retired("ours", "module", "", "commlab"),
    Retired("given", "module", "", "known_gradients"),
    Retired("colocated", "module", "", "sharded"),
    Retired("lockstep", "module", "", "bsp"),
    Retired("serving", "module", "", "loop"),
    Retired("shards", "module", "", "placement"),
    Retired("weight", "module", "", "counts"),
    Retired("local", "module", "commlab/strategies", "external"),
    Retired("state", "module", "commlab/ps", "ledger"),
    Retired("operand", "module", "commlab/collectives", "staging"),
    Retired("agreement", "module", "commlab/(?!runtime)", "verdict"),
    Retired("store", "module", "(?!commlab/ps)", "files"),
    Retired("Coupled", "class", "", "Engine, which owns a Strategy"),
    Retired("Local", "class", "", "External"),
    Retired("Colocated", "class", "", "Sharded"),
    Retired("StepWeight", "class", "", "StepCounts"),
    Retired("Lockstep|Serving", "class", "", "a part that the server owns: bsp, loop"),
    Retired("Given", "class", "", "a noun: the gradients are known"),
    Retired("Agreement", "class", "commlab/(?!runtime)", "Verdict"),
    Retired(
        "Strategy", "class", "(?!commlab/strategies/protocol.py)", "Engine is what users call; Strategy what differs"
    ),
    Retired("Run", "class", "commlab/ps", "Span"),
    Retired("(.*_)?[Rr]uns(_.*)?", "any", "commlab/ps", "spans"),
    Retired("run", "function", "commlab/ps/server/shard", "update"),
    Retired(PART, "any", "commlab/ps", "slice"),
    Retired(PART, "any", "commlab/checkpoint", "file; state"),
    Retired(PART, "any", "commlab/strategies", "state; slice"),
    Retired(PART, "any", "commlab/window", "area"),
    Retired(PART, "any", "commlab/runtime", "range"),
    Retired(PART, "any", "commlab/trainer/data", "range; split"),
    Retired("[Pp]laces?(_of)?", "any", "(?!commlab/window)", "deal; memory_for; folder; fold"),
    Retired("[Tt]urns?", "any", "", "assignment; block; round"),
    Retired("decisions?", "any", "", "verdict"),
    Retired("settle", "function", "(?!commlab/strategies)", "finish_step; rest"),
    Retired("together", "function", "", "raise_together"),
    Retired("served|given|figures|sides", "any", "", "the noun that it is said of"),
    Retired("(.*_)?(told|said|says)(_.*)?", "any", "", "value; reply; sent"),
    Retired("ours", "any", "", "commlab"),
)

CODE_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def public_names() -> tuple[set[str], dict[str, set[str]]]:
    """The names that docs/api.md documents, and the parameters that it gives each function."""
    names: set[str] = set()
    parameters: dict[str, set[str]] = defaultdict(set)
    for span in CODE_SPAN.findall((ROOT / "docs/api.md").read_text()):
        code = re.sub(r'"[^"]*"', "", span)
        for function, arguments in re.findall(r"(\w+)\(([^)]*)\)", code):
            parameters[function] |= set(re.findall(r"(\w+)(?=\s*[,=]|\s*$)", arguments))
        names |= set(re.findall(r"[A-Za-z_]\w*", re.sub(r"\([^)]*\)?", "", code)))
    return names, parameters


def test_retired_words_are_gone() -> None:
    """What has a name in commlab and bench has it from the table of words; what the API documents is a user's."""
    names, parameters = public_names()

    def is_public(item: Defined) -> bool:
        if item.kind == "parameter":
            return item.name in parameters.get(item.owner, ())
        return item.kind != "module" and item.name in names

    offenders = [
        f"{name_of(file)}:{item.line}: {item.kind} {item.owner and item.owner + '.'}{item.name}: {rule.instead}"
        for file in [*COMMLAB, *BENCH]
        for rules in [[rule for rule in RETIRED if re.match(rule.rooms, name_of(file))]]
        for item in definitions(file)
        for rule in rules
        if rule.kinds in ("any", item.kind)
        if re.fullmatch(rule.pattern, item.name.lstrip("_")) and not is_public(item)
    ]
    assert not offenders, lines(sorted(set(offenders)))


def test_a_class_has_its_name_alone() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for file in [*COMMLAB, *BENCH]:
        for item in definitions(file):
            if item.kind == "class":
                homes[item.name].append(f"{name_of(file)}:{item.line}")
    shared = [f"{name}: {', '.join(found)}" for name, found in sorted(homes.items()) if len(found) > 1]
    assert not shared, lines(shared)


# --- Tensors

TENSOR_MAKERS = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones"),
    *("rand", "randint", "randn", "randperm", "range", "scalar_tensor", "sparse_coo_tensor", "tensor", "zeros"),
}
"""What ``torch.set_default_device`` gives another device, where none is named."""


def test_every_tensor_names_its_device() -> None:
    """The default device is the program's. The trainer is a program."""
    offenders = [
        f"{name_of(file)}:{node.lineno}: torch.{node.func.attr} without device="
        for file in COMMLAB
        if room_of(file) not in ("trainer", "__main__")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TENSOR_MAKERS
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        if not {"device", None} & {keyword.arg for keyword in node.keywords}
    ]
    assert not offenders, lines(offenders)


# --- Pickles

PICKLING_FILES = {"commlab/checkpoint/pickled.py"}
"""Loaded by a call whose caller has said ``allow_pickle=True``, by those of Horovod's API that take any object, and by
nothing else."""

PICKLING_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
PICKLING_MPI = {
    *("send", "bsend", "ssend", "isend", "ibsend", "issend", "recv", "irecv", "sendrecv", "mprobe", "improbe"),
    *("bcast", "gather", "scatter", "allgather", "alltoall", "reduce", "allreduce", "scan", "exscan"),
}
PICKLING_TORCH = {
    *("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
}


@pytest.mark.parametrize("file", COMMLAB, ids=name_of)
def test_nothing_is_pickled(file: Path) -> None:
    """No pickling module; where MPI is, none of the lower-case methods that pickle; no objects over torch, no files
    of torch's or numpy's that may hold pickles."""
    names = [name for _, name in imports(file)]
    pickling = [name for name in names if name.split(".")[0] in PICKLING_MODULES]
    assert bool(pickling) == (name_of(file) in PICKLING_FILES)
    forbidden = PICKLING_TORCH | (PICKLING_MPI if any(name.startswith("mpi4py") for name in names) else set())
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called, owner = node.func.attr, ast.unparse(node.func.value)
            assert called not in forbidden, f"{file.name}:{node.lineno} calls {owner}.{called}, which pickles"
            assert (owner, called) not in {("torch", "save"), ("torch", "load"), ("np", "load"), ("numpy", "load")}, (
                f"{file.name}:{node.lineno} calls {owner}.{called}"
            )


# --- The tests above see something: a wrong path would make them pass on nothing.


def test_imports_are_seen() -> None:
    assert len(COMMLAB) > 20
    seen = {name for file in COMMLAB for _, name in imports(file)}
    assert {"commlab.chunks.Range", "commlab.trace", "mpi4py.MPI", "commlab.schedules.ring"} <= seen


def test_circles_are_seen() -> None:
    assert circles({"a": {"b": 1}, "b": {"c": 1}, "c": {"d": 1, "a": 1}, "d": {"b": 1}, "e": {"a": 1}}) == [
        list("abca")
    ]
    assert circles({"a": {"b": 1}, "b": {"a": 1}, "c": {"d": 1}, "d": {"c": 1}}) == [list("aba"), list("cdc")]
    assert circles({"a": {"b": 1, "c": 1}, "b": {"d": 1}, "c": {"d": 1}, "d": {}}) == []


def test_definitions_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sources.ROOT", tmp_path)
    file = tmp_path / "shelf.py"
    file.write_text(
        "WIDTH = 1\nclass Shelf:\n    depth: int = 2\n    def put(self, book, *more):\n        self.full = place = 1\n"
        "        def inner(page): return page\n"
    )
    assert {(item.kind, item.owner, item.name) for item in definitions(file)} == {
        ("module", "", "shelf"),
        ("attribute", "", "WIDTH"),
        ("class", "", "Shelf"),
        ("attribute", "Shelf", "depth"),
        ("function", "Shelf", "put"),
        ("parameter", "put", "self"),
        ("parameter", "put", "book"),
        ("parameter", "put", "more"),
        ("attribute", "Shelf", "full"),
        ("function", "Shelf", "inner"),
        ("parameter", "inner", "page"),
    }


def test_the_tree_reads_what_it_draws() -> None:
    tree = tree_of_folders()
    assert tree_of_page(f"words\n\n```\n{drawn(tree)}\n```\n\nmore") == tree
    assert {"ring", "tree"} <= tree["commlab/schedules"]


def test_public_names_are_read() -> None:
    names, parameters = public_names()
    assert {"turns", "strategy", "ParameterServer", "optimizer_state", "version"} <= names
    assert parameters["load_state_dict"] == {"parts"}
    assert {"tensor", "op", "wire"} <= parameters["allreduce"]
    assert "part" not in names
