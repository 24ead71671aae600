"""Parquet files of token ids and listed teacher entries, read few rows at a time; nothing about them is believed.

Shapes: n rows, M positions of all of them together, W entries listed at a position.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from cluster.errors import FileError
from cluster.files import Folder
from distill_jobs.errors import DataError
from distill_jobs.store.exchange import distillkit
from distill_jobs.store.exchange.lists import Documents, integers, level, padded, reals, table, without_padding
from distill_jobs.store.exchange.sparse import ABSENT

TOKENS = "input_ids"
SEGMENTS = "segments"
IDS = ("ids", "indices", "token_ids", "top_ids", "topk_ids", "top_indices", "topk_indices")
VALUES = ("logprobs", "values", "top_values", "topk_logprobs", "top_logprobs", "topk_values", "logits")

MOST_TOKENS = 1 << 20
"""Tokens of one row beyond which a file is not believed."""

_ROWS = 16
_BYTES_AT_ONCE = 1 << 26
_MOST_BYTES = 1 << 31


@dataclass(frozen=True)
class Listed:
    """What a run of rows lists.

    Attributes:
        starts: [n + 1], where each row's positions begin among all M.
        ids: [M, W] int64; ``ABSENT`` where a position lists fewer entries.
        values: [M, W] float64.
    """

    starts: np.ndarray
    ids: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Source:
    """Files in their order, and how to read them.

    Attributes:
        tokens, ids, values: column names; None looks for the usual ones.
        coding: DistillKit's compression; None where entries are listed plainly.
    """

    folder: Folder
    names: tuple[str, ...]
    tokens: str = TOKENS
    ids: str | None = None
    values: str | None = None
    coding: distillkit.Coding | None = None

    def documents(self, name: str, pad: int | None) -> tuple[Documents, int]:
        """Where the documents of a file lie, and the largest token id in it.

        A row is one document; where there is a column ``segments`` beside the tokens, its numbers tell a row's
        documents apart, and 0 marks padding.

        Args:
            pad: the token that fills rows up: those at a row's end don't count. None where rows are not filled up.

        Raises:
            DataError: the file can't be read, or its token ids are no lists of numbers from 0 up.
        """
        found, largest, rows = [], -1, 0
        wanted = [self.tokens, *([SEGMENTS] if SEGMENTS in self._schema(name) else [])]
        for start, batch in self._batches(name, wanted, 0, None, self._survey_rows(name)):
            where = f"{self.folder}/{name}, from row {start}"
            starts, flat = level(_column(batch, self.tokens, where), f"{where}: column {self.tokens}")
            ids = integers(flat, f"{where}: column {self.tokens}")
            if len(ids) and ids.min() < 0:
                raise DataError(f"{where}: column {self.tokens} holds {ids.min()}, which is no token id")
            largest = max(largest, int(ids.max(initial=-1)))
            if len(wanted) == 1:
                lengths = without_padding(starts, ids, pad)
                some = Documents(np.arange(len(lengths)), np.zeros_like(lengths), lengths)
            else:
                others, marks = level(_column(batch, SEGMENTS, where), f"{where}: column {SEGMENTS}")
                if not np.array_equal(starts, others):
                    raise DataError(f"{where}: {SEGMENTS} and {self.tokens} don't have the same lengths")
                some = Documents.marked(starts, integers(marks, f"{where}: column {SEGMENTS}"))
            found.append(some.after(rows))
            rows += batch.num_rows
        every = Documents.joined(found)
        if len(every.lengths) and every.lengths.max() > MOST_TOKENS:
            longest = every.lengths.max()
            raise DataError(f"{self.folder}/{name} has a row of {longest:,} tokens; {MOST_TOKENS:,} are the most")
        return every, largest

    def read(
        self, name: str, start: int, stop: int, rows: int = _ROWS
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, Listed]]:
        """The rows ``start`` … ``stop``-1 of a file, few at a time.

        Returns:
            the number of the first row, where each row's tokens begin [n + 1], all tokens, and what the rows list.

        Raises:
            DataError: the file can't be read, or a column is missing or of another make.
        """
        wanted = [self.tokens, *self._listing(self._schema(name), name)]
        for first, batch in self._batches(name, wanted, start, stop, rows):
            where = f"{self.folder}/{name}, rows {first} to {first + batch.num_rows - 1}"
            starts, flat = level(_column(batch, self.tokens, where), where)
            listed = self._listed([_column(batch, column, where) for column in wanted[1:]], where)
            yield first, starts, integers(flat, where), listed

    def width(self) -> int:
        """The most entries that a position among the first rows lists."""
        if self.coding is not None:
            return self.coding.k
        for name in self.names:
            for _, _, _, listed in self.read(name, 0, _ROWS):
                if listed.ids.shape[1]:
                    return int(listed.ids.shape[1])
        raise DataError(f"{self.folder} lists nothing in its first rows")

    def _listing(self, there: list[str], name: str) -> list[str]:
        if self.coding is not None:
            needed = ["packed_indices", "exact_values", "coeffs"] if self.coding.older else None
            needed = needed or ["bytepacked_indices", "compressed_logprobs"]
        else:
            needed = [
                self.ids or next((c for c in IDS if c in there), IDS[0]),
                self.values or next((c for c in VALUES if c in there), VALUES[0]),
            ]
        missing = [column for column in [self.tokens, *needed] if column not in there]
        if missing:
            raise _missing(f"{self.folder}/{name}", missing[0], there)
        return needed

    def _listed(self, columns: list[pa.Array], where: str) -> Listed:
        levels = [level(column, where) for column in columns]
        starts = levels[0][0]
        if any(not np.array_equal(starts, other) for other, _ in levels[1:]):
            raise DataError(f"{where}: the columns of ids and values don't list the same number of positions")
        inner = [level(flat, where) for _, flat in levels]
        if self.coding is None:
            if not np.array_equal(inner[0][0], inner[1][0]):
                raise DataError(f"{where}: a position lists more ids than values, or fewer")
            ids = padded(inner[0][0], integers(inner[0][1], where), ABSENT, where)
            return Listed(starts, ids, padded(inner[1][0], reals(inner[1][1], where), -np.inf, where))
        if self.coding.older:
            words, exact, coefficients = (table(*level, where) for level in inner)
            needed = (-(-self.coding.k // (64 // self.coding.id_bits)), self.coding.exact_k, len(self.coding.terms))
            if len(words):
                _check_widths((words.shape[1], exact.shape[1], coefficients.shape[1]), needed, where)
            found = distillkit.decode_older(words.astype(np.uint64), exact, coefficients, self.coding)
            return Listed(starts, *found) if len(words) else _nothing(starts, self.coding.k)
        packed_ids, packed_values = (table(offsets, flat, where, pa.uint8()) for offsets, flat in inner)
        if not len(packed_ids):
            return _nothing(starts, self.coding.k)
        needed_bytes = (self.coding.id_bytes, self.coding.value_bytes)
        _check_widths((packed_ids.shape[1], packed_values.shape[1]), needed_bytes, where)
        ids = distillkit.decode_ids(packed_ids, self.coding)
        return Listed(starts, ids, distillkit.decode_values(packed_values, self.coding))

    def _survey_rows(self, name: str) -> int:
        """Rows whose tokens are looked at together: few where rows are long, by what the file says of itself."""
        with _said(f"{self.folder}/{name}"):
            metadata = self._open(name).metadata
            each = sum(metadata.row_group(g).total_byte_size for g in range(metadata.num_row_groups))
            each //= max(1, metadata.num_rows)
        if each > _MOST_BYTES:
            raise DataError(f"{self.folder}/{name} claims {each:,} bytes for a row; {_MOST_BYTES:,} are the most")
        return int(np.clip(_BYTES_AT_ONCE // max(1, each), 1, 1024))

    def _schema(self, name: str) -> list[str]:
        with _said(f"{self.folder}/{name}"):
            return list(self._open(name).schema_arrow.names)

    def _open(self, name: str) -> pq.ParquetFile:
        with _said(f"{self.folder}/{name}"):
            return pq.ParquetFile(self.folder.open(name))

    def _batches(
        self, name: str, columns: list[str], start: int, stop: int | None, size: int
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Record batches of the rows asked for, each with the number of its first row."""
        there = self._schema(name)
        if columns[0] not in there:
            raise _missing(f"{self.folder}/{name}", columns[0], there)
        with _said(f"{self.folder}/{name}"):
            file = self._open(name)
            groups: list[int] = []
            at = first = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if at + rows > start and (stop is None or at < stop):
                    first = at if not groups else first
                    groups.append(group)
                at += rows
            batches = file.iter_batches(batch_size=size, row_groups=groups, columns=columns, use_threads=False)
        while True:
            with _said(f"{self.folder}/{name}"):
                batch = next(batches, None)
                if batch is None:
                    return
                batch.validate(full=True)
            low, high = max(start - first, 0), batch.num_rows if stop is None else min(batch.num_rows, stop - first)
            if low < high:
                yield first + low, batch.slice(low, high - low)
            first += batch.num_rows
            if stop is not None and first >= stop:
                return


def find(place: str) -> tuple[Folder, tuple[str, ...]]:
    """The Parquet files at a place: a file, a folder, or a folder with them in its ``data``.

    Raises:
        DataError: there are none.
    """
    parent, _, last = place.rstrip("/").rpartition("/")
    if last.endswith(".parquet"):
        folder = Folder(parent or ".")
        if not folder.exists(last):
            raise DataError(f"{place} does not exist")
        return folder, (last,)
    for folder in (Folder(place), Folder(place) / "data"):
        names = tuple(folder.names(".parquet"))
        if names:
            return folder, names
    raise DataError(f"there are no Parquet files (*.parquet) in {place}")


def read_coding(place: Folder, config: str | None) -> distillkit.Coding:
    """DistillKit's configuration: the file named, or the one beside the data.

    Raises:
        DataError: there is none, or it is no such configuration.
    """
    parent, _, name = (config or f"{place.uri.rstrip('/')}/{distillkit.CONFIG}").rpartition("/")
    folder = Folder(parent or ".")
    if not folder.exists(name):
        raise DataError(f"{folder}/{name} does not exist: name DistillKit's compression configuration with --config")
    try:
        values: Any = yaml.safe_load(folder.read(name))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError):
        raise DataError(f"{folder}/{name} is not valid YAML") from None
    return distillkit.Coding.of(values)


def _column(batch: pa.RecordBatch, name: str, where: str) -> pa.Array:
    column = batch.column(name)
    if column.null_count:
        raise DataError(f"{where}: column {name} has nulls")
    return column


def _check_widths(found: tuple[int, ...], needed: tuple[int, ...], where: str) -> None:
    if found != needed:
        raise DataError(
            f"{where}: a position is packed into {' + '.join(map(str, found))} values, but by the configuration it "
            f"takes {' + '.join(map(str, needed))}; it belongs to other data"
        )


def _nothing(starts: np.ndarray, k: int) -> Listed:
    return Listed(starts, np.zeros((0, k), dtype=np.int64), np.zeros((0, k)))


@contextmanager
def _said(where: str) -> Iterator[None]:
    """Whatever goes wrong in the reader of Parquet, as one sentence."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError, FileError) as error:
        raise DataError(f"can't read {where} as Parquet, or it is damaged: {_flat(error)}") from None


def _missing(where: str, column: str, there: list[str]) -> DataError:
    return DataError(f"{where} has no column {column}; it has {', '.join(there)}")


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
