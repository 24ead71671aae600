"""Actors that answer questions for as long as somebody asks: each holds a worker, and several ranks share them all.

A map (``cluster.shards``) has a list of work and an end. Here the work is made while it is asked for, and whoever asks
goes on meanwhile. Ray itself starts an actor again that has died, and asks it again what it was asked.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from cluster.errors import ClusterError, one_line
from cluster.meter import Usage, cpu_seconds
from cluster.team import Crew, Worker

Fatal = tuple[type[Exception], ...]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
_LAST_WORD_SECONDS = 10.0


@dataclass(frozen=True)
class _Reply:
    """An error is given rather than raised, so that its type survives."""

    value: Any = None
    error: Exception | None = None


class _Answering:
    """What runs in an actor's process."""

    def __init__(self, make: Callable[[], Worker], cpus: float) -> None:
        threads = max(1, int(cpus))
        os.environ.update(dict.fromkeys(_THREADS, str(threads)))
        self.make, self.threads = make, threads
        self.worker: Worker | None = None

    def run(self, question: Any) -> _Reply:
        try:
            if self.worker is None:
                # At the first question, so that an error in it reaches whoever asked.
                self.worker = self.make()
            if (torch := sys.modules.get("torch")) is not None and torch.get_num_threads() != self.threads:
                torch.set_num_threads(self.threads)
            return _Reply(self.worker.run(question))
        except Exception as error:
            return _Reply(error=error)

    def cpu_seconds(self) -> float:
        return cpu_seconds()


class Answer:
    """What was asked for, there or not yet."""

    def __init__(self, reply: Any, fatal: Fatal, what: str) -> None:
        self._reply, self._fatal, self._what = reply, fatal, what

    def wait(self) -> Any:
        """The worker's answer, waited for.

        Raises:
            ClusterError, or one of ``fatal``: as the worker raised it, or because its actor died too often.
        """
        try:
            reply: _Reply = ray.get(self._reply)
        except RayActorError:
            raise ClusterError(
                f"{self._what}: an actor died and could not be started again; it was killed or ran out of memory"
            ) from None
        except RayError as error:
            raise ClusterError(f"{self._what} failed: {one_line(error)}") from None
        if reply.error is None:
            return reply.value
        if isinstance(reply.error, (ClusterError, *self._fatal)):
            raise reply.error
        raise ClusterError(f"{self._what} failed: {one_line(reply.error)}")


class OnCall:
    """A crew's actors on call. Everybody who makes one with the same name shares the same actors.

    Attributes:
        actors: how many.
    """

    def __init__(
        self, name: str, crews: Sequence[Crew], *, retries: int = 3, fatal: Fatal = (), what: str = "a question"
    ) -> None:
        """Start the actors, ``least`` of each crew, or find those that another rank has started; doesn't wait.

        They end with ``close``, or with the process that was the first to make them.

        Args:
            retries: how often an actor that dies is started again, and asked again.
        """
        self._fatal, self._what, self._next = fatal, what, 0
        self._crews, self._started = [(crew, crew.least) for crew in crews], time.perf_counter()
        self._handles = [
            _actor(f"{name}-{kind}-{number}", crew, retries)
            for kind, (crew, count) in enumerate(self._crews)
            for number in range(count)
        ]
        self.actors = len(self._handles)
        assert self.actors, "nobody is on call"
        # Of kinds of unequal speed each is asked as it gets on.
        self._asked: list[list[Any]] = [[] for _ in self._handles]

    @property
    def cores(self) -> float:
        """CPU cores that all actors hold."""
        return sum(crew.cpus * count for crew, count in self._crews)

    @property
    def devices(self) -> float:
        """Accelerators that all actors hold."""
        return sum(crew.gpus * count for crew, count in self._crews)

    def ask(self, question: Any) -> Answer:
        """Ask whichever actor has the least to do for this asker; doesn't wait."""
        for asked in self._asked:
            if asked:
                asked[:] = ray.wait(asked, num_returns=len(asked), timeout=0)[1]
        self._next = (self._next + 1) % self.actors
        which = min(range(self.actors), key=lambda i: (len(self._asked[i]), (i - self._next) % self.actors))
        reply = self._handles[which].run.remote(question)
        self._asked[which].append(reply)
        return Answer(reply, self._fatal, self._what)

    def usage(self) -> Usage:
        """What the actors have held since they were asked for, and burnt."""
        wall = time.perf_counter() - self._started
        burnt = 0.0
        for handle in self._handles:
            try:
                burnt += ray.get(handle.cpu_seconds.remote(), timeout=_LAST_WORD_SECONDS)
            except RayError:
                continue  # What it has burnt is not known; that it was held is.
        devices = wall * self.devices
        named = {crew.accelerator: wall * crew.gpus * n for crew, n in self._crews if crew.accelerator and crew.gpus}
        return Usage(devices, wall * self.cores, burnt, wall, by_accelerator=named)

    def close(self) -> None:
        """End the actors, for everybody who shares them."""
        for handle in self._handles:
            ray.kill(handle)


def _actor(name: str, crew: Crew, retries: int) -> Any:
    options: dict[str, Any] = {"num_cpus": crew.cpus, "num_gpus": crew.gpus, "resources": dict(crew.resources)}
    if crew.accelerator is not None:
        options["accelerator_type"] = crew.accelerator
    return (
        ray.remote(_Answering)
        .options(
            name=name,
            get_if_exists=True,
            max_restarts=retries,
            max_task_retries=retries,
            # Beside the gang that asks, and not out of what it holds.
            scheduling_strategy="DEFAULT",
            **options,
        )
        .remote(crew.make, crew.cpus)
    )
