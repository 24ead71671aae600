"""Who works on which shard, and what happens to a shard that fails: no Ray here, and no clock but the caller's.

Shards are numbers below ``total``. What is held grows with the shards in flight or failed, never with the total: the
rest is one cursor. Times are seconds of any clock that only goes forward.
"""

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

# A copy of a slow shard must promise to end well before it: by this factor of the usual duration, and not for less
# than this many seconds, which handing out a copy may cost.
_SLOW, _FLOOR_SECONDS = 1.5, 1.0
_LONGEST_PAUSE_SECONDS = 60.0
_DURATIONS_KEPT = 101


@dataclass
class Lease:
    """One actor's work on one shard."""

    shard: int
    actor: int
    kind: int
    began: float
    copy: bool = False


@dataclass
class _Pace:
    """How long shards take on actors of one kind."""

    durations: deque[float] = field(default_factory=lambda: deque(maxlen=_DURATIONS_KEPT))
    known: float | None = None

    def add(self, seconds: float) -> None:
        self.durations.append(seconds)
        self.known = None

    @property
    def median(self) -> float | None:
        if self.known is None and self.durations:
            self.known = median(self.durations)
        return self.known


class Schedule:
    """The book of one map.

    Args:
        total: how many shards.
        kinds: how many kinds of actors; every actor is of one of them, and each kind has its own pace.
        retries: how often a shard may fail and be tried again.

    Attributes:
        lasted: seconds that the shard took which was finished last.
    """

    def __init__(self, total: int, kinds: int = 1, retries: int = 3) -> None:
        self.total, self.retries = total, retries
        self.done = self.retried = self.handed_back = self.duplicated = 0
        self.lasted = 0.0
        self._wasted = [0.0] * kinds
        self._next = 0
        self._back: list[tuple[float, int]] = []  # when it may be tried again, shard
        self._failures: dict[int, int] = {}
        self._leases: dict[int, Lease] = {}  # by actor; a lease whose shard somebody else has ended stays until it ends
        self._runs: dict[int, list[Lease]] = {}  # by shard; one or two
        # Shards that run once, by kind and in the order in which they began: those that may be copied.
        self._single: list[dict[int, Lease]] = [{} for _ in range(kinds)]
        self._paces = [_Pace() for _ in range(kinds)]

    @property
    def open(self) -> int:
        """Shards that are not done."""
        return self.total - self.done

    @property
    def untouched(self) -> int:
        """Shards that nobody has been given yet."""
        return self.total - self._next

    def take(self, actor: int, kind: int, now: float) -> int | None:
        """Give ``actor`` its next shard: one that has come back, or a fresh one, or else a copy of a slow one."""
        assert actor not in self._leases, "an actor works on one shard at a time"
        if self._back and self._back[0][0] <= now:
            shard = heapq.heappop(self._back)[1]
        elif self._next < self.total:
            shard, self._next = self._next, self._next + 1
        else:
            return None if self._back else self._copy(actor, kind, now)
        self._lease(Lease(shard, actor, kind, now))
        return shard

    def wake_at(self, kinds: Iterator[int] | list[int], now: float) -> float | None:
        """When idle actors of these kinds may find something to take, should nothing else happen; None: never."""
        if self._next < self.total:
            return now
        if self._back:
            return max(now, self._back[0][0])
        times = [time for kind in kinds if (time := self._copy_at(kind, now)) is not None]
        return max(now, min(times)) if times else None

    def finish(self, actor: int, now: float) -> int | None:
        """``actor`` has a result; returns its shard, or None where another actor's result of it came first."""
        held, lease = self._leases.get(actor), self._end(actor)
        if lease is None:
            self._waste(held, now)
            return None
        shard = lease.shard
        self.lasted = now - lease.began
        self._paces[lease.kind].add(self.lasted)
        for other in self._runs.pop(shard):
            self._single[other.kind].pop(shard, None)
        self._failures.pop(shard, None)
        self.done += 1
        return shard

    def hand_back(self, actor: int, now: float) -> None:
        """``actor`` has given its shard back, or was lost through no fault of the shard's: no retry is counted."""
        self._waste(self._leases.get(actor), now)
        lease = self._end(actor)
        if lease is not None and self._drop(lease):
            self.handed_back += 1
            heapq.heappush(self._back, (now, lease.shard))

    def fail(self, actor: int, now: float, pause: float = 0.0) -> tuple[int, int] | None:
        """``actor`` has failed at its shard, which is tried again after ``pause`` seconds, doubled with each failure.

        Returns:
            the shard and how often it has failed by now, when that is more than the retries allow; else None. A copy's
            failure costs nothing while the other copy runs, nor does one whose shard is done.
        """
        self._waste(self._leases.get(actor), now)
        lease = self._end(actor)
        if lease is None or not self._drop(lease):
            return None
        shard = lease.shard
        failures = self._failures[shard] = self._failures.get(shard, 0) + 1
        if failures > self.retries:
            return shard, failures
        self.retried += 1
        heapq.heappush(self._back, (now + _pause(shard, failures, pause), shard))
        return None

    def shard_of(self, actor: int) -> int | None:
        """What an actor works on; None when nothing, or nothing that still counts."""
        lease = self._leases.get(actor)
        return lease.shard if lease is not None and lease in self._runs.get(lease.shard, ()) else None

    def wasted(self, now: float) -> list[float]:
        """Seconds of each kind's actors on shards that they failed at, gave back, or that another had ended first."""
        found = list(self._wasted)
        for lease in self._leases.values():
            if not any(lease is run for run in self._runs.get(lease.shard, ())):
                found[lease.kind] += now - lease.began
        return found

    def _waste(self, lease: Lease | None, now: float) -> None:
        if lease is not None:
            self._wasted[lease.kind] += now - lease.began

    def _lease(self, lease: Lease) -> None:
        self._leases[lease.actor] = lease
        self._runs.setdefault(lease.shard, []).append(lease)
        if not lease.copy:
            self._single[lease.kind][lease.shard] = lease

    def _end(self, actor: int) -> Lease | None:
        """Close an actor's lease; None when it had none, or none that counts any more."""
        lease = self._leases.pop(actor, None)
        return lease if lease is not None and any(lease is run for run in self._runs.get(lease.shard, ())) else None

    def _drop(self, lease: Lease) -> bool:
        """Take a lease off its shard; returns whether nobody works on that any more."""
        runs = self._runs[lease.shard]
        runs[:] = [run for run in runs if run is not lease]
        self._single[lease.kind].pop(lease.shard, None)
        if runs:
            self._single[runs[0].kind][lease.shard] = runs[0]
            return False
        del self._runs[lease.shard]
        return True

    def _copy(self, actor: int, kind: int, now: float) -> int | None:
        for held, lease in self._candidates():
            at = self._worth_from(lease, held, kind, now)
            if at is not None and at <= now:
                del self._single[held][lease.shard]
                self._lease(Lease(lease.shard, actor, kind, now, copy=True))
                self.duplicated += 1
                return lease.shard
        return None

    def _copy_at(self, kind: int, now: float) -> float | None:
        times = [self._worth_from(lease, held, kind, now) for held, lease in self._candidates()]
        return min((time for time in times if time is not None), default=None)

    def _candidates(self) -> Iterator[tuple[int, Lease]]:
        """Of each kind the shard that has run longest, and the one that has longest to go."""
        for held, running in enumerate(self._single):
            if running:
                yield held, next(iter(running.values()))
                yield held, next(reversed(running.values()))

    def _worth_from(self, lease: Lease, held: int, kind: int, now: float) -> float | None:
        """From when on a copy by an idle actor of ``kind`` would be expected to end well before the running one."""
        mine, theirs = self._paces[kind].median, self._paces[held].median
        if theirs is not None and mine is not None and lease.began + theirs - now > max(_SLOW * mine, _FLOOR_SECONDS):
            return now
        usual = mine if theirs is None else theirs
        return None if usual is None else lease.began + max(_SLOW * usual, _FLOOR_SECONDS)


def _pause(shard: int, failures: int, base: float) -> float:
    # Spread by the shard's number, so that a thousand shards that failed together don't come back together.
    spread = 0.5 + (shard * 2654435761 % 4294967296) / 4294967296
    return min(base * 2.0 ** (failures - 1) * spread, _LONGEST_PAUSE_SECONDS)
