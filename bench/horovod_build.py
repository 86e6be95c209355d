"""Build Horovod against this environment's torch and MPI, keep the wheel, install it: `python -m bench.horovod_build`.

Horovod's last sdist asks for C++14, and the headers of today's torch need C++20: two lines of its CMake files are
raised, and its library is told to look for MPI relative to itself, so that the wheel works in every environment with
the same torch, Python and MPI. It is kept in the user's cache under those names; with it there a call takes seconds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # run as a file: make `bench` importable as it is with -m
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.core.build_steps import BuildError, Steps, file_lock
from bench.core.mpirun import LauncherError, Mpi, find_mpi, mpirun_environment
from commlab.job.cache import cache_folder

HOROVOD_VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
BUILD_TOOLS = ("cmake", "setuptools<80", "wheel", "packaging", "cloudpickle", "psutil", "pyyaml")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
CXX_STANDARD_FILES = ("CMakeLists.txt", "horovod/torch/CMakeLists.txt")

# Two ranks with different data: the sum tells a swapped, doubled or dropped contribution from the right one.
CHECK_PROGRAM = """
import torch, horovod.torch as hvd
hvd.init()
rank, size = hvd.rank(), hvd.size()
index = torch.arange(1003, dtype=torch.float32)
got = hvd.allreduce(index * (rank + 1) + rank, op=hvd.Sum)
want = index * (size * (size + 1) // 2) + size * (size - 1) // 2
assert size == 2, f"{size} ranks instead of 2: Horovod was built against another MPI than this mpirun's"
assert torch.equal(got, want), f"rank {rank}: allreduce is wrong, largest difference {(got - want).abs().max()}"
hvd.shutdown()
"""


def mpi_rpath(mpi: Mpi) -> str:
    """Where libmpi lies: seen from site-packages/horovod/torch if it is in this environment, else absolute."""
    shown = subprocess.run([mpi.mpicxx, "-show"], capture_output=True, text=True, timeout=60, check=True).stdout
    library_dir = next(iter(re.findall(r"-L(\S+)", shown)), str(mpi.bin_dir.parent / "lib"))
    if not Path(library_dir).is_relative_to(sys.prefix):
        return library_dir
    return "$ORIGIN/" + os.path.relpath(library_dir, Path(sysconfig.get_path("platlib")) / "horovod" / "torch")


def wheel_key(mpi: Mpi) -> str:
    """Everything a built wheel depends on; two environments with equal keys can share it."""
    torch_version = importlib.metadata.version("torch")
    python_tag = f"{sys.implementation.name}{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}"
    library = mpi_rpath(mpi)
    outside = "" if library.startswith("$ORIGIN") else library.replace("/", "_")
    return f"{HOROVOD_VERSION}-torch{torch_version}-{python_tag}-{mpi.kind}{mpi.version}{outside}-{platform.machine()}"


def unpack_and_edit(sdist: Path, folder: Path, rpath: str) -> Path:
    """The sources with the C++ standard raised and the library's search path set; refuses an sdist it does not know."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)  # the checksum was compared by pip: the content is known
    source = folder / f"horovod-{HOROVOD_VERSION}"
    edits = [(name, "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 20)") for name in CXX_STANDARD_FILES]
    search = f'set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\nset(CMAKE_INSTALL_RPATH "{rpath};$ORIGIN/../../torch/lib")'
    edits.append(("CMakeLists.txt", "project(horovod CXX)", f"project(horovod CXX)\n{search}"))
    for name, old, new in edits:
        text = (source / name).read_text()
        if text.count(old) != 1:
            raise BuildError(f"{name} of horovod {HOROVOD_VERSION} holds {text.count(old)} lines `{old}`, expected 1")
        (source / name).write_text(text.replace(old, new))
    return source


def build(mpi: Mpi, wheel_dir: Path, steps: Steps, jobs: int) -> Path:
    """Download, edit and compile in a temporary folder; the finished wheel appears in ``wheel_dir`` in one rename."""
    with tempfile.TemporaryDirectory(prefix="commlab-horovod-") as work:
        tools, dist, temporary = Path(work) / "tools", Path(work) / "dist", Path(work) / "tmp"
        temporary.mkdir()
        steps.run("fetch the build tools", [*PIP, "install", "--target", str(tools), *BUILD_TOOLS])
        environment = {
            **mpirun_environment(mpi),
            "TMPDIR": str(temporary),  # what pip drops when it is killed goes with the folder
            "PYTHONPATH": str(tools),  # before site-packages: the environment's own setuptools stays as it is
            "HOROVOD_WITH_PYTORCH": "1",
            "HOROVOD_WITH_MPI": "1",
            "HOROVOD_WITH_GLOO": "1",
            "HOROVOD_WITHOUT_TENSORFLOW": "1",
            "HOROVOD_WITHOUT_MXNET": "1",
            "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # gloo's CMake files ask for less than CMake 4 still speaks
            "CMAKE_GENERATOR": "Unix Makefiles",  # its setup.py passes make's own flags
            "MAKEFLAGS": f"-j{jobs}",
        }
        environment["PATH"] = f"{tools / 'bin'}{os.pathsep}{environment['PATH']}"
        requirement = Path(work) / "sdist.txt"
        requirement.write_text(f"horovod=={HOROVOD_VERSION} --hash=sha256:{SDIST_SHA256}\n")
        fetch = [*PIP, "download", "--no-deps", "--no-binary", "horovod", "--no-build-isolation"]
        steps.run("fetch the sdist", [*fetch, "-d", work, "-r", str(requirement)], environment)
        source = unpack_and_edit(next(Path(work).glob("horovod-*.tar.gz")), Path(work) / "source", mpi_rpath(mpi))
        compile_wheel = [
            *PIP,
            "wheel",
            "-v",
            "--no-deps",
            "--no-build-isolation",
            "--no-cache-dir",
            "-w",
            str(dist),
            str(source),
        ]
        steps.run("compile", compile_wheel, environment)
        built = next(dist.glob("*.whl"))
        partial = wheel_dir / f".{os.getpid()}.partial"
        shutil.copyfile(built, partial)
        return partial.rename(wheel_dir / built.name)


def installed_from(wheel: Path) -> bool:
    """Whether the environment's horovod came from this very file (pip records the address it installed from)."""
    try:
        record = importlib.metadata.distribution("horovod").read_text("direct_url.json") or ""
    except importlib.metadata.PackageNotFoundError:
        return False
    return wheel.as_uri() in record


def install_and_check(wheel: Path, mpi: Mpi, steps: Steps) -> None:
    if installed_from(wheel):
        print(f"already installed from {wheel}", flush=True)
    else:
        steps.run("install", [*PIP, "install", "--no-deps", "--force-reinstall", str(wheel)])
        steps.run("install what it needs at run time", [*PIP, "install", str(wheel)])
    check = [mpi.mpirun, "-n", "2", sys.executable, "-c", CHECK_PROGRAM]
    steps.run("check: allreduce on 2 ranks", check, mpirun_environment(mpi), timeout_s=120)


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM takes Ctrl-C's way out, so that the compiler is stopped and the temporary folder removed."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.horovod_build", description=(__doc__ or "").splitlines()[0])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=cores, help="compilers at once (default: the cores, %(default)s)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for any one step (default %(default)s)")
    parser.add_argument("--rebuild", action="store_true", help="build even when the wheel is cached")
    options = parser.parse_args(arguments)
    try:
        mpi = find_mpi()
        key = wheel_key(mpi)
        wheel_dir = cache_folder("horovod") / key
        wheel_dir.mkdir(parents=True, exist_ok=True)
        print(f"horovod {key}", flush=True)
        build_log = cache_folder("horovod") / f"{key}-build.log"
        with terminated_as_interrupt(), file_lock(wheel_dir / "lock", options.timeout, build_log):
            wheel = next(wheel_dir.glob("*.whl"), None)
            if wheel is None or options.rebuild:
                wheel = build(mpi, wheel_dir, Steps(build_log, options.timeout), options.jobs)
            install_and_check(wheel, mpi, Steps(cache_folder("horovod") / f"{key}-install.log", options.timeout))
    except importlib.metadata.PackageNotFoundError as missing:
        print(f"horovod: this environment has no {missing.name}: install commlab in it first", file=sys.stderr)
        return 2
    except (BuildError, LauncherError) as error:
        print(f"horovod: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("horovod: interrupted; the cache is as it was", file=sys.stderr)
        return 130
    print(f"horovod {HOROVOD_VERSION} works here; wheel: {wheel}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
