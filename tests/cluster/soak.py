"""A soak: for minutes, one process after another of a capture is killed, and its driver is started again and again."""

import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
from capture_faults import PACE

KINDS = {
    "actor": re.compile(r"ray::_Actor"),
    "mailbox": re.compile(r"ray::_Box"),
    "agent": re.compile(r"ray::\w+Agent"),
    "raylet": re.compile(r"\S*/raylet\b"),
    "control store": re.compile(r"\S*/gcs_server\b"),
}
"""What a driver's family is made of, by the command lines of its processes; the driver itself comes beside them."""

# How often each is struck in a round, in random order: each kind for certain, and often what is often lost.
_ROUND = {"actor": 8, "mailbox": 1, "agent": 1, "raylet": 1, "control store": 1, "driver": 2}
_FATAL = {"agent", "raylet", "control store", "driver"}
"""Kinds whose death a driver need not survive (an embedded cluster has one node), nor the parts that are in flight."""
_ANYWHERE = 0.2  # the share of strikes that fall wherever the capture happens to be, in its start too
_PATIENCE = 150.0  # Ray alone takes 60 seconds to find that its control store is gone


def drive(folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Capture in a process of its own, with a Ray cluster of its own."""
    code = Path(__file__).with_name("capture_faults.py")
    return subprocess.Popen([sys.executable, str(code), str(folder)], env={**os.environ, **environment})


class Soak:
    """Strikes at a capture, nearly each time only after a part was committed since the last strike.

    So a slow machine is struck less often, but never so often that nothing is done in between; and a capture that does
    not get on any more after a kill is found out: no part in ``_PATIENCE`` seconds is an error.

    Args:
        folder: the job's, as ``make_job`` made it.
        parts: of the whole capture. Each is slowed down so that all of them together would take as long as the soak
            if nobody struck.

    Attributes:
        struck: how often a process was killed, by kind.
        awaited: strikes before each of which a part had been committed.
        drivers: how many were started.
    """

    def __init__(self, folder: Path, parts: int, actors: int, seed: int) -> None:
        self.folder, self.parts, self.actors = folder, parts, actors
        self.chance = random.Random(seed)
        self.struck: Counter[str] = Counter()
        self.awaited = self.drivers = 0
        self._cards: list[str] = []

    def run(self, seconds: float) -> None:
        """For so long at least, and until each kind was struck.

        Raises:
            AssertionError: a capture stops getting on, or its driver ends though nothing that it needs was killed.
        """
        end = time.monotonic() + seconds
        pace = f"{self.actors * seconds / self.parts:.3f}"
        while self._goes_on(end):
            driver = drive(self.folder, **{PACE: pace})
            self.drivers += 1
            try:
                self._torment(driver, end)
            finally:
                driver.kill()
                driver.wait(60)
        # Whoever was still at work was ended with it.
        self.struck["driver"] += 1

    def committed(self) -> int:
        """Parts that have their record."""
        return sum(1 for _ in (self.folder / "run/store/parts").glob("part-*.json"))

    def redone(self) -> int:
        """Attempts that were begun beyond the first of each part."""
        begun = (self.folder / "run/attempts").read_text().split()
        return len(begun) - len(set(begun))

    def in_flight(self) -> int:
        """Parts that were in flight on what was killed, at most."""
        lost = {"actor": 1, **dict.fromkeys(_FATAL, self.actors)}
        return sum(count * lost.get(kind, 0) for kind, count in self.struck.items())

    def _goes_on(self, end: float) -> bool:
        return time.monotonic() < end or not set(_ROUND) <= set(self.struck)

    def _torment(self, driver: subprocess.Popen[bytes], end: float) -> None:
        here: Counter[str] = Counter()
        seen = self.committed()
        while driver.poll() is None and self._goes_on(end):
            waits = self.chance.random() >= _ANYWHERE
            if waits and not self._gets_on(driver, seen, end, here):
                break
            time.sleep(self.chance.uniform(0, 3))
            seen = self.committed()
            kind = self._strike(driver.pid)
            if kind is not None:
                here[kind] += 1
                self.struck[kind] += 1
                self.awaited += waits
        code = driver.poll()
        assert code is None or _FATAL & set(here), f"a driver ended with {code} after no more than {dict(here)}"

    def _gets_on(self, driver: subprocess.Popen[bytes], seen: int, end: float, here: Counter[str]) -> bool:
        """Wait for a part; False where the driver or the soak ends before one."""
        patience = time.monotonic() + _PATIENCE
        while self.committed() == seen:
            if driver.poll() is not None or not self._goes_on(end):
                return False
            assert time.monotonic() < patience, f"no part in {_PATIENCE:g} s; killed of this driver: {dict(here)}"
            time.sleep(0.1)
        return True

    def _strike(self, driver: int) -> str | None:
        """Kill the process whose turn it is; its kind, None where there is none of that kind just now."""
        if not self._cards:
            self._cards = [kind for kind, count in _ROUND.items() for _ in range(count)]
            self.chance.shuffle(self._cards)
        kind = self._cards[-1]
        try:
            root = psutil.Process(driver)
            found = [root] if kind == "driver" else _family(root, KINDS[kind])
            if not found:
                return None
            self.chance.choice(found).kill()
        except psutil.NoSuchProcess:
            return None
        return self._cards.pop()


def _family(root: psutil.Process, looks: re.Pattern[str]) -> list[psutil.Process]:
    found = []
    for process in root.children(recursive=True):
        try:
            if looks.match(" ".join(process.cmdline())):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found
