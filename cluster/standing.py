"""How the work of this process stands: the faults it has survived, what it waits for, and its latest numbers.

Work says it here where it happens, and whoever shows it (a status file, the metrics) asks for it in its own time.
Saying so never waits and never raises. One process does one job at a time, which is why this is the module's own state.
In ranks ``listen`` sends the faults on to the driver; an actor's travel with its shards' results.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress

FAULTS = {
    "actors_lost": "actors lost",
    "nodes_lost": "nodes lost",
    "shards_retried": "shards tried again",
    "shards_handed_back": "shards handed back",
    "stragglers_duplicated": "slow shards given to a second actor",
    "rows_quarantined": "rows put into quarantine",
    "batches_halved": "batches halved for want of memory",
    "gang_restarts": "gangs started again",
    "gang_resizes": "gangs gone on with another size",
    "bad_steps": "bad training steps left out",
    "storage_faults": "storage faults waited out",
    "tracking_outages": "outages of the tracking server",
}
"""What can be survived, by the one name that it has in the status file, the metrics and the logs; and in words."""

_MOST_OBSERVED = 10_000

Key = tuple[str, str, tuple[tuple[str, str], ...]]
"""A number's name, the stage it is of, and its other tags."""


class Standing:
    """What is known of this process.

    Attributes:
        stage: the stage that numbers belong to from now on; empty between stages.
        waiting: what the work can't begin or go on without, in a sentence; None while it goes on.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.stage = ""
        self.waiting: str | None = None
        self._faults: Counter[str] = Counter()
        self._sums: dict[Key, float] = {}
        self._latest: dict[Key, float] = {}
        self._observed: deque[tuple[Key, float]] = deque(maxlen=_MOST_OBSERVED)
        self._send: Callable[[str, int], None] | None = None

    def survived(self, kind: str, times: int = 1) -> None:
        """A fault of ``FAULTS`` was survived so many times more."""
        assert kind in FAULTS, f"{kind} is no fault"
        if times <= 0:
            return
        with self._lock:
            self._faults[kind] += times
            send = self._send
        if send is not None:
            with suppress(Exception):
                send(kind, times)

    def faults(self) -> dict[str, int]:
        """All that was survived until now, by its name in ``FAULTS``."""
        with self._lock:
            return dict(self._faults)

    def show(self, name: str, value: float, **tags: str) -> None:
        """The latest value of a number."""
        with self._lock:
            self._latest[self._key(name, tags)] = float(value)

    def add(self, name: str, value: float, **tags: str) -> None:
        """So much more of something that only grows."""
        with self._lock:
            key = self._key(name, tags)
            self._sums[key] = self._sums.get(key, 0.0) + value

    def observe(self, name: str, value: float, **tags: str) -> None:
        """One of many values whose distribution counts; of those that nobody takes, the last ones are kept."""
        with self._lock:
            self._observed.append((self._key(name, tags), float(value)))

    def listen(self, send: Callable[[str, int], None] | None) -> None:
        """Have ``send(kind, times)`` called for each fault from now on."""
        self._send = send

    def latest(self) -> dict[Key, float]:
        """What was shown."""
        with self._lock:
            return dict(self._latest)

    def sums(self) -> Mapping[Key, float]:
        """What was added, in all."""
        with self._lock:
            return dict(self._sums)

    def observations(self) -> list[tuple[Key, float]]:
        """What was observed since the last call."""
        with self._lock:
            found = list(self._observed)
            self._observed.clear()
        return found

    def _key(self, name: str, tags: dict[str, str]) -> Key:
        return name, self.stage, tuple(sorted(tags.items()))


STANDING = Standing()
"""This process's."""


def in_words(faults: Mapping[str, int]) -> str:
    """``2 actors lost, 3 shards tried again``; empty where there were none."""
    return ", ".join(f"{faults[kind]:,} {words}" for kind, words in FAULTS.items() if faults.get(kind))
