"""The house stands: files import only from floors below, or from their own folder; and nothing is ever pickled."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import commlab

HOME = Path(commlab.__file__).parent
FILES = sorted(HOME.rglob("*.py"))

# From top to bottom: a folder, or a file that lies in none, imports only from rows below its own.
FLOORS = (
    "__init__",
    "train",
    "trainer",
    "strategies",
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


def module_of(file: Path) -> tuple[str, ...]:
    """``commlab/schedules/ring.py`` as ``("collectives", "ring")``."""
    return file.relative_to(HOME).with_suffix("").parts


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything that is imported, at any depth, for type checking too."""
    package = ("commlab", *module_of(file)[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            # ``from . import trace`` names a module, ``from .trace import span`` a thing in one.
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(module_of(file)))
def test_imports_go_downwards(file: Path) -> None:
    top = module_of(file)[0]
    assert top in FLOORS, f"give {top} a floor"
    for line, name in imports(file):
        if not name.startswith("commlab."):
            continue
        other = name.split(".")[1]
        if other == "__version__":
            continue
        assert other in FLOORS, f"{file.name}:{line} imports {name}: give {other} a floor"
        assert other == top or FLOORS.index(other) > FLOORS.index(top), (
            f"{file.name}:{line}: {top} imports {name}, from above"
        )


PICKLING_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
PICKLING_MPI = {
    *("send", "bsend", "ssend", "isend", "ibsend", "issend", "recv", "irecv", "sendrecv", "mprobe", "improbe"),
    *("bcast", "gather", "scatter", "allgather", "alltoall", "reduce", "allreduce", "scan", "exscan"),
}
PICKLING_TORCH = {
    *("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"),
    *("send_object_list", "recv_object_list"),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: "/".join(module_of(file)))
def test_nothing_is_pickled(file: Path) -> None:
    """No pickling module; where MPI is, none of the lower-case methods that pickle; no objects over torch, no files
    of torch's or numpy's that may hold pickles."""
    names = [name for _, name in imports(file)]
    assert not [name for name in names if name.split(".")[0] in PICKLING_MODULES]
    forbidden = PICKLING_TORCH | (PICKLING_MPI if any(name.startswith("mpi4py") for name in names) else set())
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called, owner = node.func.attr, ast.unparse(node.func.value)
            assert called not in forbidden, f"{file.name}:{node.lineno} calls {owner}.{called}, which pickles"
            assert (owner, called) not in {("torch", "save"), ("torch", "load"), ("np", "load"), ("numpy", "load")}, (
                f"{file.name}:{node.lineno} calls {owner}.{called}"
            )


def test_these_tests_see_something() -> None:
    """A wrong path would make the tests above pass on nothing."""
    assert len(FILES) > 20
    seen = {name for file in FILES for _, name in imports(file)}
    assert {"commlab.chunks.Range", "commlab.trace", "mpi4py.MPI", "commlab.schedules.ring"} <= seen
