"""Map shards over a pool of Ray actors: each worker is made once, dead actors are replaced, failed shards retried."""

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError

from cluster.errors import ClusterError, ShardError, one_line
from cluster.meter import Usage, cpu_seconds
from cluster.session import Session

Fatal = tuple[type[Exception], ...]

# What numerical libraries read when they start, so that an actor keeps to the cores it was given.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


class Worker(Protocol):
    """What an actor holds, made once in it (so that a model is loaded once), and called shard after shard."""

    def run(self, shard: Any) -> Any:
        """Work through one shard. What it returns and raises is pickled."""


@dataclass(frozen=True)
class Crew:
    """Actors of one kind: how their worker is made, how many there may be, and what each holds.

    Attributes:
        make: makes the worker inside an actor, once.
        most, least: how many actors are asked for, and how many must fit for the work to begin.
        cpus, gpus: what each actor holds; fractions share a device.
        accelerator: Ray's name of the accelerator an actor needs, such as ``H100``; any where None.
        resources: custom resources each actor holds.
        name: what the kind is called in messages and reports.
    """

    make: Callable[[], Worker]
    most: int = 1
    least: int = 1
    cpus: float = 1
    gpus: float = 0
    accelerator: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    name: str = "actors"


@dataclass(frozen=True)
class Progress:
    """How far a map has come.

    Attributes:
        done, total: shards.
        actors, starting: actors that work, and those that wait for room or make their worker.
        retried, lost_actors: as in the report.
        told: what the workers have told (``cluster.notice.tell``), summed over actors, dead ones included.
        usage, by_crew: used so far, in all and by the crew's name.
    """

    done: int
    total: int
    actors: int
    starting: int
    retried: int
    lost_actors: int
    told: Mapping[str, float]
    usage: Usage
    by_crew: Mapping[str, Usage]


@dataclass(frozen=True)
class PoolReport:
    """What a pool used and lived through.

    Attributes:
        usage: what it held over its whole life, start-up included; ``cpu_seconds`` are measured in the actors.
        by_crew: the same by the crew's name.
        retried: how often a shard was given out again after a failure.
        handed_back: how often one was given out again without one.
        lost_actors: actors that died.
        duplicated: how often a slow shard was given to a second actor.
        startup_seconds: from the start to the first shard's beginning.
    """

    usage: Usage = field(default_factory=Usage)
    by_crew: Mapping[str, Usage] = field(default_factory=dict)
    retried: int = 0
    handed_back: int = 0
    lost_actors: int = 0
    duplicated: int = 0
    startup_seconds: float = 0.0


@dataclass(frozen=True)
class _Outcome:
    """What an actor sends back: a value, or an error that is given rather than raised, so that its type survives."""

    value: Any = None
    error: Exception | None = None
    cpu_seconds: float = 0.0
    began: float = 0.0


class _Actor:
    def __init__(self, make: Callable[[], Worker], cpus: float, fatal: Fatal) -> None:
        self.make, self.fatal, self.cpu = make, fatal, 0.0
        threads = max(1, int(cpus))
        os.environ.update(dict.fromkeys(_THREADS, str(threads)))
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(threads)
        self.worker: Worker | None = None

    def run(self, shard: Any) -> _Outcome:
        began, value, problem = time.time(), None, None
        try:
            if self.worker is None:
                self.worker = self.make()
            value = self.worker.run(shard)
        except Exception as error:
            problem = error if isinstance(error, (ClusterError, *self.fatal)) else ShardError(one_line(error))
        before, self.cpu = self.cpu, cpu_seconds()
        return _Outcome(value, problem, self.cpu - before, began)


def map_shards(
    session: Session,
    crews: Crew | Sequence[Crew],
    shards: Sequence[Any],
    on_result: Callable[[Any, Any], None],
    *,
    retries: int = 3,
    fatal: Fatal = (),
    what: str = "work",
    on_progress: Callable[[Progress], None] | None = None,
) -> PoolReport:
    """Run every shard once to success; ``on_result(shard, value)`` is called here, in order of completion.

    An exception of a ``fatal`` type, or a ``ClusterError``, ends the work at once: trying again would not help. Any
    other, and the death of an actor, has its shard tried again, by another actor where there is one.

    Raises:
        ResourceError: the cluster has no room for the pool.
        ShardError: a shard failed more than ``retries`` times; names the shard and the last cause.
        ClusterError, or one of ``fatal``: as a worker raised it.
    """
    if not len(shards):
        return PoolReport()
    pool = crews if isinstance(crews, Crew) else crews[0]
    actors = min(pool.most, len(shards))
    session.require(what, actors, pool.cpus, pool.gpus)
    run = _Run(pool.make, shards, pool, retries, fatal, what)
    started, began = time.perf_counter(), time.time()
    try:
        for _ in range(actors):
            run.hire()
        while run.busy:
            for shard, outcome in run.wait():
                on_result(shards[shard], outcome.value)
    finally:
        run.dismiss()
    wall = time.perf_counter() - started
    usage = Usage(
        device_seconds=wall * actors * pool.gpus,
        core_seconds=wall * actors * pool.cpus,
        cpu_seconds=run.cpu_seconds,
        wall_seconds=wall,
    )
    return PoolReport(usage, {pool.name: usage}, run.retried, 0, run.lost, 0, max(0.0, run.first - began))


@dataclass
class _Run:
    """The driver's book of one map: who works on which shard, and what is left."""

    make: Callable[[], Worker]
    shards: Sequence[Any]
    pool: Crew
    retries: int
    fatal: Fatal
    what: str
    busy: dict[Any, tuple[Any, int]] = field(default_factory=dict)  # call -> actor, shard
    actors: list[Any] = field(default_factory=list)
    failures: dict[int, int] = field(default_factory=dict)
    retried: int = 0
    lost: int = 0
    cpu_seconds: float = 0.0
    first: float = float("inf")

    def __post_init__(self) -> None:
        self.left = deque(range(len(self.shards)))

    def hire(self) -> None:
        """Start an actor and give it a shard, if any is left."""
        if not self.left:
            return
        made = ray.remote(_Actor).options(num_cpus=self.pool.cpus, num_gpus=self.pool.gpus, max_restarts=0)
        actor = made.remote(self.make, self.pool.cpus, self.fatal)
        self.actors.append(actor)
        self._give(actor)

    def wait(self) -> list[tuple[int, _Outcome]]:
        """Wait for the next call to end; returns what has succeeded."""
        (call, *_), _ = ray.wait(list(self.busy), num_returns=1)
        actor, shard = self.busy.pop(call)
        try:
            outcome: _Outcome = ray.get(call)
        except RayActorError as error:
            self.lost += 1
            self.actors.remove(actor)
            self._retry(shard, _death(error))
            self.hire()
            return []
        except RayError as error:  # what the worker returned could not be sent here
            outcome = _Outcome(error=ShardError(one_line(error)))
        self.cpu_seconds += outcome.cpu_seconds
        self.first = min(self.first, outcome.began)
        if outcome.error is None:
            self._give(actor)
            return [(shard, outcome)]
        if not isinstance(outcome.error, ShardError):
            raise outcome.error
        self._retry(shard, str(outcome.error))
        self._give(actor)
        return []

    def dismiss(self) -> None:
        """End all actors, whatever they are doing."""
        for actor in self.actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)

    def _give(self, actor: Any) -> None:
        if self.left:
            shard = self.left.popleft()
            self.busy[actor.run.remote(self.shards[shard])] = (actor, shard)

    def _retry(self, shard: int, cause: str) -> None:
        self.failures[shard] = self.failures.get(shard, 0) + 1
        if self.failures[shard] > self.retries:
            raise ShardError(
                f"{self.what}: shard {_name(self.shards[shard])} failed {self.failures[shard]} times, the last time "
                f"because {cause}"
            )
        self.retried += 1
        self.left.append(shard)


def _death(error: RayActorError) -> str:
    lines = str(error).strip().splitlines()
    if lines and "creation task" in lines[0]:
        return f"its actor could not start: {lines[-1].strip()}"
    return "its actor died; it was killed or ran out of memory"


def _name(shard: Any) -> str:
    text = repr(shard)
    return text if len(text) <= 80 else text[:77] + "..."
