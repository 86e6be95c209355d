"""The tests that need mpirun: ``python tests/mpi/launch.py [RANKS] [FILE OR FOLDER ...] [arguments for pytest]``.

All files share one launch, because each launch pays for importing torch on every rank. A file whose tests leave
something behind that would disturb others says so in a constant, and comes after them::

    LEAVES = "Horovod's thread, which takes part in what MPI does until the process ends"

``MPIEXEC_TIMEOUT`` bounds the launch in seconds.
"""

from __future__ import annotations

import ast
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]

from hung import STACKS, digest  # noqa: E402

from bench.core.mpirun import find_mpi, mpirun_environment  # noqa: E402

RANKS = 8
LAUNCH_S = "1800"
"""After how many seconds a launch is ended, unless ``MPIEXEC_TIMEOUT`` says otherwise. Both MPIs read that variable."""
GRACE_S = 30
"""How much later the launcher itself is ended, should it not have ended its ranks."""


def leaves(file: Path) -> str | None:
    """The file's constant ``LEAVES``, read without importing the file."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LEAVES":
            left = ast.literal_eval(node.value)
            if not isinstance(left, str) or not left:
                raise SystemExit(f"{file}:{node.lineno}: LEAVES must say what is left behind, as text")
            return left
    return None


def chosen(arguments: Sequence[str]) -> tuple[int, list[Path], list[str]]:
    """The number of ranks, the test files in their order, and what is left for pytest."""
    ranks, folders, others = RANKS, [], []
    for at, argument in enumerate(arguments):
        path = Path(argument).resolve()
        if at == 0 and argument.isdigit():
            ranks = int(argument)
        elif path.exists() and path.is_relative_to(HERE):
            folders.append(path)
        else:
            others.append(argument)
    files = {file for path in folders or [HERE] for file in ([path] if path.is_file() else path.rglob("test_*.py"))}
    return ranks, sorted(files, key=lambda file: (leaves(file) is not None, file)), others


def run(command: Sequence[str], environment: dict[str, str]) -> int:
    """The exit code of the launch; 124 where it had to be ended."""
    print(f"==== {shlex.join(command)}", flush=True)
    # The launcher stays in this process's group, so that Ctrl-C reaches it too; it has ranks to end, and so is
    # interrupted before it is killed.
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL)
    try:
        return process.wait(int(environment["MPIEXEC_TIMEOUT"]) + GRACE_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        return 124
    finally:
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()


def main() -> int:
    ranks, files, arguments = chosen(sys.argv[1:])
    mpi = find_mpi()
    environment = mpirun_environment(mpi)
    environment.setdefault("MPIEXEC_TIMEOUT", LAUNCH_S)
    pytest = [sys.executable, "-m", "pytest", "--with-mpi", "--color=no", "-p", "no:cacheprovider"]
    names = [str(file.relative_to(ROOT)) for file in files]
    with tempfile.TemporaryDirectory() as folder:
        environment[STACKS] = folder
        code = run([mpi.mpirun, "-n", str(ranks), *pytest, *names, *arguments], environment)
        if code:
            print(f"==== exit code {code}\n{digest(Path(folder))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
