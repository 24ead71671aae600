"""Reading Arrow's metadata (flatbuffers) for many record batches at once, trusting none of it.

Every number in a file may be hostile, so that each position is checked against the piece of the file that it has to
lie in before anything is read there. All positions are numpy arrays [B], one entry for each of B tables of one kind:
a part of thousands of batches costs as many Python steps as a part of one.

The layout is the flatbuffers' own (https://flatbuffers.dev/internals): a table begins with the signed distance back to
its vtable; a vtable holds its own size, the table's size, and for each slot the distance from the table's start.
"""

from typing import Self

import numpy as np


class Damage(Exception):
    """What is wrong with the file, in a few words."""


class Tables:
    """B tables of one kind at the positions ``at`` [B] of ``raw``, each within ``start`` … ``stop`` [B]."""

    def __init__(self, raw: np.ndarray, at: np.ndarray, start: np.ndarray, stop: np.ndarray) -> None:
        self._raw, self._at, self._start, self._stop = raw, at, start, stop
        self._vtable = at - self._read(at, "<i4")
        self._size = self._read(self._vtable, "<u2")

    @classmethod
    def root(cls, raw: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Self:
        """The root tables of the B buffers ``raw[start:stop]``."""
        return cls(raw, start + read(raw, start, "<u4", start, stop), start, stop)

    def has(self, slot: int) -> np.ndarray:
        """Which of the tables carry this slot, [B] of bool."""
        return np.asarray(self._slot(slot) != 0)

    def scalar(self, slot: int, kind: str) -> np.ndarray:
        """The numbers in a slot, [B] int64; 0 where it is left out."""
        offset = self._slot(slot)
        # Where the slot is left out something is read all the same, and not used.
        return np.where(offset != 0, self._read(np.where(offset != 0, self._at + offset, self._start), kind), 0)

    def tables(self, slot: int) -> "Tables":
        """The tables that a slot points to."""
        return Tables(self._raw, self._pointed(slot), self._start, self._stop)

    def structs(self, slot: int, count: int, words: int) -> np.ndarray:
        """A vector of ``count`` structs of ``words`` 8-byte words in each table, [B, count, words] int64."""
        at = self._pointed(slot)
        lengths = self._read(at, "<u4")
        if (lengths != count).any():
            raise Damage(f"a list in its metadata has {lengths[lengths != count][0]} entries, not {count}")
        first, size = at + 4, 8 * words * count
        if (first + size > self._stop).any():
            raise Damage("a list in its metadata runs over its end")
        if not size:
            return np.zeros((len(at), 0, words), np.int64)
        found: np.ndarray = windows(self._raw, size)[first].view("<i8").reshape(len(at), count, words)
        return found

    def length(self, slot: int) -> np.ndarray:
        """How many entries the vector in a slot has, [B]; 0 where there is none."""
        there = self.has(slot)
        if not there.any():
            return np.zeros(len(self._at), np.int64)
        return self._read(self._pointed(slot), "<u4")

    def _pointed(self, slot: int) -> np.ndarray:
        offset = self._slot(slot)
        if (offset == 0).any():
            raise Damage("its metadata lack a field")
        at = self._at + offset
        return np.asarray(at + self._read(at, "<u4"))

    def _slot(self, slot: int) -> np.ndarray:
        at = 4 + 2 * slot
        known = self._size >= at + 2
        if not known.any():
            return np.zeros(len(self._at), np.int64)
        return np.where(known, self._read(np.where(known, self._vtable + at, self._vtable), "<u2"), 0)

    def _read(self, at: np.ndarray, kind: str) -> np.ndarray:
        return read(self._raw, at, kind, self._start, self._stop)


def read(raw: np.ndarray, at: np.ndarray, kind: str, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Numbers of type ``kind`` at the byte positions ``at`` [B], as int64 [B].

    Raises:
        Damage: a position lies outside ``start`` … ``stop``.
    """
    size = np.dtype(kind).itemsize
    if (at < start).any() or (at + size > stop).any():
        raise Damage("its metadata point outside themselves")
    return np.asarray(windows(raw, size)[at].view(kind)[:, 0], dtype=np.int64)


def windows(raw: np.ndarray, size: int) -> np.ndarray:
    """All runs of ``size`` bytes of ``raw``, [len(raw) - size + 1, size], without a copy; an index into it copies."""
    assert len(raw) >= size
    return np.ndarray((len(raw) - size + 1, size), np.uint8, raw.data, 0, (1, 1))
