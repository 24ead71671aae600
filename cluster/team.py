"""The actors of one map: of which crew each is, what it is doing, what it has told, and for how long it was held."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.meter import Usage
from cluster.power import Machine, parts_of


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
    place: "Place | None" = None
    since: float = 0.0
    ready: bool = False
    busy: bool = False
    leaving: bool = False
    told: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Place:
    """What a crew's actors hold and burn on one machine. Held as sums, so that no reading looks at every actor."""

    machine: Machine | None
    placed: int = 0
    since: float = 0.0  # the sum over those placed
    gone_seconds: float = 0.0
    cpu_seconds: float = 0.0
    joules: dict[str, float] = field(default_factory=dict)

    def held(self, now: float) -> float:
        """Seconds times actors."""
        return self.gone_seconds + self.placed * now - self.since


@dataclass
class Kind:
    """A crew's state. ``wasted``: seconds of actors whose start came to nothing."""

    crew: Crew
    alive: int = 0
    wasted: float = 0.0
    places: dict[Machine | None, Place] = field(default_factory=dict)
    failed_starts: int = 0
    resume_at: float = float("-inf")
    idle: dict[int, None] = field(default_factory=dict)
    unplaced: dict[int, None] = field(default_factory=dict)

    @property
    def placed(self) -> int:
        return sum(place.placed for place in self.places.values())

    def usage(self, now: float, wall: float, wasted: float) -> Usage:
        """What the crew has held by now, of which ``wasted`` seconds of its actors came to nothing."""
        crew, places = self.crew, self.places.values()
        held = sum(place.held(now) for place in places)
        devices, wasted = held * crew.gpus, wasted + self.wasted
        parts = tuple(
            part
            for place in places
            if place.machine is not None
            for part in parts_of(
                place.machine,
                place.held(now) * crew.cpus,
                place.held(now) * crew.gpus,
                place.cpu_seconds,
                place.joules,
            )
        )
        return Usage(
            device_seconds=devices,
            core_seconds=held * crew.cpus,
            cpu_seconds=sum(place.cpu_seconds for place in places),
            wall_seconds=wall,
            wasted_core_seconds=wasted * crew.cpus,
            wasted_device_seconds=wasted * crew.gpus,
            by_accelerator={crew.accelerator: devices} if crew.accelerator is not None else {},
            parts=parts,
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

    def place(self, actor: int, node: str, age: float, now: float, machine: Machine | None = None) -> bool:
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
        member.place = place = kind.places.setdefault(machine, Place(machine))
        place.placed += 1
        place.since += member.since
        return True

    def burn(self, actor: int, cpu_seconds: float, joules: Mapping[str, float]) -> None:
        """An actor has burnt so much since it last said so."""
        place = self.members[actor].place
        if place is None:
            return
        place.cpu_seconds += cpu_seconds
        for name, value in joules.items():
            place.joules[name] = place.joules.get(name, 0.0) + value

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

    def remove(self, actor: int, now: float, failed: bool = False) -> None:
        """An actor is gone; ``failed`` where its start came to nothing."""
        member = self.members.pop(actor)
        kind = self.kinds[member.kind]
        kind.alive -= 1
        kind.idle.pop(actor, None)
        kind.unplaced.pop(actor, None)
        self.ready -= member.ready
        if member.place is not None:
            member.place.placed -= 1
            member.place.since -= member.since
            member.place.gone_seconds += now - member.since
            if failed:
                kind.wasted += now - member.since

    def usage(self, now: float, wall: float, wasted: Sequence[float]) -> tuple[Usage, dict[str, Usage]]:
        """What has been held by now, in all and by the crew's name.

        Args:
            wall: the whole map's time.
            wasted: seconds of each kind's actors on shards that came to nothing.
        """
        kinds = zip(self.kinds, wasted, strict=True)
        by_crew = {kind.crew.name: kind.usage(now, wall, lost) for kind, lost in kinds}
        total = sum(by_crew.values(), Usage())
        return Usage.of({**total.as_dict(), "wall_seconds": wall}), by_crew
