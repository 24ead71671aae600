"""Arrow's lists as plain arrays, and the documents in them. Types, nulls and lengths are checked, never believed.

Shapes: n rows, M inner lists of all of them together, W the longest inner list.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from distill_jobs.errors import DataError

MOST_WIDTH = 1 << 12
"""Entries of one position beyond which a file is not believed."""


def level(column: pa.Array, where: str) -> tuple[np.ndarray, pa.Array]:
    """Offsets [n + 1] from 0 of a list column, and its flat values."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        return np.arange(len(column) + 1, dtype=np.int64) * kind.list_size, column.flatten()
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise DataError(f"{where} should hold lists, not {kind}")
    # An empty list in place of one that is missing: what is listed there is judged later.
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), column.flatten()


def integers(flat: pa.Array, where: str) -> np.ndarray:
    if flat.null_count or not pa.types.is_integer(flat.type):
        raise DataError(f"{where}: ids should be integers without nulls, not {flat.type}")
    values = flat.to_numpy(zero_copy_only=False)
    if values.dtype == np.uint64 and len(values) and values.max() > np.iinfo(np.int64).max:
        raise DataError(f"{where}: an id is {values.max()}")
    return np.asarray(values, dtype=np.int64)


def reals(flat: pa.Array, where: str) -> np.ndarray:
    if flat.null_count or not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)):
        raise DataError(f"{where}: values should be numbers without nulls, not {flat.type}")
    return np.asarray(flat.to_numpy(zero_copy_only=False), dtype=np.float64)


def without_padding(starts: np.ndarray, ids: np.ndarray, pad: int | None) -> np.ndarray:
    """Length of each row [n] up to its last token that is not ``pad``."""
    lengths: np.ndarray = np.diff(starts)
    filled = lengths > 0
    if pad is None or not filled.any():
        return lengths
    last = np.where(ids != pad, np.arange(len(ids)), -1)
    kept = np.zeros_like(lengths)
    kept[filled] = np.maximum.reduceat(last, starts[:-1][filled]) + 1 - starts[:-1][filled]
    return kept.clip(min=0)


def padded(starts: np.ndarray, flat: np.ndarray, fill: float, where: str) -> np.ndarray:
    """Lists of unequal lengths as [M, W], W being the longest's."""
    lengths = np.diff(starts)
    width = int(lengths.max(initial=0))
    if width > MOST_WIDTH:
        raise DataError(f"{where}: a position lists {width:,} entries; {MOST_WIDTH:,} are the most")
    out = np.full((len(lengths), width), fill, dtype=flat.dtype)
    out[np.arange(width) < lengths[:, None]] = flat
    return out


def table(starts: np.ndarray, flat: pa.Array, where: str, kind: pa.DataType | None = None) -> np.ndarray:
    """Lists of one length as [M, length]."""
    lengths = np.diff(starts)
    if flat.null_count or (kind is not None and flat.type != kind):
        raise DataError(f"{where}: packed columns should hold {kind or 'numbers'} without nulls, not {flat.type}")
    if len(lengths) and lengths.min() != lengths.max():
        raise DataError(f"{where}: packed positions differ in length ({lengths.min()} and {lengths.max()} values)")
    values = flat.to_numpy(zero_copy_only=False)
    return np.asarray(values).reshape(len(lengths), int(lengths[0]) if len(lengths) else 0)


@dataclass(frozen=True)
class Documents:
    """Documents within rows, in order: the row of each, where in it the document begins, and its tokens; [D] each."""

    rows: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray

    @classmethod
    def marked(cls, starts: np.ndarray, marks: np.ndarray) -> "Documents":
        """Runs of one and the same number in ``marks`` [M], within the rows that begin at ``starts`` [n + 1]."""
        if not len(marks):
            return cls.joined([])
        edge = np.ones(len(marks), dtype=bool)
        edge[1:] = marks[1:] != marks[:-1]
        edge[starts[:-1][np.diff(starts) > 0]] = True
        first = np.flatnonzero(edge)
        lengths = np.diff(np.append(first, len(marks)))
        row = np.searchsorted(starts, first, side="right") - 1
        kept = marks[first] > 0
        return cls(row[kept], (first - starts[row])[kept], lengths[kept])

    @classmethod
    def joined(cls, some: list["Documents"]) -> "Documents":
        none = np.zeros(0, dtype=np.int64)
        columns = [[d.rows for d in some], [d.begins for d in some], [d.lengths for d in some]]
        return cls(*(np.concatenate([none, *column]) for column in columns))

    def after(self, rows: int) -> "Documents":
        """The same, when ``rows`` rows come before them."""
        return Documents(self.rows + rows, self.begins, self.lengths)

    def within(self, start: int, stop: int) -> "Documents":
        """Those in the rows ``start`` … ``stop``-1; the rows keep their numbers."""
        chosen = slice(*np.searchsorted(self.rows, [start, stop]))
        return Documents(self.rows[chosen], self.begins[chosen], self.lengths[chosen])
