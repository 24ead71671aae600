"""The actors of one map: of which crew each is, what it is doing, what it has told, and for how long it was held."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.meter import Usage


class Worker(Protocol):
    """What an actor holds, made once in it (so that a model is loaded once), and called shard after shard."""

    def run(self, shard: Any) -> Any:
        """Work through one shard. What it returns and raises is pickled."""


@dataclass(frozen=True)
class Crew:
    """Actors of one kind: how their worker is made, how many there may be, and what each holds.

    Attributes:
        make: makes the worker inside an actor, once.
        most, least: how many actors are asked for, and for how many the cluster must have room.
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


@dataclass
class Member:
    """One actor, from when it is asked for until it is gone."""

    kind: int
    node: str | None = None  # None: not placed yet
    since: float = 0.0
    ready: bool = False
    busy: bool = False
    leaving: bool = False
    told: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Kind:
    """A crew's state. Seconds are held as sums, so that no reading of them looks at every actor."""

    crew: Crew
    alive: int = 0
    placed: int = 0
    since: float = 0.0  # the sum over those placed
    gone_seconds: float = 0.0
    cpu_seconds: float = 0.0
    failed_starts: int = 0
    resume_at: float = float("-inf")
    idle: dict[int, None] = field(default_factory=dict)
    unplaced: dict[int, None] = field(default_factory=dict)

    def usage(self, now: float, wall: float) -> Usage:
        """What the crew has held by now."""
        held = self.gone_seconds + self.placed * now - self.since
        devices, accelerator = held * self.crew.gpus, self.crew.accelerator
        return Usage(
            device_seconds=devices,
            core_seconds=held * self.crew.cpus,
            cpu_seconds=self.cpu_seconds,
            wall_seconds=wall,
            by_accelerator={accelerator: devices} if accelerator is not None else {},
        )


class Team:
    """All actors of a map."""

    def __init__(self, crews: Sequence[Crew]) -> None:
        self.kinds = [Kind(crew) for crew in crews]
        self.members: dict[int, Member] = {}
        self.told: dict[str, float] = {}
        self.ready = 0

    @property
    def any_placed(self) -> bool:
        """Whether any actor runs somewhere, at work or making its worker."""
        return any(kind.placed for kind in self.kinds)

    def add(self, actor: int, kind: int, now: float) -> None:
        """An actor has been asked for."""
        self.members[actor] = Member(kind, since=now)
        self.kinds[kind].alive += 1
        self.kinds[kind].unplaced[actor] = None

    def place(self, actor: int, node: str, age: float, now: float) -> bool:
        """An actor runs on a node; returns whether it is still wanted.

        It has held its place since its process started (``age`` seconds ago), or since it was asked for, where Ray had
        a process in stock.
        """
        member = self.members.get(actor)
        if member is None:
            return False
        kind = self.kinds[member.kind]
        kind.unplaced.pop(actor)
        member.node, member.since = node, max(member.since, now - age)
        kind.placed += 1
        kind.since += member.since
        return True

    def rest(self, actor: int) -> None:
        """An actor is ready, and has nothing to do."""
        member = self.members[actor]
        self.ready += not member.ready
        member.ready, member.busy = True, False
        self.kinds[member.kind].idle[actor] = None

    def work(self, actor: int) -> None:
        """An actor has been given a shard."""
        member = self.members[actor]
        member.busy = True
        self.kinds[member.kind].idle.pop(actor, None)

    def tell(self, actor: int, numbers: Mapping[str, float]) -> None:
        """Take in an actor's totals in the place of its last ones."""
        member = self.members.get(actor)
        if member is None:
            return
        for name, value in numbers.items():
            self.told[name] = self.told.get(name, 0.0) + value - member.told.get(name, 0.0)
        member.told = {**member.told, **numbers}

    def remove(self, actor: int, now: float) -> None:
        """An actor is gone."""
        member = self.members.pop(actor)
        kind = self.kinds[member.kind]
        kind.alive -= 1
        kind.idle.pop(actor, None)
        kind.unplaced.pop(actor, None)
        self.ready -= member.ready
        if member.node is not None:
            kind.placed -= 1
            kind.since -= member.since
            kind.gone_seconds += now - member.since

    def usage(self, now: float, wall: float) -> tuple[Usage, dict[str, Usage]]:
        """What has been held by now, in all and by the crew's name; ``wall`` is the whole map's time."""
        by_crew = {kind.crew.name: kind.usage(now, wall) for kind in self.kinds}
        total = sum(by_crew.values(), Usage())
        return Usage.of({**total.as_dict(), "wall_seconds": wall}), by_crew
