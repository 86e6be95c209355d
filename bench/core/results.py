"""Result files: JSON lines. A ``run`` line says when, where, with which software and how a benchmark ran; the ``row``
lines after it are the records of what the benchmark found."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from commlab.job import launch
from commlab.job.topology import usable_cores

from .ranks import Ranks, link_bytes_per_s
from .stats import ratio

Record = dict[str, Any]
"""A line of a result file."""


class Run(NamedTuple):
    """What one run of a benchmark left in a result file."""

    about: Record
    """The ``run`` line."""
    records: list[Record]
    """The ``row`` lines."""


_TELLING = ("HOROVOD_", "OMPI_MCA_", "PRTE_MCA_", "MPIR_CVAR_", "MPICH_", "UCX_", "GLOO_", "OMP_")
"""Beginnings of the names of environment variables that change how peers behave."""
_LAUNCHERS = ("OMPI_MCA_PREFIXES", "OMPI_MCA_cpu_type", "OMPI_MCA_initial_wdir", "OMPI_MCA_num_procs")
"""Variables that Open MPI's mpirun sets by itself."""


def describe(ranks: Ranks, module: str) -> Record:
    """The ``run`` line of a benchmark on ``ranks``. Not collective: rank 0 describes its own host."""
    here = launch.detect()
    found = run_line(module, f"mpirun -n {ranks.size} " if here.launcher is not None else "", ranks.mpi)
    found["versions"] |= library_versions()
    hosts = ranks.size // here.local_size
    return {**found, "ranks": ranks.size, "hosts": hosts, "link_bytes_per_s": link_bytes_per_s()}


def library_versions() -> dict[str, str]:
    """The versions of the libraries that compute in this process."""
    import torch

    from commlab import native

    return {"torch": torch.__version__, "native": native.backend()}


def setting(about: Record) -> str:
    """The MPI of a run, and the hosts that bench.cluster made for the run, in words."""
    mpi: str = about["versions"]["mpi"]
    if not about.get("link_bytes_per_s"):
        return mpi
    return f"{mpi}, {about['hosts']} hosts at {8 * about['link_bytes_per_s'] / 1e6:.0f} Mbit/s"


def plain_name(record: Record) -> str:
    """The contestant's name; ``auto`` by itself, because the algorithm that it stands for changes with the size."""
    chosen = record.get("chosen")
    name: str = record["contestant"]
    return name.replace(f" = {chosen}", "", 1) if chosen else name


def run_line(module: str, launcher: str = "", mpi: str = "none") -> Record:
    """The beginning of a ``run`` line, which every benchmark has. ``launcher``: the words before ``python`` on the
    command line."""
    import commlab

    return {
        "type": "run",
        "bench": module,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join([f"{launcher}python -m {module}", *_arguments()]),
        "hardware": {
            "cpu": _cpu_model(),
            "cores": usable_cores(),
            "memory_GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "load": round(os.getloadavg()[0], 2),
        "versions": {
            "commlab": commlab.__version__,
            "commit": _commit(),
            "python": platform.python_version(),
            "mpi": mpi,
        },
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_TELLING) and name not in _LAUNCHERS
        },
    }


def row_beside(
    peer: str, op: str, name: str, samples: Mapping[str, Sequence[float]], wrong: int, ranks: Ranks, **more: Any
) -> Record:
    """A contestant's row. ``samples``: of all contestants, by round, in seconds; those of ``peer``, where it took part,
    are what the ratio is to."""
    found: Record = {
        "type": "row",
        "op": op,
        "ranks": ranks.size,
        "contestant": name,
        "p50_us": round(median(samples[name]) * 1e6, 2),
        "wrong": wrong,
        "rounds": len(samples[name]),
        "samples_us": [round(sample * 1e6, 2) for sample in samples[name]],
        **more,
    }
    if peer in samples and name != peer:
        found[f"ratio_{peer.lower()}"] = [float(f"{value:.4g}") for value in ratio(samples[name], samples[peer])]
    return found


def append(path: str | Path, lines: Iterable[Record]) -> None:
    """Add lines to a file, all in one write; the folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def read(path: str | Path) -> list[Run]:
    """The runs of a file. ValueError, with the line's number, for a file that is no result file."""
    runs: list[Run] = []
    for number, text in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            if line["type"] == "run":
                runs.append(Run(line, []))
            else:
                runs[-1].records.append(line)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}, line {number}: not a line of a result file ({error!r})") from error
    return runs


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return found[0] if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this checkout, with ``+`` where files differ from it; None outside of git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=20, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _arguments() -> list[str]:
    """The command's arguments without the file that it writes: that is where the reader found them."""
    shown, skip = [], False
    for argument in sys.argv[1:]:
        if not skip and not argument.startswith("--json"):
            shown.append(argument)
        skip = argument == "--json"
    return shown
