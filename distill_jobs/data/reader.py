"""Rows of a table by their numbers: memory-mapped, opened lazily, never the whole table in memory."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.errors import FileError
from cluster.files import Folder
from distill_jobs.data.table import MANIFEST
from distill_jobs.errors import DataError, DistillError

_CACHED_BATCHES = 256
_OPEN_PARTS = 64


class TableReader:
    """A complete table. Rows are numbered 0 … ``rows``-1 through all its parts in order.

    Reading runs no code from the file, and whatever is wrong with a file comes out as ``error`` with one sentence.

    Attributes:
        facts: the manifest as it was written.
        rows: rows in the table.
    """

    def __init__(self, folder: Folder, error: type[DistillError] = DataError) -> None:
        self.folder, self._error = folder, error
        self.facts = self._manifest()
        self._part_rows = np.asarray(self.facts["part_rows"], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._part_rows)])
        self.rows = int(self._starts[-1])
        self._rows_per_batch = int(self.facts["rows_per_batch"])
        self._files: OrderedDict[int, pa.RecordBatchFileReader] = OrderedDict()
        self._batches: OrderedDict[tuple[int, int], _Columns] = OrderedDict()

    @property
    def parts(self) -> int:
        """Number of parts, those without rows included."""
        return len(self._part_rows)

    @property
    def schema(self) -> pa.Schema:
        """The schema of the first part that has rows; StoreError or DataError when none has."""
        filled = np.flatnonzero(self._part_rows)
        if not len(filled):
            raise self._error(f"{self.folder} holds no rows")
        return self._open(int(filled[0])).schema

    def part_of(self, index: int) -> int:
        """The part in which global row ``index`` lies."""
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows} in {self.folder}")
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def part_range(self, part: int) -> range:
        """The global row numbers of a part."""
        return range(int(self._starts[part]), int(self._starts[part + 1]))

    def take(self, indices: np.ndarray, columns: list[str] | None = None) -> dict[str, np.ndarray]:
        """The rows ``indices`` (any order, repeats allowed), as one array for each column.

        Args:
            indices: [n] global row numbers.
            columns: names to read; None reads all.

        Returns:
            [n] for a plain column, [n, width] for a fixed-size list; text as arrays of objects.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= self.rows):
            raise IndexError(f"rows {indices.min()}…{indices.max()} of {self.rows} in {self.folder}")
        if not len(indices):
            return _empty(self.schema, columns)
        part = np.searchsorted(self._starts, indices, side="right") - 1
        within = indices - self._starts[part]
        batch, row = np.divmod(within, self._rows_per_batch)
        order = np.lexsort((batch, part))
        keys = np.stack([part[order], batch[order]], axis=1)
        groups = np.split(order, np.flatnonzero(np.any(keys[1:] != keys[:-1], axis=1)) + 1)
        taken: dict[str, np.ndarray] = {}
        for group in groups:
            held = self._batch(int(part[group[0]]), int(batch[group[0]]))
            for name in held.names if columns is None else columns:
                values = held.array(name)
                if name not in taken:
                    taken[name] = np.empty((len(indices), *values.shape[1:]), dtype=values.dtype)
                self._put(taken[name], group, values, row[group], name)
        return taken

    def batches(self, part: int) -> Iterator[pa.RecordBatch]:
        """The record batches of one part in order; none for a part without rows."""
        rows = int(self._part_rows[part])
        for number in range(-(-rows // self._rows_per_batch)):
            yield self._read(part, number)

    def _put(self, out: np.ndarray, group: np.ndarray, values: np.ndarray, rows: np.ndarray, name: str) -> None:
        if values.shape[1:] != out.shape[1:] or values.dtype != out.dtype:
            raise self._error(f"{self.folder}: column {name} has one type in one part and another in the next")
        out[group] = values[rows]

    def _batch(self, part: int, number: int) -> "_Columns":
        key = (part, number)
        held = self._batches.get(key)
        if held is None:
            held = self._batches[key] = _Columns(self._read(part, number), f"{self.folder}", self._error)
            if len(self._batches) > _CACHED_BATCHES:
                self._batches.popitem(last=False)
        else:
            self._batches.move_to_end(key)
        return held

    def _read(self, part: int, number: int) -> pa.RecordBatch:
        expected = min(self._rows_per_batch, int(self._part_rows[part]) - number * self._rows_per_batch)
        where = f"{self.folder}/{self.facts['part_files'][part]}"
        try:
            batch = self._open(part).get_batch(number)
            batch.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._error(f"{where} is damaged (record batch {number}: {_flat(error)}); make it again") from None
        if batch.num_rows != expected:
            raise self._error(f"{where} is damaged: {batch.num_rows} rows in record batch {number}, not {expected}")
        return batch

    def _open(self, part: int) -> pa.RecordBatchFileReader:
        if part in self._files:
            self._files.move_to_end(part)
            return self._files[part]
        name, rows = self.facts["part_files"][part], int(self._part_rows[part])
        where = f"{self.folder}/{name}"
        try:
            reader = pa.ipc.open_file(self.folder.open(name))
        except (FileError, pa.ArrowException, OSError, ValueError) as error:
            raise self._error(f"can't read part {part} of {self.folder} ({_flat(error)}); make it again") from None
        if reader.num_record_batches != -(-rows // self._rows_per_batch):
            raise self._error(f"{where} is damaged: its record batches don't add up to the {rows} rows promised")
        self._files[part] = reader
        if len(self._files) > _OPEN_PARTS:
            self._files.popitem(last=False)
        return reader

    def _manifest(self) -> dict[str, Any]:
        if not self.folder.exists(MANIFEST):
            raise self._error(f"{self.folder} is not complete: it has no {MANIFEST}")
        try:
            facts = self.folder.read_json(MANIFEST)
        except FileError as error:
            raise self._error(str(error)) from None
        try:
            rows, files, size = facts["part_rows"], facts["part_files"], facts["rows_per_batch"]
            whole = all(_count(n) for n in rows) and _count(size) and size > 0 and len(rows) == len(files)
            safe = all(f is None or (f.startswith("part-") and "/" not in f) for f in files)
            if not whole or not safe or any((f is None) != (n == 0) for f, n in zip(files, rows, strict=True)):
                raise TypeError
        except (TypeError, KeyError, AttributeError):
            raise self._error(f"{self.folder}/{MANIFEST} is not a valid manifest; make the table again") from None
        return dict(facts)


class _Columns:
    """One record batch, its columns turned into arrays when they are asked for."""

    def __init__(self, batch: pa.RecordBatch, where: str, error: type[DistillError]) -> None:
        self._batch, self._where, self._error = batch, where, error
        self._arrays: dict[str, np.ndarray] = {}
        self.names: list[str] = batch.schema.names

    def array(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            if name not in self.names:
                raise self._error(f"{self._where} has no column {name}; it has {', '.join(self.names)}")
            column = self._batch.column(name)
            if column.null_count:
                raise self._error(f"{self._where} is damaged: column {name} has nulls")
            self._arrays[name] = as_array(column)
        return self._arrays[name]


def as_array(column: pa.Array) -> np.ndarray:
    """An Arrow column without nulls as [n], or [n, width] for a fixed-size list; a view where that is possible."""
    if pa.types.is_fixed_size_list(column.type):
        flat = column.flatten().to_numpy(zero_copy_only=False)
        return np.asarray(flat).reshape(len(column), column.type.list_size)
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _empty(schema: pa.Schema, columns: list[str] | None) -> dict[str, np.ndarray]:
    names = schema.names if columns is None else columns
    return {name: as_array(pa.array([], schema.field(name).type)) for name in names}


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
