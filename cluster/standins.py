"""Stand-ins for Ray's actors, for the real supervising loop: virtual time, random durations, deaths and drains."""

import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.backend import Draining, Ended, Event, Lost, Placed, Ready, Told
from cluster.errors import ShardError
from cluster.notice import HandBack


@dataclass
class Nature:
    """How actors of a kind behave: median seconds a shard, its spread, and chances of faults at each shard."""

    seconds: float = 1.0
    spread: float = 0.1
    death: float = 0.0
    failure: float = 0.0
    start_seconds: float = 5.0
    room: int = 1 << 30


@dataclass
class StandIns:
    """A backend without processes: a heap of what will happen when, and a clock that jumps there."""

    natures: Sequence[Nature]
    seed: int = 0
    fate: Callable[[int, Any], str | None] = lambda _kind, _shard: None
    time: float = 0.0
    ran: dict[int, int] = field(default_factory=dict)  # shards begun, by kind
    short: str | None = None
    left: list[tuple[int, float | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.heap: list[tuple[float, int, Event]] = []
        self.kinds: dict[int, int] = {}
        self.waiting: list[list[int]] = [[] for _ in self.natures]
        self.running = [0] * len(self.natures)
        self.count = self.order = self.reads = 0

    def now(self) -> float:
        return self.time

    def at(self, seconds: float, event: Event) -> None:
        self.order += 1
        heapq.heappush(self.heap, (self.time + seconds, self.order, event))

    def start(self, kind: int) -> int:
        actor, self.count = self.count, self.count + 1
        self.kinds[actor] = kind
        self.waiting[kind].append(actor)
        self.settle(kind)
        return actor

    def settle(self, kind: int) -> None:
        """Place actors that wait, as far as there is room."""
        nature = self.natures[kind]
        while self.waiting[kind] and self.running[kind] < nature.room:
            actor = self.waiting[kind].pop(0)
            if actor in self.kinds:
                self.running[kind] += 1
                self.at(0.1, Placed(actor, f"node-{actor % 100}"))
                self.at(nature.start_seconds, Ready(actor))

    def give(self, actor: int, shard: Any) -> None:
        kind = self.kinds[actor]
        nature = self.natures[kind]
        self.ran[kind] = self.ran.get(kind, 0) + 1
        seconds = nature.seconds * self.random.lognormvariate(0, nature.spread)
        chance = self.random.random()
        fate = self.fate(kind, shard)
        if fate == "slow":
            seconds *= 100
        if fate == "die" or chance < nature.death:
            self.at(seconds / 2, Lost(actor, "it died"))
        elif fate == "preempted":
            self.at(seconds / 2, Lost(actor, "it was taken away", excused=True))
        elif fate == "raise" or chance < nature.death + nature.failure:
            self.at(seconds / 2, Ended(actor, error=ShardError("no luck")))
        elif fate == "hand back":
            self.at(seconds / 2, Ended(actor, error=HandBack(), leaving=True))
        else:
            self.at(seconds, Ended(actor, value=shard, cpu_seconds=seconds))

    def leave(self, actor: int, seconds: float | None) -> None:
        self.left.append((actor, seconds))

    def stop(self, actor: int) -> None:
        self._gone(actor)

    def drain(self, seconds: float, nodes: Mapping[str, float | None]) -> None:
        self.at(seconds, Draining(nodes))

    def tell(self, seconds: float, actor: int, **numbers: float) -> None:
        self.at(seconds, Told(actor, numbers))

    def shortage(self) -> str | None:
        return self.short

    def events(self, timeout: float) -> list[Event]:
        self.reads += 1
        end = self.time + timeout
        while self.heap and self.heap[0][0] <= end:
            self.time, _, event = heapq.heappop(self.heap)
            if isinstance(event, Draining):
                return [event]
            if event.actor in self.kinds:
                if isinstance(event, Lost):
                    self._gone(event.actor)
                return [event]
        self.time = end
        return []

    def _gone(self, actor: int) -> None:
        kind = self.kinds.pop(actor)
        if actor in self.waiting[kind]:
            self.waiting[kind].remove(actor)
        else:
            self.running[kind] -= 1
            self.settle(kind)
