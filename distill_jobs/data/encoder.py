"""Tabular rows as vectors: numeric columns standardised, categorical columns one-hot, fitted on the training rows.

Fitting is a map-reduce: each range of rows gives a ``Tally``, and tallies are merged in the order of the ranges, so
that the result does not depend on who counted what.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from cluster.errors import FileError
from cluster.files import Folder
from distill_jobs.data.rows import Rows
from distill_jobs.data.values import categories, numbers
from distill_jobs.errors import DataError
from distill_jobs.spec.parts import Tabular

ENCODER = "encoder.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of a column, in float64."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: np.ndarray) -> Self:
        if not len(values):
            return cls()
        mean = float(values.mean())
        return cls(len(values), mean, float(np.square(values - mean).sum()))

    def __add__(self, other: "Moments") -> "Moments":
        """Merge by the parallel formula of Chan, Golub and LeVeque (1979)."""
        count = self.count + other.count
        if not count:
            return self
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * other.count / count,
            self.squares + other.squares + delta * delta * self.count * other.count / count,
        )

    @property
    def deviation(self) -> float:
        """Standard deviation (of the population)."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


@dataclass
class Tally:
    """What a range of training rows contributes to the encoder."""

    moments: dict[str, Moments] = field(default_factory=dict)
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, rows: Rows, spec: Tabular) -> None:
        """Count in the rows, which must be training rows."""
        for name in spec.numeric:
            self.moments[name] = self.moments.get(name, Moments()) + Moments.of(numbers(rows, name))
        for name in spec.categorical:
            self.counts.setdefault(name, Counter()).update(categories(rows, name))

    def merge(self, other: "Tally") -> None:
        """Add the tally of the next range."""
        for name, moments in other.moments.items():
            self.moments[name] = self.moments.get(name, Moments()) + moments
        for name, counts in other.counts.items():
            self.counts.setdefault(name, Counter()).update(counts)

    def as_dict(self) -> dict[str, Any]:
        return {"moments": {n: vars(m) for n, m in self.moments.items()}, "counts": dict(self.counts)}

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        return cls(
            {name: Moments(**m) for name, m in values["moments"].items()},
            {name: Counter(c) for name, c in values["counts"].items()},
        )


@dataclass(frozen=True)
class Encoder:
    """A fitted encoder: raw columns to vectors of ``width`` numbers.

    A numeric column gives one number, (value - mean) / deviation. A categorical column gives one slot for each of its
    categories, sorted, and a slot "other" where training had more than ``max_categories`` of them. A value that
    training never saw goes to "other" where there is one, and sets no slot otherwise.
    """

    numeric: tuple[tuple[str, float, float], ...]
    categorical: tuple[tuple[str, tuple[str, ...], bool], ...]

    @classmethod
    def fit(cls, tally: Tally, spec: Tabular) -> Self:
        """From the merged tally of all training rows."""
        numeric = tuple((name, tally.moments[name].mean, _deviation(tally.moments[name])) for name in spec.numeric)
        categorical = []
        for name in spec.categorical:
            counts = tally.counts[name]
            kept = sorted(counts, key=lambda value, c=counts: (-c[value], value))[: spec.max_categories]  # type: ignore[misc]
            categorical.append((name, tuple(sorted(kept)), len(counts) > len(kept)))
        return cls(numeric, tuple(categorical))

    @property
    def columns(self) -> list[str]:
        """The raw columns it takes."""
        return [name for name, *_ in (*self.numeric, *self.categorical)]

    @property
    def names(self) -> list[str]:
        """What each number of the vector stands for: ``age``, ``sex=Female``, ``country=(other)``."""
        slots = [f"{name}={value}" for name, values, other in self.categorical for value in self._slots(values, other)]
        return [name for name, *_ in self.numeric] + slots

    @property
    def width(self) -> int:
        """D, the length of a vector."""
        return len(self.numeric) + sum(len(values) + other for _, values, other in self.categorical)

    def transform(self, columns: Mapping[str, np.ndarray | Sequence[Any]]) -> np.ndarray:
        """Encode raw columns, each [n] (numbers, strings or objects), as [n, D] float32.

        Raises:
            DataError: a column is missing, or a numeric one holds something that is no finite number.
        """
        missing = [name for name in self.columns if name not in columns]
        if missing:
            raise DataError(f"the input has no column {missing[0]!r}; it needs {', '.join(self.columns)}")
        lists = {name: list(columns[name]) for name in self.columns}
        count = len(next(iter(lists.values())))
        return self.encode(Rows(lists, [f"the input:{i + 1}" for i in range(count)]))

    def encode(self, rows: Rows) -> np.ndarray:
        """Encode rows that were read, as [n, D] float32; DataError names a row that can't be."""
        out = np.zeros((len(rows), self.width), dtype=np.float32)
        for at, (name, mean, deviation) in enumerate(self.numeric):
            out[:, at] = (numbers(rows, name) - mean) / deviation
        start = len(self.numeric)
        for name, values, other in self.categorical:
            slot_of = {value: start + i for i, value in enumerate(values)}
            unseen = start + len(values) if other else -1
            slots = np.array([slot_of.get(value, unseen) for value in categories(rows, name)], dtype=np.int64)
            known = np.flatnonzero(slots >= 0)
            out[known, slots[known]] = 1.0
            start += len(values) + other
        return out

    def save(self, folder: Folder) -> None:
        """Write ``encoder.json``."""
        folder.write_json(
            ENCODER,
            {
                "schema_version": SCHEMA_VERSION,
                "numeric": [{"column": n, "mean": m, "deviation": d} for n, m, d in self.numeric],
                "categorical": [{"column": n, "categories": list(v), "other": o} for n, v, o in self.categorical],
            },
        )

    @classmethod
    def load(cls, folder: Folder) -> Self:
        """Read ``encoder.json``; DataError when it is missing or not what ``save`` writes."""
        try:
            values = folder.read_json(ENCODER)
            if values["schema_version"] != SCHEMA_VERSION:
                raise TypeError
            return cls(
                tuple((str(c["column"]), float(c["mean"]), float(c["deviation"])) for c in values["numeric"]),
                tuple((str(c["column"]), tuple(c["categories"]), bool(c["other"])) for c in values["categorical"]),
            )
        except FileError as error:
            raise DataError(str(error)) from None
        except (TypeError, KeyError, ValueError):
            raise DataError(f"{folder}/{ENCODER} is not a valid encoder; prepare the data again") from None

    @staticmethod
    def _slots(values: tuple[str, ...], other: bool) -> list[str]:
        return [*values, "(other)"] if other else list(values)


def _deviation(moments: Moments) -> float:
    # A column that never varies carries nothing: leave it at zero instead of dividing rounding noise by itself.
    smallest = 1e-12 * max(1.0, abs(moments.mean))
    return moments.deviation if moments.deviation > smallest else 1.0
