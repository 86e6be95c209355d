"""The floor of every table: the same bytes copied by all ranks at once into pre-touched memory, in two ways."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from commlab.job.cache import cache_folder

from ..core.harness import Block, Contestant, ContestantMissing, missing
from .case import Case

SOURCE = Path(__file__).with_name("floor.cpp")
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC")


def compiler() -> list[str]:
    """$CXX, or the first C++ compiler on PATH. ContestantMissing without a compiler."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = named or next(([path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), [])
    if not found:
        raise ContestantMissing(
            "the floor is a few lines of C++, and no C++ compiler was found: install g++, or name one in CXX"
        )
    return found


def build() -> Path:
    """The shared library, from the user's cache or compiled into it now. Safe when all ranks call it at once."""
    command = [*compiler(), *FLAGS]
    key = hashlib.sha256(SOURCE.read_bytes() + repr((command, os.uname().machine)).encode()).hexdigest()[:16]
    library = cache_folder("floor") / f"{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch) / library.name
            done = subprocess.run([*command, str(SOURCE), "-o", str(made)], capture_output=True, text=True, timeout=120)
            if done.returncode:
                raise ContestantMissing(f"{shlex.join(command)} {SOURCE.name} failed: {done.stderr.strip()[-500:]}")
            made.replace(library)
    return library


def load() -> dict[str, Callable[[int, int, int], None]]:
    """The ways to copy: ``(to address, from address, bytes)`` by name. Runs without the GIL."""
    library = ctypes.CDLL(str(build()))
    ways: dict[str, Any] = {"memcpy": library.floor_memcpy}
    if library.floor_has_nontemporal():
        ways["non-temporal"] = library.floor_nontemporal
    for way in ways.values():
        way.argtypes, way.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), None
    return ways


def blocks(case: Case) -> list[Block]:
    """One contestant per way: copies all bytes of ``case`` on every rank."""
    try:
        ways = load()
    except ContestantMissing as reason:
        return [missing("copy", str(reason), kind="floor")]
    return [Block([_contestant(name, way, case)]) for name, way in ways.items()]


def _contestant(name: str, way: Callable[[int, int, int], None], case: Case) -> Contestant:
    target = case.whole
    to, frm, count = target.data_ptr(), case.source.data_ptr(), case.bytes

    def work() -> torch.Tensor:
        way(to, frm, count)
        return target

    return Contestant(
        f"copy, {name}",
        work,
        fill=lambda: target.fill_(-1),
        wrong=lambda got: int((got != case.source).sum()),
        labels={"kind": "floor"},
    )
