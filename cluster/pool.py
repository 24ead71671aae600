"""What a map tells of itself: how far it has come, what it has lived through, and what it used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.meter import Usage
from cluster.schedule import Schedule
from cluster.standing import STANDING
from cluster.team import Team


@dataclass(frozen=True)
class Progress:
    """How far a map has come.

    Attributes:
        done, total: shards.
        actors, starting: actors that can work, and those that wait for room or make their worker.
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
    """What a map used and lived through.

    Attributes:
        usage: what its actors held, each from when it was placed until it was gone; ``cpu_seconds`` are measured in
            the actors, ``wall_seconds`` is that of the whole map.
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


class Tally:
    """Says on behalf of one map how this process stands.

    Attributes:
        lost_nodes: those that have died with an actor.
    """

    def __init__(self) -> None:
        self.lost_nodes = set[str]()
        self._said: dict[str, int] = {}

    def faults(self, schedule: Schedule, lost_actors: int) -> None:
        """Say which faults have been survived since the last call."""
        now = {
            "shards_retried": schedule.retried,
            "shards_handed_back": schedule.handed_back,
            "stragglers_duplicated": schedule.duplicated,
            "actors_lost": lost_actors,
            "nodes_lost": len(self.lost_nodes),
        }
        for kind, times in now.items():
            STANDING.survived(kind, times - self._said.get(kind, 0))
        self._said = now

    def numbers(self, schedule: Schedule, team: Team) -> None:
        """Say how far the map has come, and with how many actors."""
        STANDING.show("shards_done", schedule.done)
        STANDING.show("shards_total", schedule.total)
        STANDING.show("actors", team.ready)
        STANDING.show("actors_starting", len(team.members) - team.ready)


def named(shard: Any) -> str:
    """A shard in a message: what it is, not too long."""
    text = repr(shard)
    return text if len(text) <= 80 else text[:77] + "..."
