"""The parts that a reader has mapped: the ones used last, as many as may be held at once."""

import math
from collections import OrderedDict
from collections.abc import Iterable

from distill_jobs.data.cache import PartCache
from distill_jobs.data.part_file import Part

_MOST = 256


class MappedParts:
    """Parts by their numbers.

    Args:
        cache: where they are mapped from. What is mapped can't leave it, so that a reader in no order must not map all
            that fits into it: no more than half of that is held.
    """

    def __init__(self, cache: PartCache | None) -> None:
        self._room = math.inf if cache is None else cache.limit / 2
        self._parts: OrderedDict[int, Part] = OrderedDict()
        self._current: frozenset[int] | None = None

    def get(self, number: int) -> Part | None:
        """The part, if it is held."""
        if number in self._parts:
            self._parts.move_to_end(number)
        return self._parts.get(number)

    def keep(self, number: int, part: Part) -> None:
        """Hold one more part, in place of those used longest ago where that is too much."""
        self._parts[number] = part
        while len(self._parts) > _MOST or (len(self._parts) > 1 and self._bytes() > self._room):
            self._parts.popitem(last=False)

    def drop(self, number: int) -> None:
        self._parts.pop(number, None)

    def enter(self, window: Iterable[int]) -> None:
        """These parts will be read from now on; the others are held until ``leave``, as rows in them may be due yet."""
        self._current = frozenset(window)

    def leave(self) -> None:
        """What was due is read: let go of all that are not of the window that was entered."""
        current, self._current = self._current, None
        for other in [] if current is None else self._parts.keys() - current:
            del self._parts[other]

    def _bytes(self) -> int:
        return sum(len(part.mapped) for part in self._parts.values())
