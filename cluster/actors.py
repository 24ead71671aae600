"""Ray's actors as a place where shards are worked on: what runs inside of each, and how the driver hears of it."""

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import psutil
import ray
from ray._private.state import state as ray_state  # Ray has no public word of draining nodes; its Train reads this too
from ray.exceptions import RayActorError, RayError

from cluster import logs, notice
from cluster.backend import Draining, Ended, Event, Lost, Placed, Ready, Told
from cluster.errors import ClusterError, ShardError, one_line
from cluster.mailbox import Mail, Slot
from cluster.meter import cpu_seconds
from cluster.pool import named
from cluster.power import Gauge, Machine
from cluster.room import Need
from cluster.session import Session
from cluster.standing import STANDING
from cluster.team import Crew, Worker

Fatal = tuple[type[Exception], ...]

# What numerical libraries read when they start, so that an actor keeps to the cores it was given.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
_MAIL_SECONDS, _DRAIN_SECONDS = 1.0, 2.0
_NOTICE = "notice"
# Of what a worker returns of a shard, the numbers that its log line has, where they are among it.
_COUNTED = ("rows", "tokens", "bytes", "quarantined")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Outcome:
    """What an actor sends back: a value, or an error that is given rather than raised, so that its type survives."""

    value: Any = None
    error: Exception | None = None
    cpu_seconds: float = 0.0
    leaving: bool = False
    told: Mapping[str, float] | None = None
    joules: Mapping[str, float] = field(default_factory=dict)
    survived: Mapping[str, int] = field(default_factory=dict)


class _Actor:
    """What runs in an actor's process: the worker in a thread of its own, beside one that hears that it has to go."""

    def __init__(
        self,
        make: Callable[[], Worker],
        cpus: float,
        gpus: float,
        fatal: Fatal,
        slot: Slot,
        number: int,
        carried: Mapping[str, Any],
    ) -> None:
        logs.adopt(carried)
        self.make, self.fatal, self.slot, self.number = make, fatal, slot, number
        self.threads, self.cpu = max(1, int(cpus)), 0.0
        self.gauge = Gauge(cpus, gpus)
        self.burnt = self.gauge.read()
        self.worker: Worker | None = None
        # An embedded cluster's actor may be a process that Ray has used before.
        self.survived: Mapping[str, int] = STANDING.faults()
        os.environ.update(dict.fromkeys(_THREADS, str(self.threads)))
        notice.listen(lambda numbers: slot.report({"actor": number, "told": dict(numbers)}))
        # Ray's own answer to SIGTERM would end the process on the spot.
        signal.signal(signal.SIGTERM, self._sigterm)

    def place(self) -> tuple[str, float, Machine]:
        """The node this runs on, the age of its process and the machine, said before the worker is made."""
        age = time.time() - psutil.Process().create_time()
        return str(ray.get_runtime_context().get_node_id()), age, self.gauge.machine

    def hello(self) -> Exception | None:
        """Make the worker."""
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(self.threads)
        try:
            self.worker = self.make()
        except Exception as error:
            return self._told(error)
        return None

    def run(self, shard: Any) -> _Outcome:
        value, problem = None, None
        assert self.worker is not None, "no shard before hello"
        logs.bind(shard=named(shard))
        _log.info("shard begun")
        began = time.perf_counter()
        try:
            if notice.leaving():
                raise notice.HandBack
            value = self.worker.run(shard)
            counts = {name: value[name] for name in _COUNTED if name in value} if isinstance(value, Mapping) else {}
            _log.info("shard done", extra={"seconds": round(time.perf_counter() - began, 3), **counts})
        except Exception as error:
            problem = self._told(error)
            handed = isinstance(error, notice.HandBack)
            _log.log(logging.INFO if handed else logging.WARNING, "shard handed back" if handed else str(problem))
        logs.bind(shard=None)
        before, self.cpu = self.cpu, cpu_seconds()
        burnt, self.burnt = self.burnt, self.gauge.read()
        joules = (self.burnt - burnt).joules
        faults, self.survived = self.survived, STANDING.faults()
        more = {kind: times - faults.get(kind, 0) for kind, times in self.survived.items()}
        return _Outcome(value, problem, self.cpu - before, notice.leaving(), notice.told() or None, joules, more)

    @ray.method(concurrency_group=_NOTICE)  # type: ignore[untyped-decorator]
    def leave(self, seconds: float | None) -> None:
        notice.leave(seconds)

    def _told(self, error: Exception) -> Exception:
        own = isinstance(error, (ClusterError, notice.HandBack, *self.fatal))
        return error if own else ShardError(one_line(error))

    def _sigterm(self, *_: object) -> None:
        notice.leave()
        # In a thread: a signal handler must not wait for Ray, which it may have interrupted.
        threading.Thread(target=self.slot.report, args=({"actor": self.number, "leaving": True},), daemon=True).start()


class RayActors:
    """The backend on Ray. A context manager: on leaving it, all its actors end.

    Every call's answer comes by a queue as it arrives, so that a thousand actors cost no more to wait for than one.
    """

    def __init__(self, session: Session, crews: Sequence[Crew], shards: int, fatal: Fatal) -> None:
        self._session, self._crews, self._shards, self._fatal = session, crews, shards, fatal
        self._made = ray.remote(concurrency_groups={_NOTICE: 1})(_Actor)
        self._makes = [ray.put(crew.make) for crew in crews]
        self._gang = f"map-{uuid.uuid4().hex}"
        self._mailbox = session.mailbox
        self._actors: dict[int, Any] = {}
        self._started = 0
        self._answers: queue.SimpleQueue[tuple[Callable[..., list[Event]], int, Future[Any]]] = queue.SimpleQueue()
        self._mailed, self._asked, self._drained = self.now(), False, float("-inf")
        self._draining: dict[str, int] = {}

    def __enter__(self) -> "RayActors":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in list(self._actors):
            self.stop(actor)

    def now(self) -> float:
        return time.perf_counter()

    def start(self, kind: int) -> int:
        crew, number = self._crews[kind], self._started
        self._started += 1
        options: dict[str, Any] = {"num_cpus": crew.cpus, "num_gpus": crew.gpus, "max_restarts": 0}
        if crew.accelerator is not None:
            options["accelerator_type"] = crew.accelerator
        if crew.resources:
            options["resources"] = dict(crew.resources)
        slot = self._mailbox.slot(self._gang)
        actor = self._made.options(**options).remote(
            self._makes[kind], crew.cpus, crew.gpus, self._fatal, slot, number, logs.carried()
        )
        self._actors[number] = actor
        self._watch(self._on_placed, number, actor.place.remote())
        self._watch(self._on_ready, number, actor.hello.remote())
        return number

    def give(self, actor: int, shard: Any) -> None:
        self._watch(self._on_ended, actor, self._actors[actor].run.remote(shard))

    def leave(self, actor: int, seconds: float | None) -> None:
        self._actors[actor].leave.remote(seconds)

    def stop(self, actor: int) -> None:
        with contextlib.suppress(Exception):
            ray.kill(self._actors.pop(actor))

    def events(self, timeout: float) -> list[Event]:
        self._ask_for_mail()
        found: list[Event] = self._drains()
        with contextlib.suppress(queue.Empty):
            answer = self._answers.get(timeout=0 if found else max(timeout, 1e-3))
            while True:
                on_answer, actor, future = answer
                found += on_answer(actor, future)
                answer = self._answers.get_nowait()
        return found

    def shortage(self) -> str | None:
        needs: list[Need] = []
        for crew in self._crews:
            held = {"CPU": crew.cpus, "GPU": crew.gpus, **crew.resources}
            if crew.accelerator is not None:
                held[f"accelerator_type:{crew.accelerator}"] = 0.001  # what Ray takes of it for each actor
            needs.append((min(crew.least, self._shards), held))
        return self._session.lacks(needs)

    def _watch(self, on_answer: Callable[[int, Future[Any]], list[Event]], actor: int, call: Any) -> None:
        call.future().add_done_callback(lambda future: self._answers.put((on_answer, actor, future)))

    def _on_placed(self, actor: int, future: Future[Any]) -> list[Event]:
        error = future.exception()
        return [Placed(actor, *future.result())] if error is None else self._dead(actor, error)

    def _on_ready(self, actor: int, future: Future[Any]) -> list[Event]:
        error = future.exception()
        if isinstance(error, RayActorError):
            return self._dead(actor, error)
        return [Ready(actor, future.result() if error is None else ShardError(one_line(error)))]

    def _on_ended(self, actor: int, future: Future[Any]) -> list[Event]:
        error = future.exception()
        if isinstance(error, RayActorError):
            return self._dead(actor, error)
        if error is not None:  # what the worker returned could not be sent here
            return [Ended(actor, error=ShardError(one_line(error)))]
        got: _Outcome = future.result()
        for kind, times in got.survived.items():
            STANDING.survived(kind, times)
        return [Ended(actor, got.value, got.error, got.cpu_seconds, got.leaving, got.told, got.joules)]

    def _dead(self, actor: int, error: BaseException) -> list[Event]:
        if actor not in self._actors:
            return []  # stopped, or told already: every call that it still had brings the same news
        self.stop(actor)
        # First what it has left behind: an actor that had been told to go is not to blame for its death.
        last = self._open(self._mailbox.take(self._gang))
        excused = isinstance(error, RayActorError) and error.preempted
        return [*last, Lost(actor, _death(error), excused, _node_died(error))]

    def _ask_for_mail(self) -> None:
        now = self.now()
        if not self._asked and now - self._mailed >= _MAIL_SECONDS:
            self._asked, self._mailed = True, now
            self._watch(self._on_mail, -1, self._mailbox.ask(self._gang))

    def _on_mail(self, _: int, future: Future[Any]) -> list[Event]:
        self._asked = False
        return self._open(future.result()) if future.exception() is None else []

    def _open(self, mail: Mail) -> list[Event]:
        return [Told(got["actor"], got.get("told", {}), got.get("leaving", False)) for got in mail.reports]

    def _drains(self) -> list[Event]:
        now = self.now()
        if now - self._drained < _DRAIN_SECONDS:
            return []
        self._drained = now
        try:
            nodes = ray_state.get_draining_nodes()
        except (RayError, RuntimeError, OSError):
            return []  # the head can't be asked just now
        if nodes == self._draining:
            return []
        self._draining = nodes
        clock = time.time()
        return [Draining({node: end / 1000 - clock if end else None for node, end in nodes.items()})]


def _node_died(error: BaseException) -> bool:
    return "its node has died" in str(error)


def _death(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if lines and "creation task" in lines[0]:
        return f"its actor could not start: {lines[-1].strip()}"
    if _node_died(error):
        return "the node that its actor was on died"
    return "its actor died; it was killed or ran out of memory"
