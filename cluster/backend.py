"""What supervision asks of the place where actors live, and what it hears from there: no Ray here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.power import Machine


@dataclass(frozen=True)
class Placed:
    """An actor runs on a node, and makes its worker. ``age``: seconds since its process started."""

    actor: int
    node: str
    age: float = 0.0
    machine: Machine | None = None


@dataclass(frozen=True)
class Ready:
    """An actor has made its worker, or has failed to."""

    actor: int
    error: Exception | None = None


@dataclass(frozen=True)
class Ended:
    """A shard's outcome. ``leaving``: the actor has been told to go, and takes no other.

    ``cpu_seconds`` and ``joules`` (by the counter that measured them) are what its process burnt since the last one.
    """

    actor: int
    value: Any = None
    error: Exception | None = None
    cpu_seconds: float = 0.0
    leaving: bool = False
    told: Mapping[str, float] | None = None
    joules: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Lost:
    """An actor is dead. ``excused``: its node was taken away, as announced; ``node_died``: it died with its node."""

    actor: int
    cause: str
    excused: bool = False
    node_died: bool = False


@dataclass(frozen=True)
class Told:
    """What a worker tells of itself: totals so far; and whether its actor has been told to go."""

    actor: int
    numbers: Mapping[str, float]
    leaving: bool = False


@dataclass(frozen=True)
class Draining:
    """The nodes that will be taken away, and in how many seconds where that is known: all of them, at each change."""

    nodes: Mapping[str, float | None]


Event = Placed | Ready | Ended | Lost | Told | Draining


class Backend(Protocol):
    """Where actors live. Of a stopped actor no event comes any more."""

    def now(self) -> float:
        """Seconds of a clock that only goes forward."""

    def start(self, kind: int) -> int:
        """Ask for an actor of a kind; returns its number at once, wherever and whenever it will run."""

    def give(self, actor: int, shard: Any) -> None:
        """Have an actor that is ready work on a shard."""

    def leave(self, actor: int, seconds: float | None) -> None:
        """Tell a working actor to finish or hand back soon."""

    def stop(self, actor: int) -> None:
        """End an actor, whatever it is doing."""

    def events(self, timeout: float) -> Sequence[Event]:
        """What has happened; waits for something up to ``timeout`` seconds."""

    def shortage(self) -> str | None:
        """Why the actors that there must be can't be placed, should that be so."""
