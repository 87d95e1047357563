"""A real SLURM of four nodes on this machine: munged, slurmctld and four slurmd, in a folder and on ports of its own.

Everything runs as root without systemd and cgroups. Debian's packages are enough: `apt-get install slurm-wlm munge`.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

N_NODES = 4
NODES = tuple(f"node{number}" for number in range(1, N_NODES + 1))
HOSTS = Path("/etc/hosts")
DAEMONS = ("munged", "slurmctld", "slurmd")
# Where clusters run at the same time, one per test process, their daemons' ports must differ, and the numbers of their
# jobs too, as the ranks of a job meet at a port that follows from it (mamba_train.ranks: 12,000 ports from 20,000 on).
# Each takes the first free place: seven of them share no port however often their jobs come back.
FIRST_PORT, PORTS_OF_CLUSTER, JOBS_OF_CLUSTER, N_PLACES = 10000, 80, 100, 120
PLACES = Path(tempfile.gettempdir()) / "mamba_train_slurm_places"

# cred_expire shortens the wait before a requeued job may start from two minutes to some seconds; SlurmdTimeout
# is how long a node may be silent before it counts as down.
CONFIG = """\
ClusterName=test
SlurmctldHost=localhost
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort={port}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdTimeout=10
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
FirstJobId={first_job}
KillWait=10
OverTimeLimit=0
MinJobAge=300
SlurmdParameters=config_overrides
NodeName=node[1-{n_nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first_port}-{last_port}] CPUs=4 \
RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes=node[1-{n_nodes}] Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why there can be no cluster on this machine; None if there can."""
    missing = [name for name in DAEMONS if find_daemon(name) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)} not found): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "bringing up a SLURM needs root (it writes node1 to node4 into /etc/hosts)"
    return None


def find_daemon(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]))


class Cluster:
    """Four nodes of four cores each; a context manager that leaves no process behind."""

    def __enter__(self) -> "Cluster":
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)  # munged insists that others cannot write into the folders above its socket
        for name in ("munge", "run", "state", "log", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        place, self._place = _take_place(N_NODES + 1)
        first = FIRST_PORT + place * PORTS_OF_CLUSTER
        self.conf = self.folder / "slurm.conf"
        self.conf.write_text(
            CONFIG.format(
                folder=self.folder,
                port=first,
                first_port=first + 1,
                last_port=first + N_NODES,
                n_nodes=N_NODES,
                first_job=1 + place * JOBS_OF_CLUSTER,
            )
        )
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        self.env["SLURM_CONF"] = str(self.conf)
        self._daemons: dict[str, subprocess.Popen] = {}
        _name_nodes()
        try:
            self._start_munged()
            self._start("slurmctld", "-D", "-f", str(self.conf))
            for node in NODES:
                self.start_node(node)
            wait_for(lambda: self.node_states() == dict.fromkeys(NODES, "idle"), "four idle nodes", 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if "slurmctld" in self._daemons:
            subprocess.run(["scancel", "--user=root"], env=self.env, capture_output=True, timeout=30)
        for name in reversed(list(self._daemons)):
            self._daemons[name].kill()
            self._daemons[name].wait()
        for pid in self._processes(f"SLURM_CONF={self.conf}"):
            _kill(pid)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._place.close()

    def _start_munged(self) -> None:
        folder = self.folder / "munge"
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o400)
        options = [f"--{name}={folder / name.split('-')[0]}" for name in ("socket", "key-file", "pid-file", "log-file")]
        self._start("munged", "--foreground", "--force", *options, f"--seed-file={folder / 'seed'}")
        wait_for((folder / "socket").exists, "the socket of munged", 10)

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-N", node, "-f", str(self.conf), name=node)

    def _start(self, daemon: str, *arguments: str, name: str | None = None) -> None:
        program = find_daemon(daemon)
        assert program is not None
        log = (self.folder / "log" / f"{name or daemon}.out").open("ab")
        # What a slurmd starts inherits TEST_NODE, also the slurmstepd that outlives it.
        env = {**self.env, "TEST_NODE": name or daemon}
        self._daemons[name or daemon] = subprocess.Popen([program, *arguments], env=env, stdout=log, stderr=log)

    def n_running(self, daemon: str) -> int:
        """How many processes of a daemon run, asked of the operating system."""
        alive = [process for process in self._daemons.values() if process.poll() is None]
        names = [(Path("/proc") / str(process.pid) / "comm").read_text().strip() for process in alive]
        return names.count(daemon)

    def kill_daemon(self, node: str) -> None:
        """As if the machine lost its network: nobody hears of it any more, and what runs there runs on."""
        self._daemons[node].kill()
        self._daemons[node].wait()

    def kill_node(self, node: str) -> None:
        """As if the machine lost its power: its daemon and everything on it dies at once."""
        self.kill_daemon(node)
        for pid in self._processes(f"TEST_NODE={node}") + self._processes(f"SLURMD_NODENAME={node}"):
            if f"SLURM_CONF={self.conf}" in _environment(pid):
                _kill(pid)

    def task_pids(self, job: str, rank: int = 0) -> list[int]:
        """Python processes of a rank of the job's training step, the task itself first."""
        number, _, task = job.partition("_")
        name = f"SLURM_ARRAY_TASK_ID={task}" if task else f"SLURM_JOB_ID={number}"
        wanted = {f"SLURM_CONF={self.conf}", name, f"SLURM_PROCID={rank}"}
        pids = [pid for pid in _all_pids() if wanted <= _environment(pid)]
        return sorted(pid for pid in pids if any(word.endswith("train.py") for word in _read(pid, "cmdline")[1:2]))

    def _processes(self, variable: str) -> list[int]:
        return [pid for pid in _all_pids() if pid != os.getpid() and variable in _environment(pid)]

    def run(self, *command: str, check: bool = True) -> str:
        """Output of a SLURM command."""
        result = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", check=False).splitlines()
        return dict(line.split() for line in lines)

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def wait_for_end(self, job: str, seconds: float = 240) -> dict[str, str]:
        """Wait until the job has left the queue for good."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        wait_for(lambda: self.job(job)["JobState"] in ends, f"the end of job {job}", seconds)
        return self.job(job)


def wait_for(condition: Callable[[], object], what: str, seconds: float) -> None:
    """Poll until `condition` holds; fails the test when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def _name_nodes() -> None:
    missing = [node for node in NODES if node not in HOSTS.read_text().split()]
    if missing:
        with HOSTS.open("a") as file:  # never empty in between: all that runs on this machine looks names up there
            file.write(f"\n127.0.0.1 {' '.join(missing)}\n")


def _take_place(n_ports: int) -> tuple[int, IO[str]]:
    """A place on this machine that no other cluster has while the file is open, and whose first ports are free."""
    PLACES.mkdir(exist_ok=True)
    for place in range(N_PLACES):
        file = (PLACES / str(place)).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for offset in range(n_ports):
                with socket.socket() as one:
                    one.bind(("", FIRST_PORT + place * PORTS_OF_CLUSTER + offset))
            return place, file
        except OSError:  # taken, or daemons that were left
            file.close()
    raise RuntimeError("no free ports")


def _all_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _environment(pid: int) -> set[str]:
    return set(_read(pid, "environ"))


def _read(pid: int, name: str) -> list[str]:
    try:
        return (Path("/proc") / str(pid) / name).read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it ended meanwhile
        return []


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
