"""The processes of one run: who they are, how they find each other, and how they decide together.

torchrun and srun tell each process its rank by environment variables. Importing this module does not import torch, so
that a process knows whether it is the one that speaks before anything slow happens. A decision that could differ
between ranks (a file that only one of them sees, a disk that is full) is taken by `first` or `together`: all ranks go
on, or all of them raise.
"""

import atexit
import json
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

T = TypeVar("T")

# Between two questions to the store: often at first, then seldom, as there may be hundreds who ask.
FIRST_PAUSE_SECONDS, LAST_PAUSE_SECONDS = 0.01, 0.5
PART_CHARACTERS = 4 << 20  # the store hangs up on whoever sends it more than 8 MiB at once
MEETING_TIMEOUT = timedelta(minutes=10)  # how much later than the first rank the last one may come
# Of a collective operation, where a watchdog knows better how long ranks may wait for each other.
WATCHED_TIMEOUT = timedelta(days=7)
# Jobs of one cluster that share a node, and steps of one allocation, must not meet at one port, which is below those
# that Linux hands out itself; and a job that has found its port taken must not come back to it.
FIRST_PORT, N_PORTS, PORTS_FROM_START_TO_START, PORTS_FROM_STEP_TO_STEP = 20000, 12000, 5003, 1201


class OtherRankFailed(ValueError):
    """Another rank raised in a step that all ranks take together; that rank says why.

    kind: name of the class that it raised.
    """

    def __init__(self, kind: str) -> None:
        super().__init__("another rank of this run failed; its message says why")
        self.kind = kind


@dataclass(frozen=True)
class Launch:
    """This process among those of the run; address: where rank 0 listens, None for a single process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    address: tuple[str, int] | None = None


def launch() -> Launch:
    """What torchrun or srun say about this process; one process when neither started it.

    Raises ValueError when the environment names no rank 0 to meet.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, world_size, local_rank = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:  # a batch script, too, has SLURM_PROCID, but no step
        rank, world_size = int(env["SLURM_PROCID"]), int(env.get("SLURM_NTASKS", 1))
        local_rank = int(env.get("SLURM_LOCALID", 0))
    else:
        return Launch()
    if world_size == 1:
        return Launch()
    return Launch(rank, world_size, local_rank, _address())


def _address() -> tuple[str, int]:
    env = os.environ
    host = env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
    if not host:
        raise ValueError("MASTER_ADDR is not set: set it to the host of rank 0, or start with torchrun or srun")
    if port := env.get("MASTER_PORT"):
        return host, int(port)
    job, start, step = (int(env.get(f"SLURM_{name}") or 0) for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    return host, FIRST_PORT + (job + start * PORTS_FROM_START_TO_START + step * PORTS_FROM_STEP_TO_STEP) % N_PORTS


def _job() -> str:
    """What the processes of a start have in common that came from the same srun.

    A stranger at a port that follows from the job's number must not be taken for a rank of this run.
    """
    names = () if "RANK" in os.environ else ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    return "_".join(["job", *[os.environ.get(name) or "0" for name in names]])


def _agree_on_start(store: "Store", rank: int, world_size: int) -> str:
    """A name for this start, the same on all ranks, that is new in a store which outlives them.

    torchrun's count of restarts is none: it differs from node to node, and stays as it is when a node comes or goes.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("start", own)
        for other in range(1, world_size):
            asks = store.get(f"{own}/rank_{other}").decode("ascii")
            store.set(f"{own}/{asks}", "yes")
        return own
    end, pause = time.monotonic() + MEETING_TIMEOUT.total_seconds(), FIRST_PAUSE_SECONDS
    while time.monotonic() < end:
        start = store.get("start").decode("ascii")  # perhaps of an earlier rank 0, which does not answer any more
        store.set(f"{start}/rank_{rank}", own)
        if store.check([f"{start}/{own}"]):
            return start
        time.sleep(pause)
        pause = min(LAST_PAUSE_SECONDS, 1.2 * pause)
    raise TimeoutError(f"rank 0 has not answered rank {rank} within {MEETING_TIMEOUT.total_seconds():g} s")


def _first_host(node_list: str) -> str:
    """`gpu[007-012,020],login` -> `gpu007`."""
    match = re.match(r"([^\[,]*)(?:\[([^\],-]+)[^\]]*\])?([^,]*)", node_list)
    return "".join(part or "" for part in match.groups()) if match else ""


class Ranks:
    """The process group of the run; for a single process everything here is a no-op.

    `first` and `together` must be called by all ranks in the same order.
    """

    def __init__(self, here: Launch, store: "Store") -> None:
        self.rank, self.world_size, self.local_rank = here.rank, here.world_size, here.local_rank
        self.store = store
        self.failed = False  # all ranks know of an error of one of them
        self._n_shared = 0

    def first(self, work: Callable[[], T]) -> T:
        """The result of `work`, done by rank 0 alone, on all ranks; it must be plain JSON.

        However long it takes, the others wait. When it raises, they raise OtherRankFailed.
        """
        if self.world_size == 1:
            return work()
        key = self.new_key()
        if self.rank == 0:
            try:
                result = work()
            except BaseException as error:
                self.failed = True
                self.post(key, {"error": type(error).__name__})
                raise
            self.post(key, {"result": result})
            return result
        answer = self.await_post(key)
        if "error" in answer:
            self.failed = True
            raise OtherRankFailed(answer["error"])
        shared: T = answer["result"]
        return shared

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work` of this rank, when it raised on none.

        Otherwise the lowest rank on which it raised raises that error, the others OtherRankFailed.
        """
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        lowest = self._lowest(self.rank if error is not None else self.world_size)
        if lowest == self.world_size:
            return result
        self.failed = True
        if lowest == self.rank and error is not None:
            raise error
        raise OtherRankFailed("Exception")

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on some rank."""
        return self._lowest(0 if flag else 1) == 0

    def sum(self, value: "Tensor") -> "Tensor":
        """The sum of `value` over all ranks, on all ranks; `value` itself stays as it is."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        total = value.clone()
        dist.all_reduce(total)
        return total

    def wait_as_watched(self) -> None:
        """Collective operations, in all groups that there are, may take as long as a watchdog lets them.

        Otherwise torch ends them after 10 minutes with NCCL, 30 with gloo.
        """
        if self.world_size > 1:
            from torch.distributed import distributed_c10d

            for group in list(distributed_c10d._world.pg_map):
                distributed_c10d._set_pg_timeout(WATCHED_TIMEOUT, group)

    def new_key(self) -> str:
        """A name in the store that all ranks agree on and that is used once."""
        self._n_shared += 1
        return f"mamba_train/{self._n_shared}"

    def post(self, key: str, value: Any) -> None:
        """Leave a JSON value for other ranks; may be called from any thread."""
        text = json.dumps(value)
        parts = [text[first : first + PART_CHARACTERS] for first in range(0, len(text), PART_CHARACTERS)]
        for number, part in enumerate(parts[1:], start=1):
            self.store.set(f"{key}.{number}", part)
        self.store.set(key, f"{len(parts)} {parts[0]}")  # last: whoever sees it finds the rest

    def await_post(self, key: str, give_up: Callable[[], bool] = lambda: False) -> Any:
        """The value that some rank posts, whenever that is; None when `give_up()` becomes true before."""
        # Asking again and again, as a blocking wait could neither be interrupted nor shared between threads.
        pause = FIRST_PAUSE_SECONDS
        while not self.store.check([key]):
            if give_up():
                return None
            time.sleep(pause)
            pause = min(LAST_PAUSE_SECONDS, 1.2 * pause)
        n_parts, _, text = self.store.get(key).decode("ascii").partition(" ")
        rest = [self.store.get(f"{key}.{number}").decode("ascii") for number in range(1, int(n_parts))]
        return json.loads("".join([text, *rest]))

    def _lowest(self, value: int) -> int:
        if self.world_size == 1:
            return value
        import torch
        import torch.distributed as dist

        lowest = torch.tensor(value)
        dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
        return int(lowest)


_joined: Ranks | None = None
_before_leaving: list[Callable[[], object]] = []


def before_leaving(work: Callable[[], object]) -> None:
    """Have `work` done by a process that leaves in good order, before its process groups end."""
    _before_leaving.append(work)


def join() -> Ranks:
    """Meet the other processes of the run; a second call returns the same object.

    CPU tensors travel by gloo, CUDA tensors by NCCL. Imports torch.
    """
    global _joined
    if _joined is not None:
        return _joined
    import torch
    import torch.distributed as dist

    here = launch()
    if here.address is None:
        _joined = Ranks(here, dist.HashStore())
        return _joined
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # NCCL keeps a record of its last operations, which says who waits for whom when a step hangs.
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # its old name, of which torch warns in every process
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if torch.cuda.is_available():
        torch.cuda.set_device(here.local_rank % torch.cuda.device_count())
    host, port = here.address
    # torchrun itself listens at that port, so its workers do not.
    started_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listens = here.rank == 0 and not started_by_torchrun
    tcp = dist.TCPStore(host, port, is_master=listens, timeout=MEETING_TIMEOUT)
    store = dist.PrefixStore(_job(), tcp)
    if started_by_torchrun:
        store = dist.PrefixStore(_agree_on_start(store, here.rank, here.world_size), store)
    dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.world_size)
    _joined = Ranks(here, store)
    return _joined


def lone_group() -> None:
    """Give a single process the process group that engines for several ranks ask for."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def leave(code: int = 0) -> None:
    """End this process in good order when all ranks end; a single process goes on.

    After an error that only one rank has, don't: the others are not there to answer.
    """
    if _joined is None or _joined.world_size == 1:
        return
    import torch.distributed as dist

    for work in _before_leaving:
        work()
    _joined.any(False)  # rank 0 may hold the store that others still ask
    dist.destroy_process_group()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo outlive the process group, and would abort the process while the interpreter takes itself down.
    os._exit(code)


def abandon(code: int) -> None:
    """End this process at once, whatever the others wait for; a single process goes on.

    What has started the ranks, torchrun or srun, then ends the others.
    """
    if _joined is None or _joined.world_size == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as in `leave`


def fail_together(error: Exception) -> Exception:
    """The error that this rank ends with when it cannot take part in the run: `error`, or OtherRankFailed.

    So that an error which all ranks have is said once.
    """
    if _joined is not None and _joined.failed:
        return error

    def raise_it() -> None:
        raise error

    try:
        if launch().world_size > 1:
            join().together(raise_it)
    except Exception as agreed:
        return agreed
    return error
