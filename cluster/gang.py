"""Run a function on a gang of ranks by Ray Train: all of them start together, and one failure ends them all.

A gang that has lost a rank may start again, as large as there is room for; the function then finds by itself how far
it had come.
"""

import contextlib
import logging
import math
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol

import ray

from cluster import logs
from cluster.errors import ClusterError, GangError, Regroup, one_line
from cluster.follow import follow
from cluster.mailbox import Slot
from cluster.meter import Usage, cpu_seconds
from cluster.power import Gauge
from cluster.session import Session
from cluster.standing import STANDING
from cluster.story import Story, cause

_log = logging.getLogger(__name__)
# A peer's death shows on the other ranks first, as a broken connection. They wait this long before they fail
# themselves, so that Ray notices the death and the cause is reported rather than the symptom.
_GRACE_SECONDS = 2.0

Fatal = tuple[type[Exception], ...]


@dataclass(frozen=True)
class Gang:
    """How many ranks, and what each holds.

    Attributes:
        workers: ranks, the most of them where ``sizes`` are given.
        cpus, gpus: of each rank.
        sizes: the numbers of ranks between which the gang follows the cluster; without them always ``workers``.
        max_failures: how often a gang that has lost a rank starts again.
        look_seconds: time between two looks for room to grow.
    """

    workers: int
    cpus: int = 1
    gpus: float = 0.0
    sizes: tuple[int, ...] = ()
    max_failures: int = 0
    look_seconds: float = 30.0

    @property
    def least(self) -> int:
        """Ranks that must find room before the gang starts."""
        return min(self.sizes, default=self.workers)


class Post(Protocol):
    """Where a rank leaves its reports, and hears whether it is to leave; a ``Slot`` is one."""

    def report(self, values: dict[str, Any]) -> None: ...

    def asked(self) -> bool: ...

    def kept(self, left: bool = False) -> None: ...


class Rank:
    """What the function knows of its place. ``torch.distributed`` is initialised (gloo on CPUs, nccl on GPUs).

    Attributes:
        rank, world_size: this rank and how many there are.
        device: ``cpu`` or ``cuda:<index>``.
        gauge: reads what this rank's process burns.
    """

    def __init__(self, rank: int, world_size: int, device: str, slot: Post, gauge: Gauge | None = None) -> None:
        self.rank, self.world_size, self.device, self.gauge = rank, world_size, device, gauge
        self._slot = slot

    def report(self, values: dict[str, Any]) -> None:
        """Hand plain values to the driver; only rank 0's arrive. Never waits and never raises."""
        if self.rank == 0:
            self._slot.report(values)

    def agreed(self, number: int) -> int:
        """Rank 0's ``number``, a signed 64-bit one, on every rank; all must call."""
        import torch

        shared = torch.tensor(number, dtype=torch.int64, device=self.device)
        torch.distributed.broadcast(shared, 0)
        return int(shared)

    def together(self, usage: Usage) -> Usage:
        """The usages of all ranks as one, with this rank's wall seconds; all must call."""
        import torch

        if self.world_size == 1:
            return usage
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, usage)
        return replace(sum(found, Usage()), wall_seconds=usage.wall_seconds)

    def kept(self) -> None:
        """Say that what has been done until now is saved, and would not be lost with this gang. Never waits."""
        self._slot.kept()

    def must_leave(self) -> bool:
        """Whether the gang is to begin again soon, as there is room for more ranks, or a node is about to go.

        Never waits. Only rank 0 hears of it; ``leave`` when all that would be lost has been saved.
        """
        return self.rank == 0 and self._slot.asked()

    def leave(self) -> NoReturn:
        """End this gang and have ``fn`` called again on another, as large as there is room for; all ranks must call."""
        import torch

        if self.rank == 0:
            self._slot.kept(left=True)
        # Ray Train ends all ranks when the first has left.
        torch.distributed.barrier()
        raise Regroup


@dataclass(frozen=True)
class _Task:
    """What each rank gets, in one picklable piece."""

    fn: Callable[[Rank, Any], Any]
    argument: Any
    gang: Gang
    slot: Slot
    fatal: Fatal
    logs: Mapping[str, Any] = field(default_factory=dict)


def run_gang(
    session: Session,
    fn: Callable[[Rank, Any], Any],
    argument: Any,
    gang: Gang,
    on_report: Callable[[dict[str, Any]], None],
    *,
    fatal: Fatal = (),
    what: str = "training",
    on_note: Callable[[str], None] = lambda _: None,
) -> tuple[Any, Usage]:
    """Call ``fn(rank, argument)`` on every rank; reports come to ``on_report`` in this thread while it runs.

    Args:
        fatal: errors of the caller's that end the gang at once, as those of this package do.
        on_note: told in a sentence when the gang starts again, and with how many ranks.

    Returns:
        Rank 0's return value, and what the gang held from here to its end, start-ups included (of the processor
        time that of the ranks that came to the end).

    Raises:
        ResourceError: the cluster has no room for the gang.
        GangError: a rank failed or died, more often than ``max_failures``; one line says which and why.
        ClusterError, or one of ``fatal``: as a rank raised it.
    """
    session.require({what: [(gang.least, {"CPU": gang.cpus, "GPU": gang.gpus})]})
    started = time.perf_counter()
    mailbox, name, spent = session.mailbox, uuid.uuid4().hex, session.spending()
    story = Story(started, gang.cpus, gang.gpus)
    folder = tempfile.mkdtemp(prefix="gang-")
    task = _Task(fn, argument, gang, mailbox.slot(name), fatal, logs.carried())
    launch = _Launch(task, folder, name, session.embedded)
    try:
        follow(launch, mailbox, name, story, on_report, on_note, spent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        held = story.usage(time.perf_counter())
        with contextlib.suppress(Exception):
            spent(held)
    if launch.error is not None:
        raise cause(launch.error, story.failures, fatal, what) from None
    value, burnt = launch.value
    return value, replace(held, cpu_seconds=burnt)


class _Launch(threading.Thread):
    """Ray Train's blocking ``fit`` in a thread of its own, so that the driver's main thread keeps its signal handlers
    (``fit`` would replace the one for Ctrl-C and never give it back) and is free to show progress."""

    def __init__(self, task: _Task, folder: str, name: str, embedded: bool) -> None:
        super().__init__(daemon=True, name="gang")
        self.task, self.folder, self.run_name, self.embedded = task, folder, name, embedded
        self.value: tuple[Any, float] = (None, 0.0)
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.value = self._fit()
        except Exception as error:
            self.error = error

    def _fit(self) -> tuple[Any, float]:
        # Imported here, beside the start of the mailbox, and not by everything that only names a Gang.
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        from cluster.recovery import Failures, Sizes
        from cluster.trainer import GangTrainer, TorchRendezvous

        gang, slot = self.task.gang, self.task.slot
        again = FailureConfig(max_failures=gang.max_failures)
        scaling = ScalingConfig(
            num_workers=(gang.least, gang.workers) if gang.sizes else gang.workers,
            elastic_resize_monitor_interval_s=gang.look_seconds,
            use_gpu=gang.gpus > 0,
            resources_per_worker={"CPU": gang.cpus} | ({"GPU": gang.gpus} if gang.gpus else {}),
        )
        trainer = GangTrainer(
            _on_rank,
            # In bytes, so that the controller doesn't import the training code, and torch with it.
            train_loop_config={"task": ray.cloudpickle.dumps(self.task)},
            scaling_config=scaling,
            backend_config=TorchRendezvous("nccl" if gang.gpus else "gloo"),
            run_config=RunConfig(name=self.run_name, storage_path=self.folder, failure_config=again),
        )
        trainer.embedded = self.embedded
        trainer.policies = {
            "failure_policy": Failures(again, self.task.fatal, slot),
            "scaling_policy": Sizes(scaling, gang.sizes or (gang.workers,), slot),
        }
        value: tuple[Any, float] = ray.cloudpickle.loads(trainer.fit().return_value)
        return value


def _on_rank(config: dict[str, Any]) -> bytes | None:
    """What Ray Train calls on each rank. Rank 0 returns its value with the processor seconds of all ranks, pickled."""
    import torch

    from cluster.trainer import device

    task: _Task = ray.cloudpickle.loads(config["task"])
    mine, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    logs.adopt(task.logs, rank=mine)
    _log.info("rank %d of %d begins", mine, world)
    gauge = Gauge(task.gang.cpus, task.gang.gpus)
    burnt_before = gauge.read()
    if not task.slot.join(mine, world, gauge.machine):
        raise GangError("the gang was stopped before it had started")
    torch.set_num_threads(max(1, math.floor(task.gang.cpus)))
    STANDING.listen(task.slot.survived)
    rank = Rank(mine, world, device(), task.slot, gauge)
    try:
        value = task.fn(rank, task.argument)
    except Regroup:
        raise
    except Exception as error:
        passed_on = error if isinstance(error, (ClusterError, *task.fatal)) else GangError(one_line(error))
        _log.error("%s", passed_on)
        task.slot.fail(mine, passed_on)
        time.sleep(_GRACE_SECONDS if rank.world_size > 1 and passed_on is not error else 0.0)
        raise passed_on from None
    task.slot.burnt(gauge.machine, cpu_seconds(), dict((gauge.read() - burnt_before).joules))
    burnt = torch.tensor(cpu_seconds(), dtype=torch.float64, device=rank.device)
    torch.distributed.all_reduce(burnt)
    task.slot.flush()
    # Ray Train refuses tensors in what a rank returns, though bytes that hold some travel as well.
    return bytes(ray.cloudpickle.dumps((value, float(burnt)))) if mine == 0 else None
