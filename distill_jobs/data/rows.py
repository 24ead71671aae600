"""Rows read from the user's files, a bounded number at a time, whatever the format; and columns that must be there."""

import csv
import difflib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from cluster.faults import pass_on
from cluster.files import filesystem
from distill_jobs.data.sources import Piece, Range, SourceFile, Survey, parquet, records
from distill_jobs.errors import DataError

CHUNK = 1024
Column: TypeAlias = list[Any] | pa.Array
csv.field_size_limit(1 << 30)


@dataclass(frozen=True)
class Rows:
    """Some rows by columns. ``sources`` says where each stands: ``file.csv:17``, counted from 1 without the header."""

    columns: dict[str, Column]
    sources: list[str]

    def __len__(self) -> int:
        return len(self.sources)

    def values(self, name: str) -> list[Any]:
        """A column as Python values; DataError for text that is not UTF-8."""
        column = self.columns[name]
        if isinstance(column, list):
            return column
        try:
            return list(column.to_pylist())
        except UnicodeDecodeError:
            pass
        return [_text(column[i], name, source) for i, source in enumerate(self.sources)]

    def select(self, keep: np.ndarray) -> "Rows":
        """The rows where ``keep`` [n] is true."""
        chosen = np.flatnonzero(keep)
        columns = {
            name: [column[i] for i in chosen] if isinstance(column, list) else column.take(pa.array(chosen))
            for name, column in self.columns.items()
        }
        return Rows(columns, [self.sources[i] for i in chosen])


def row_error(source: str, what: str) -> DataError:
    """The error that names the row."""
    name, _, row = source.rpartition(":")
    return DataError(f"row {row} of {name}: {what}")


def check_columns(surveyed: Survey, needed: dict[str, str], text_column: str) -> None:
    """Each file must have the columns ``needed`` (column: the place in the spec that names it).

    Raises:
        DataError: names the file, the column, and the nearest one that is there.
    """
    for files in surveyed.values():
        for file in files:
            there = _header(file, text_column)
            for column, place in needed.items():
                if there is not None and column not in there:
                    close = difflib.get_close_matches(column, there, n=1, cutoff=0.5)
                    hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(there) or 'none'}"
                    raise DataError(f"{file.name} has no column {column!r} ({place}); {hint}")


class RangeReader:
    """Reads ranges in chunks of at most 1,024 rows.

    It keeps its place in the last Parquet file: a row group can only be read from its start, so an actor that takes
    one range after another goes through the file once instead of once for each range.
    """

    def __init__(self, columns: Sequence[str], text_column: str) -> None:
        self._columns, self._text_column = list(columns), text_column
        self._cursor: _ParquetCursor | None = None

    def read(self, shard: Range) -> Iterator[Rows]:
        """The rows of a range in order.

        Raises:
            DataError: names the file and row that can't be read.
        """
        for piece in shard.pieces:
            try:
                yield from self._piece(piece)
            except (OSError, pa.ArrowException) as error:
                pass_on(piece.uri, error)
                raise DataError(f"can't read {piece.uri}: {' '.join(str(error).split())}") from None

    def _piece(self, piece: Piece) -> Iterator[Rows]:
        if piece.format == "text":
            yield self._document(piece)
        elif piece.format == "parquet":
            if self._cursor is None or not self._cursor.reaches(piece):
                self._cursor = _ParquetCursor(piece, self._columns)
            yield from self._cursor.rows(piece)
        else:
            yield from self._lines(piece)

    def _document(self, piece: Piece) -> Rows:
        system, path = filesystem(piece.uri)
        with system.open_input_stream(path) as file:
            text = _decode(file.read(), f"{piece.name}:1")
        folder, _, name = piece.uri.rpartition("/")
        known = {self._text_column: text, "file": name, "folder": folder.rpartition("/")[2]}
        return Rows({column: [known[column]] for column in self._columns}, [f"{piece.name}:1"])

    def _lines(self, piece: Piece) -> Iterator[Rows]:
        header = _csv_header(piece.uri, piece.name) if piece.format == "csv" else []
        held: list[dict[str, Any]] = []
        sources: list[str] = []
        for number, record in enumerate(records(piece.uri, piece.format, piece.offset), piece.indexed):
            if number >= piece.stop:
                break
            if number < piece.first or not record.strip():
                continue
            source = f"{piece.name}:{number + 1}"
            text = _decode(record, source)
            held.append(_csv_row(text, header, source) if header else _json_row(text, source))
            sources.append(source)
            if len(held) == CHUNK:
                yield self._by_columns(held, sources)
                held, sources = [], []
        if held:
            yield self._by_columns(held, sources)

    def _by_columns(self, rows: list[dict[str, Any]], sources: list[str]) -> Rows:
        return Rows({name: [row.get(name) for row in rows] for name in self._columns}, sources)


class _ParquetCursor:
    """A place in a Parquet file that only moves forward."""

    def __init__(self, piece: Piece, columns: list[str]) -> None:
        self._uri, self._file = piece.uri, parquet(piece.uri)
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        group = int(np.searchsorted(starts, piece.first, side="right")) - 1
        self._at = int(starts[group])
        self._batches = self._file.iter_batches(CHUNK, row_groups=range(group, len(sizes)), columns=columns)
        self._held: pa.RecordBatch | None = None

    def reaches(self, piece: Piece) -> bool:
        return self._uri == piece.uri and self._at <= piece.first

    def rows(self, piece: Piece) -> Iterator[Rows]:
        while self._at < piece.stop:
            batch = self._held if self._held is not None else next(self._batches)
            skip = max(0, min(piece.first - self._at, batch.num_rows))
            take = min(batch.num_rows, piece.stop - self._at) - skip
            first = self._at + skip
            self._at = first + take
            self._held = batch.slice(skip + take) if skip + take < batch.num_rows else None
            if take > 0:
                columns = {name: _plain(batch.column(name).slice(skip, take)) for name in batch.schema.names}
                yield Rows(columns, [f"{piece.name}:{first + i + 1}" for i in range(take)])


def _plain(column: pa.Array) -> pa.Array:
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _header(file: SourceFile, text_column: str) -> list[str] | None:
    if file.format == "text":
        return [text_column, "file", "folder"]
    if file.format == "parquet":
        return list(parquet(file.uri).schema_arrow.names)
    if file.format == "csv":
        return _csv_header(file.uri, file.name)
    for number, record in enumerate(records(file.uri, "jsonl")):
        if record.strip():
            source = f"{file.name}:{number + 1}"
            return list(_json_row(_decode(record, source), source))
    return None


def _csv_header(uri: str, name: str) -> list[str]:
    first = next(records(uri, "csv"), b"")
    return _fields(_decode(first, f"{name}:0"), f"{name}:0")


def _csv_row(text: str, header: list[str], source: str) -> dict[str, Any]:
    fields = _fields(text, source)
    if len(fields) != len(header):
        raise row_error(source, f"it has {len(fields)} fields where the header has {len(header)}")
    return {name: value or None for name, value in zip(header, fields, strict=True)}


def _fields(text: str, source: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(text, newline=""), strict=True), [])
    except csv.Error as error:
        raise row_error(source, f"it is not valid CSV ({error})") from None


def _json_row(text: str, source: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise row_error(source, f"it is not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise row_error(source, "it is not a JSON object with named columns")
    return row


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise row_error(source, "it is not UTF-8 text") from None


def _text(value: pa.Scalar, name: str, source: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        raise row_error(source, f"column {name} is not UTF-8 text") from None
