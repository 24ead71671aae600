"""Rows of a table by their numbers: mapped files, opened lazily, never the whole table in memory."""

import hashlib
import itertools
import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.errors import FileError
from cluster.faults import pass_on
from cluster.files import Folder
from distill_jobs.data.cache import PartCache, Wanted
from distill_jobs.data.flat import Damage
from distill_jobs.data.holes import Runs
from distill_jobs.data.listing import check_listing, left_out
from distill_jobs.data.mapped import MappedParts
from distill_jobs.data.part_file import Layout, Part, Target, learn, map_file, read_schema
from distill_jobs.data.table import MANIFEST
from distill_jobs.errors import DataError, DistillError

_LAYOUT_BYTES = 128 << 20


class TableReader:
    """A complete table. Rows are numbered 0 … ``rows``-1 through all its parts in order.

    Reading runs no code from the file, and whatever is wrong with a file comes out as ``error`` with one sentence.
    The first time a part is opened its SHA-256 is compared with the manifest's.

    Attributes:
        facts: the manifest as it was written.
        rows: rows in the table.
        inspect: called with a part's number the first time it is opened, before any of its rows are given out.
    """

    def __init__(
        self,
        folder: Folder,
        error: type[DistillError] = DataError,
        *,
        cache: PartCache | None = None,
        verify: bool = True,
    ) -> None:
        """Open a table.

        Args:
            cache: where parts of a table in an object store are kept; None takes the machine's common one.
            verify: False trusts the files: neither their SHA-256 nor ``inspect`` is asked.
        """
        self.folder, self.verify, self._error = folder, verify, error
        self.facts = self._manifest()
        self._part_rows = np.asarray(self.facts["part_rows"], dtype=np.int64)
        self._left_out = left_out(self.facts)
        self._runs: dict[int, Runs] = {}
        self._starts = np.concatenate([[0], np.cumsum(self._part_rows)])
        self.rows = int(self._starts[-1])
        self.inspect: Callable[[int], None] | None = None
        self._rows_per_batch = int(self.facts["rows_per_batch"])
        self._cache = None if folder.is_local else cache or PartCache()
        self._parts = MappedParts(self._cache)
        self._layouts: OrderedDict[int, Layout] = OrderedDict()
        self._layout_bytes = 0
        self._seen = np.zeros(len(self._part_rows), dtype=bool)
        self._schema: pa.Schema | None = None
        self._kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}

    @property
    def parts(self) -> int:
        """Number of parts, those without rows included."""
        return len(self._part_rows)

    @property
    def part_rows(self) -> np.ndarray:
        """Rows of each part, [parts] int64."""
        return self._part_rows

    @property
    def part_quarantined(self) -> np.ndarray:
        """Rows of the data's part of the same number that each part leaves out, [parts] int64."""
        return self._left_out

    @property
    def schema(self) -> pa.Schema:
        """The schema of the first part that has rows; StoreError or DataError when none has."""
        if self._schema is None:
            filled = np.flatnonzero(self._part_rows)
            if not len(filled):
                raise self._error(f"{self.folder} holds no rows")
            part = int(filled[0])
            try:
                # Its footer alone is read: a remote part isn't fetched, and a local one not hashed, for this.
                self._schema = read_schema(self.folder.open(self.facts["part_files"][part]))
            except (FileError, Damage) as error:
                raise self._broken(part, _flat(error)) from None
        return self._schema

    def part_of(self, index: int) -> int:
        """The part in which global row ``index`` lies."""
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows} in {self.folder}")
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def part_range(self, part: int) -> range:
        """The global row numbers of a part."""
        return range(int(self._starts[part]), int(self._starts[part + 1]))

    def rows_of(self, sample_ids: np.ndarray) -> np.ndarray:
        """The global row numbers [n] of sample ids [n]; raises when the table has no such sample."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        # The same as ``table.where`` of each.
        part, row = ids >> 32, ids & 0xFFFFFFFF
        there = (part >= 0) & (part < self.parts)
        there[there] &= row[there] < (self._part_rows + self._left_out)[part[there]]
        for number in np.unique(part[there][self._left_out[part[there]] > 0]).tolist():
            some = there & (part == number)
            row[some] = self._runs_of(number).where(row[some])
        there &= row >= 0
        if not there.all():
            raise self._error(f"{self.folder} has no sample {int(ids[~there][0])}")
        return np.asarray(self._starts[part] + row)

    def take(self, indices: np.ndarray, columns: list[str] | None = None) -> dict[str, np.ndarray]:
        """The rows ``indices`` (any order, repeats allowed), as one array for each column.

        Rows that lie behind one another in one record batch (so any single row) come as read-only views of the
        mapped file.

        Args:
            indices: [n] global row numbers.
            columns: names to read; None reads all.

        Returns:
            [n] for a plain column, [n, width] for a fixed-size list; text as arrays of objects.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= self.rows):
            raise IndexError(f"rows {indices.min()}…{indices.max()} of {self.rows} in {self.folder}")
        names = self._names(columns)
        if not len(indices):
            return {name: self._room(name, 0) for name in names}
        part = np.searchsorted(self._starts, indices, side="right") - 1
        within = indices - self._starts[part]
        first = int(part[0])
        if (part == first).all():
            taken = self._from_one(first, within, names)
            self._parts.leave()
            return taken
        taken = {name: self._room(name, len(indices)) for name in names}
        targets = [Target(name, out) for name, out in taken.items()]
        order = np.argsort(part, kind="stable")
        ends = [0, *(np.flatnonzero(np.diff(part[order])) + 1).tolist(), len(order)]
        for start, end in itertools.pairwise(ends):
            to = order[start:end]
            self._copy(int(part[to[0]]), targets, within[to], to)
        self._parts.leave()
        return taken

    def batches(self, part: int) -> Iterator[pa.RecordBatch]:
        """The record batches of one part in order; none for a part without rows."""
        rows = int(self._part_rows[part])
        if not rows:
            return
        held = self._part(part)
        try:
            reader = pa.ipc.open_file(pa.py_buffer(held.mapped))
            for number in range(-(-rows // self._rows_per_batch)):
                batch = reader.get_batch(number)
                batch.validate(full=True)
                yield batch
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._broken(part, _flat(error)) from None

    def wanted(self, parts: list[int]) -> list[Wanted]:
        """The files of those of ``parts`` that have rows, as a cache takes them."""
        files, sums = self.facts["part_files"], self.facts["part_sha256"]
        return [Wanted(self.folder, files[part], sums[part]) for part in parts if files[part] is not None]

    def prefetch(self, parts: list[int], spare: list[int]) -> None:
        """Have parts of a remote table fetched ahead, without giving up the parts ``spare``; else do nothing."""
        if self._cache is not None:
            self._parts.enter(spare)
            self._cache.prefetch(self.wanted(parts), self.wanted(spare), str(self.folder))

    def _from_one(self, number: int, rows: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
        part = self._part(number)
        taken: dict[str, np.ndarray] = {}
        for name in names:
            view = part.view(name, rows)
            taken[name] = self._room(name, len(rows)) if view is None else view
        left = [Target(name, values) for name, values in taken.items() if values.base is None]
        if left:
            self._copy(number, left, rows, np.arange(len(rows)))
        return taken

    def _runs_of(self, part: int) -> Runs:
        if part not in self._runs:
            numbers = np.asarray(self.part_range(part), dtype=np.int64)
            ids = self.take(numbers, ["sample_id"])["sample_id"] if len(numbers) else numbers
            runs = Runs.of(ids, part, len(numbers) + int(self._left_out[part]))
            if runs is None:
                raise self._broken(part, "its sample ids are not in order, or not its own")
            self._runs[part] = runs
        return self._runs[part]

    def _copy(self, number: int, targets: list[Target], rows: np.ndarray, to: np.ndarray) -> None:
        try:
            self._part(number).copy(targets, rows, to)
        except Damage as damage:
            raise self._broken(number, str(damage)) from None

    def _names(self, columns: list[str] | None) -> list[str]:
        if not self._kinds:
            self._kinds = {field.name: _kind(field.type) for field in self.schema}
        if columns is None:
            return list(self._kinds)
        missing = [name for name in columns if name not in self._kinds]
        if missing:
            raise self._error(f"{self.folder} has no column {missing[0]}; it has {', '.join(self._kinds)}")
        return columns

    def _room(self, name: str, rows: int) -> np.ndarray:
        dtype, shape = self._kinds[name]
        return np.empty((rows, *shape), dtype=dtype)

    def _part(self, number: int) -> Part:
        held = self._parts.get(number)
        if held is not None:
            return held
        try:
            mapped = self._map(number)
            fresh = self.verify and not self._seen[number] and not self._checked(number)
            if fresh and hashlib.sha256(mapped).hexdigest() != self.facts["part_sha256"][number]:
                raise Damage("its SHA-256 is not the one in the manifest")
            part = Part(mapped, self._layout(number, mapped))
        except (Damage, FileError, OSError, ValueError) as error:
            pass_on(f"part {number} of {self.folder}", error)
            if self._cache is not None:
                self._cache.drop(self.wanted([number])[0])
            raise self._broken(number, _flat(error)) from None
        self._hold(number, part)
        return part

    def _checked(self, number: int) -> bool:
        """Whether this reader's cache has compared a part with its SHA-256 when it arrived."""
        return self._cache is not None and self.wanted([number])[0].cached in self._cache.arrived

    def _hold(self, number: int, part: Part) -> None:
        self._parts.keep(number, part)
        if self._seen[number]:
            return
        self._seen[number] = True
        if self.verify and self.inspect is not None:
            try:
                self.inspect(number)
            except BaseException:
                self._seen[number] = False
                self._parts.drop(number)
                raise

    def _map(self, number: int) -> mmap.mmap:
        name = self.facts["part_files"][number]
        if self._cache is not None:
            return self._cache.map(self.wanted([number])[0])
        return map_file(self.folder.path(name))

    def _layout(self, number: int, mapped: mmap.mmap) -> Layout:
        held = self._layouts.get(number)
        if held is None:
            held = self._layouts[number] = learn(mapped, int(self._part_rows[number]), self._rows_per_batch)
            self._layout_bytes += held.nbytes
            while self._layout_bytes > _LAYOUT_BYTES and len(self._layouts) > 1:
                self._layout_bytes -= self._layouts.popitem(last=False)[1].nbytes
        self._layouts.move_to_end(number)
        if not held.schema.equals(self.schema):
            raise Damage("its columns are not those of the parts before it")
        return held

    def _broken(self, part: int, what: str) -> DistillError:
        return self._error(f"can't read part {part} of {self.folder} ({what}); make it again")

    def _manifest(self) -> dict[str, Any]:
        if not self.folder.exists(MANIFEST):
            raise self._error(f"{self.folder} is not complete: it has no {MANIFEST}")
        try:
            facts = self.folder.read_json(MANIFEST)
        except FileError as error:
            raise self._error(str(error)) from None
        try:
            check_listing(facts)
        except (TypeError, KeyError, AttributeError):
            raise self._error(f"{self.folder}/{MANIFEST} is not a valid manifest; make the table again") from None
        return dict(facts)


def as_array(column: pa.Array) -> np.ndarray:
    """An Arrow column without nulls as [n], or [n, width] for a fixed-size list; a view where that is possible."""
    if pa.types.is_fixed_size_list(column.type):
        flat = column.flatten().to_numpy(zero_copy_only=False)
        return np.asarray(flat).reshape(len(column), column.type.list_size)
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _kind(kind: pa.DataType) -> tuple[np.dtype, tuple[int, ...]]:
    """What rows of an Arrow type become: the type of an array, and its shape after the rows."""
    if pa.types.is_fixed_size_list(kind):
        return np.dtype(kind.value_type.to_pandas_dtype()), (kind.list_size,)
    return np.dtype(kind.to_pandas_dtype()), ()


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
