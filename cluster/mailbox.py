"""How ranks speak to the driver while they run: a small actor that holds what they said until the driver asks.

Ranks on any node can reach it, and a slow driver never slows them: leaving a message is one call that nobody awaits.
"""

import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.power import Machine

_FLUSH_SECONDS = 10.0
_ASK_SECONDS = 1.0


@dataclass
class Mail:
    """What has come in from one gang since the driver last asked.

    Attributes:
        reports, failures: what ranks said, and which errors have ended them.
        notes: what is to be told to the user.
        waits: what the gang waits for, in the last of the notes that said so.
        survived: faults that ranks have survived, by their names in ``cluster.standing``.
        ranks: those that have started; of each start of the gang the number of them stands in ``sizes``.
        machines: where each of them has started.
        burnt: of each rank that came to its end its machine, and the processor seconds and joules of its process.
        kept, left: whether all that was done until now has been saved, and the gang has left after that.
    """

    reports: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[int, Exception]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    waits: str | None = None
    survived: Counter[str] = field(default_factory=Counter)
    ranks: list[ActorHandle] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    machines: list[Machine] = field(default_factory=list)
    burnt: list[tuple[Machine, float, dict[str, float]]] = field(default_factory=list)
    kept: bool = False
    left: bool = False


class _Box:
    """The actor: one ``Mail`` for each gang."""

    def __init__(self) -> None:
        self.mail: dict[str, Mail] = {}
        self.stopped: set[str] = set()
        self.asked: set[str] = set()

    def report(self, gang: str, values: dict[str, Any]) -> None:
        self.mail.setdefault(gang, Mail()).reports.append(values)

    def fail(self, gang: str, rank: int, error: Exception) -> None:
        self.mail.setdefault(gang, Mail()).failures.append((rank, error))

    def note(self, gang: str, text: str) -> None:
        self.mail.setdefault(gang, Mail()).notes.append(text)

    def wait(self, gang: str, text: str) -> None:
        self.note(gang, text)
        self.mail[gang].waits = text

    def survived(self, gang: str, kind: str, times: int) -> None:
        self.mail.setdefault(gang, Mail()).survived[kind] += times

    def burnt(self, gang: str, machine: Machine, cpu_seconds: float, joules: dict[str, float]) -> None:
        self.mail.setdefault(gang, Mail()).burnt.append((machine, cpu_seconds, joules))

    def kept(self, gang: str, left: bool) -> None:
        mail = self.mail.setdefault(gang, Mail())
        mail.kept, mail.left = True, mail.left or left

    def join(self, gang: str, handle: ActorHandle, rank: int, world: int, machine: Machine) -> bool:
        """A rank has started; returns whether its gang has been stopped already."""
        mail = self.mail.setdefault(gang, Mail())
        mail.ranks.append(handle)
        mail.machines.append(machine)
        if rank == 0:
            # What ended the start before this one is overcome.
            mail.failures.clear()
            mail.sizes.append(world)
            self.asked.discard(gang)
        return gang in self.stopped

    def stop(self, gang: str) -> None:
        self.stopped.add(gang)

    def was_stopped(self, gang: str) -> bool:
        return gang in self.stopped

    def ask(self, gang: str) -> None:
        self.asked.add(gang)

    def was_asked(self, gang: str) -> bool:
        return gang in self.asked

    def take(self, gang: str) -> Mail:
        return self.mail.pop(gang, Mail())


class Mailbox:
    """The driver's side."""

    def __init__(self) -> None:
        # Beside the driver: on another node it would be lost with that, and no rank could join any more.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        box = ray.remote(_Box).options(num_cpus=0, max_pending_calls=10_000, scheduling_strategy=here)
        self._actor = box.remote()

    def slot(self, gang: str) -> "Slot":
        """What a rank of ``gang`` gets to write to."""
        return Slot(self._actor, gang)

    def take(self, gang: str) -> Mail:
        """All that has come in since the last call, oldest first; nothing from a box that has died."""
        try:
            mail: Mail = ray.get(self._actor.take.remote(gang))
        except RayError:
            return Mail()
        return mail

    def ask(self, gang: str) -> Any:
        """The same without waiting: Ray's reference to the mail."""
        return self._actor.take.remote(gang)

    def leave(self, gang: str) -> None:
        """Ask the ranks of ``gang`` to save what they have done, and to end; they don't come back."""
        self.stop(gang)
        with contextlib.suppress(RayError):
            self._actor.ask.remote(gang)

    def stop(self, gang: str) -> None:
        """Turn away ranks of ``gang`` that have not joined yet."""
        with contextlib.suppress(RayError):
            ray.get(self._actor.stop.remote(gang))

    def alive(self) -> bool:
        """Whether the actor answers."""
        try:
            ray.get(self._actor.take.remote(""), timeout=_FLUSH_SECONDS)
        except RayError:
            return False
        return True


class Slot:
    """A rank's side; picklable."""

    def __init__(self, actor: ActorHandle, gang: str) -> None:
        self._actor, self._gang = actor, gang
        self._answer: Any = None
        self._next = 0.0

    def report(self, values: dict[str, Any]) -> None:
        """Leave a message; never waits and never raises, since training must not stand on its display."""
        with contextlib.suppress(Exception):
            self._actor.report.remote(self._gang, values)

    def fail(self, rank: int, error: Exception) -> None:
        """Leave the error that ends this rank, and wait until it has arrived."""
        with contextlib.suppress(Exception):
            ray.get(self._actor.fail.remote(self._gang, rank, error), timeout=_FLUSH_SECONDS)

    def note(self, text: str) -> None:
        """Leave a sentence for the user; never waits and never raises."""
        with contextlib.suppress(Exception):
            self._actor.note.remote(self._gang, text)

    def wait(self, text: str) -> None:
        """The same of a sentence that says what the gang waits for."""
        with contextlib.suppress(Exception):
            self._actor.wait.remote(self._gang, text)

    def survived(self, kind: str, times: int) -> None:
        """Say that this process has survived a fault; never waits and never raises."""
        with contextlib.suppress(Exception):
            self._actor.survived.remote(self._gang, kind, times)

    def join(self, rank: int, world: int, machine: Machine) -> bool:
        """Say that this rank of ``world`` has started; False when its gang has been stopped meanwhile."""
        me = ray.get_runtime_context().current_actor
        return not ray.get(self._actor.join.remote(self._gang, me, rank, world, machine), timeout=_FLUSH_SECONDS)

    def burnt(self, machine: Machine, cpu_seconds: float, joules: dict[str, float]) -> None:
        """Leave what this process has burnt, and wait until it has arrived."""
        with contextlib.suppress(Exception):
            ray.get(self._actor.burnt.remote(self._gang, machine, cpu_seconds, joules), timeout=_FLUSH_SECONDS)

    def kept(self, left: bool = False) -> None:
        """Say that what the gang has done until now is saved, and it leaves; never waits and never raises."""
        with contextlib.suppress(Exception):
            self._actor.kept.remote(self._gang, left)

    def stopped(self) -> bool:
        """Whether the driver has stopped the gang; False also where nobody answers."""
        with contextlib.suppress(Exception):
            return bool(ray.get(self._actor.was_stopped.remote(self._gang), timeout=_FLUSH_SECONDS))
        return False

    def ask(self) -> None:
        """Ask the gang to leave, from outside it; never waits and never raises."""
        with contextlib.suppress(Exception):
            self._actor.ask.remote(self._gang)

    def asked(self) -> bool:
        """Whether somebody has asked the gang to leave, as of about a second ago; never waits and never raises."""
        now = time.monotonic()
        with contextlib.suppress(Exception):
            if self._answer is None:
                if now >= self._next:
                    self._answer, self._next = self._actor.was_asked.remote(self._gang), now + _ASK_SECONDS
            elif ray.wait([self._answer], timeout=0)[0]:
                answer, self._answer = self._answer, None
                return bool(ray.get(answer))
        return False

    def flush(self) -> None:
        """Wait until everything this process has left so far has arrived (an actor takes calls in order)."""
        with contextlib.suppress(Exception):
            ray.get(self._actor.take.remote(""), timeout=_FLUSH_SECONDS)
