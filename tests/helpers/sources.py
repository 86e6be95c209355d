"""What the sources of commlab and bench import and define, read from their syntax trees without importing them."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BUILT = ("commlab._native", "commlab._native_missing")
"""Modules that the build makes, which have no sources in Python and import nothing."""


class Imported(NamedTuple):
    """One imported name: ``from .trace import span`` in ``commlab/train.py`` gives ``commlab.trace.span``."""

    line: int
    name: str


class Defined(NamedTuple):
    """One name that a file gives to something."""

    line: int
    kind: str
    """"module", "class", "function" (methods too), "parameter" or "attribute" (of a class, an object, a module)."""
    name: str
    owner: str
    """The function of a parameter, the class of a method or attribute; else empty."""


def files_of(*tops: str) -> list[Path]:
    return sorted(file for top in tops for file in (ROOT / top).rglob("*.py"))


def module_of(file: Path) -> tuple[str, ...]:
    """``commlab/schedules/ring.py`` as ``("commlab", "schedules", "ring")``; a package as its folder."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
def imports(file: Path) -> tuple[Imported, ...]:
    """Everything that the file imports: in functions too, and for type checking too."""
    package = file.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            found += [Imported(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            found += [Imported(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
    return tuple(found)


def module_graph(files: list[Path]) -> dict[str, dict[str, int]]:
    """For each module the modules that it imports, and in which line.

    ``from . import trace`` names a module, ``from .trace import span`` a thing in one: the longest name that is a
    module counts. That a package runs before its modules is no import of theirs.
    """
    modules = {".".join(module_of(file)): file for file in files}
    known = {*modules, *BUILT}
    graph: dict[str, dict[str, int]] = {}
    for module, file in modules.items():
        edges = graph.setdefault(module, {})
        for line, name in imports(file):
            target = name if name in known else name.rpartition(".")[0]
            if target in modules and target != module:
                edges.setdefault(target, line)
    return graph


def _components(graph: Mapping[str, Mapping[str, int]]) -> Iterator[set[str]]:
    """The strongly connected components of more than one module (R. Tarjan, 1972)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []

    def visit(module: str) -> Iterator[set[str]]:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                yield from visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], index[other])
        if lowest[module] == index[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                yield set(stack[at:])
            del stack[at:]

    for module in graph:
        if module not in index:
            yield from visit(module)


def _way_back(graph: Mapping[str, Mapping[str, int]], start: str) -> list[str]:
    """A shortest way from a module to itself."""
    ways = [[start]]
    seen: set[str] = set()
    for way in ways:
        for other in graph[way[-1]]:
            if other == start:
                return [*way, start]
            if other not in seen:
                seen.add(other)
                ways.append([*way, other])
    return []


def circles(graph: Mapping[str, Mapping[str, int]]) -> list[list[str]]:
    """A shortest circle of each strongly connected component: modules that import one another in turn, the first again
    at the end."""
    return [
        min((_way_back(graph, module) for module in sorted(component)), key=len) for component in _components(graph)
    ]


@cache
def definitions(file: Path) -> tuple[Defined, ...]:
    """The names that the file gives: its own, and those of its classes, functions, parameters and attributes. Variables
    of a function are its own affair."""
    named = Defined(1, "module", module_of(file)[-1], "")
    return (named, *_definitions(tree_of(file), "", in_function=False))


def _definitions(node: ast.AST, owner: str, in_function: bool) -> Iterator[Defined]:
    for child in ast.iter_child_nodes(node):
        inner, inside = owner, in_function
        if isinstance(child, ast.ClassDef):
            yield Defined(child.lineno, "class", child.name, owner)
            inner, inside = child.name, False
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield Defined(child.lineno, "function", child.name, owner)
            arguments = child.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                yield Defined(argument.lineno, "parameter", argument.arg, child.name)
            for more in (arguments.vararg, arguments.kwarg):
                if more is not None:
                    yield Defined(more.lineno, "parameter", more.arg, child.name)
            inside = True
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store) and not in_function:
            yield Defined(child.lineno, "attribute", child.id, owner)
        elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            yield Defined(child.lineno, "attribute", child.attr, owner)
        yield from _definitions(child, inner, inside)
