"""A pseudorandom permutation of 0 … n-1 whose entries are computed one by one: nothing is held, whatever n is.

A Feistel network over a rectangle of a × b ≥ n cells (Black and Rogaway, "Ciphers with arbitrary finite domains",
2002): each round adds a hash of one coordinate to the other, which can be undone, so that the whole is a permutation;
cells beyond n are walked through until one inside is met. There are fewer than √n + 1 of them.
"""

import numpy as np

_ROUNDS = 8
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Permutation:
    """A permutation of range(``size``) fixed by ``key``, any integers."""

    def __init__(self, size: int, *key: int) -> None:
        assert size > 0
        self.size = size
        self._wide = int(np.ceil(np.sqrt(size)))
        self._high = -(-size // self._wide)
        seed = np.zeros(1, dtype=np.uint64)
        for word in key:
            seed = _hash(seed ^ np.uint64(word & 0xFFFFFFFFFFFFFFFF))
        self._keys = _hash(seed + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN)

    def __call__(self, at: np.ndarray) -> np.ndarray:
        """The entries [n] at the places ``at`` [n] in 0 … size-1, both int64."""
        found = self._walk(at)
        while (outside := found >= self.size).any():
            found[outside] = self._walk(found[outside])
        return found

    def _walk(self, at: np.ndarray) -> np.ndarray:
        wide, high = np.uint64(self._wide), np.uint64(self._high)
        row, column = np.divmod(at.astype(np.uint64), wide)
        for number in range(0, _ROUNDS, 2):
            row = (row + _hash(column + self._keys[number])) % high
            column = (column + _hash(row + self._keys[number + 1])) % wide
        return (row * wide + column).astype(np.int64)


def _hash(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: each bit of the result hangs on every bit of the value."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed
