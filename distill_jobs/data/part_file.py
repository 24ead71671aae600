"""One part, mapped: where each column of each record batch lies in the file, learnt once, and rows copied from there.

Arrow's own reader makes objects for every column of every batch; for parts with one batch a row that costs more than
the copying. Here the batches' metadata are read once for all of them (``flat``), checked against the file's real size,
and kept as a few numbers a batch. A file is trusted in nothing: an offset that leads out of the file, a length that
doesn't fit, a null, or a compressed body (which could unpack to any size) is ``Damage``.
"""

import fcntl
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.faults import pass_on
from distill_jobs.data.flat import Damage, Tables, windows

_MAGIC = b"ARROW1"
_RECORD_BATCH = 3
_BLOCK_WORDS, _NODE_WORDS, _BUFFER_WORDS = 3, 2, 2
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
# Below this many bytes a row one indexed copy of all rows is faster than a copy for each.
_SMALL = 128


@dataclass(frozen=True)
class Places:
    """File offsets [B], kept as a common array plus a constant where columns lie at fixed distances."""

    base: np.ndarray
    distance: int = 0

    def of(self, batches: np.ndarray) -> np.ndarray:
        return np.asarray(self.base[batches] + self.distance)


@dataclass(frozen=True)
class Column:
    """Where a column lies. Numbers: ``shape`` is () or (width,), ``at`` [B] the file offset of each batch's values.

    Text (``dtype`` None): ``at`` is where the batch's 32-bit offsets lie, ``text_at`` and ``text_bytes`` its bytes.
    """

    name: str
    dtype: np.dtype | None
    shape: tuple[int, ...]
    at: Places
    row_bytes: int = 0
    text_at: np.ndarray | None = None
    text_bytes: np.ndarray | None = None


@dataclass(frozen=True)
class Layout:
    """What was learnt of one part's file."""

    schema: pa.Schema
    columns: dict[str, Column]
    rows: int
    rows_per_batch: int
    size: int

    @property
    def nbytes(self) -> int:
        """Memory that it takes, roughly."""
        held = {id(c.at.base): c.at.base.nbytes for c in self.columns.values()}
        text = sum(c.text_at.nbytes for c in self.columns.values() if c.text_at is not None)
        return sum(held.values()) + 2 * text + 20_000


def map_file(path: Path, hold: bool = False) -> mmap.mmap:
    """Map a file. The pages are private: torch takes only memory that is writable, and the file still can't change.

    Args:
        hold: have a shared lock on the file, for as long as the map lives.
    """
    with path.open("rb") as file:
        if hold:
            # The map has a copy of the handle, and the lock belongs to both.
            fcntl.flock(file, fcntl.LOCK_SH)
        size = file.seek(0, 2)
        if size == 0:
            raise Damage("it is empty")
        flags = mmap.MAP_PRIVATE | _NO_RESERVE
        return mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def learn(mapped: mmap.mmap, rows: int, rows_per_batch: int) -> Layout:
    """Read the layout of a part of ``rows`` rows.

    Raises:
        Damage: the file is not what was promised, or anything in it leads astray.
    """
    raw = np.frombuffer(mapped, dtype=np.uint8)
    batches = -(-rows // rows_per_batch)
    start, blocks = _blocks(raw, mapped, batches)
    schema = read_schema(pa.py_buffer(mapped))
    expected = np.full(batches, rows_per_batch, np.int64)
    expected[-1] = rows - rows_per_batch * (batches - 1)
    nodes, buffers = _messages(raw, blocks, schema, expected)
    # The body of a batch: from after its metadata on, all before the footer.
    body, length = blocks[:, 0] + blocks[:, 1], blocks[:, 2]
    within = (buffers >= 0).all() and (buffers <= len(raw)).all()
    if not within or (buffers.sum(axis=2) > length[:, None]).any() or (body + length > start).any():
        raise Damage("a column leads out of its file")
    if len(set(schema.names)) != len(schema.names):
        raise Damage("it names a column twice")
    found = _Places(body[:, None] + buffers[:, :, 0], buffers[:, :, 1], nodes, expected)
    return Layout(schema, {field.name: found.column(field) for field in schema}, rows, rows_per_batch, len(raw))


def read_schema(source: Any) -> pa.Schema:
    """The schema in the footer of an IPC file; raises Damage when there is none, or it holds names that are no text."""
    try:
        schema = pa.ipc.open_file(source).schema
        # Names are decoded when somebody first asks for them: better here than there.
        _ = schema.names
    except (pa.ArrowException, OSError, ValueError) as error:
        pass_on("the footer of a part", error)
        raise Damage(" ".join(str(error).split())[:200] or type(error).__name__) from None
    return schema


class Target:
    """Where rows of a column are copied to: ``out`` [n, ...], and its bytes as a memory view (None for text)."""

    def __init__(self, name: str, out: np.ndarray) -> None:
        self.name, self.out = name, out
        self.memory = None if out.dtype == object else memoryview(out.reshape(-1).view(np.uint8).data)


class Part:
    """A mapped part with its layout: rows by their numbers within it."""

    def __init__(self, mapped: mmap.mmap, layout: Layout) -> None:
        if len(mapped) != layout.size:
            raise Damage("its size has changed")
        self.mapped, self.layout = mapped, layout
        self._bytes, self._memory = np.frombuffer(mapped, dtype=np.uint8), memoryview(mapped)

    def copy(self, targets: list["Target"], rows: np.ndarray, to: np.ndarray) -> None:
        """Copy rows [n] of each target's column to its rows ``to`` [n]."""
        columns, alone, source = self.layout.columns, self.layout.rows_per_batch == 1, self._memory
        places = to.tolist()
        base: np.ndarray | None = None
        starts: list[int] = []
        for target in targets:
            column, memory = columns[target.name], target.memory
            if memory is None:
                target.out[to] = self._texts(column, rows)
            elif not alone:
                self._copy_runs(column, target, rows, to)
            elif size := column.row_bytes:
                # Neighbouring columns nearly always lie at fixed distances from one array of offsets.
                if column.at.base is not base:
                    base = column.at.base
                    starts = base[rows].tolist()
                distance = column.at.distance
                for a, b in zip(places, starts, strict=True):
                    a *= size
                    b += distance
                    memory[a : a + size] = source[b : b + size]

    def _copy_runs(self, column: Column, target: "Target", rows: np.ndarray, to: np.ndarray) -> None:
        size = column.row_bytes
        if not size or target.memory is None:
            return
        at = self._where(column, rows)
        # Neighbours that stay neighbours are one copy.
        breaks = np.flatnonzero((np.diff(at) != size) | (np.diff(to) != 1)) + 1
        if size <= _SMALL and 2 * len(breaks) > len(rows):
            target.out[to] = windows(self._bytes, size)[at].view(column.dtype).reshape(len(rows), *column.shape)
            return
        first = np.concatenate([[0], breaks])
        count = np.diff(np.concatenate([first, [len(rows)]])) * size
        for a, b, n in zip((to[first] * size).tolist(), at[first].tolist(), count.tolist(), strict=True):
            target.memory[a : a + n] = self._memory[b : b + n]

    def view(self, name: str, rows: np.ndarray) -> np.ndarray | None:
        """Rows [n] of a column of numbers without a copy, where they lie behind one another; else None."""
        column = self.layout.columns[name]
        if not column.row_bytes or column.dtype is None:
            return None
        if self.layout.rows_per_batch > 1:
            at = self._where(column, rows)
            if len(at) > 1 and (np.diff(at) != column.row_bytes).any():
                return None
            first = int(at[0])
        elif len(rows) == 1:
            first = int(column.at.base[rows[0]]) + column.at.distance
        else:
            return None
        found: np.ndarray = np.ndarray((len(rows), *column.shape), column.dtype, self.mapped, first)
        # Later readers of these rows see the same memory: nobody may write there.
        found.flags.writeable = False
        return found

    def _texts(self, column: Column, rows: np.ndarray) -> list[str]:
        assert column.text_at is not None and column.text_bytes is not None
        batch, row = np.divmod(rows, self.layout.rows_per_batch)
        at = column.at.of(batch) + 4 * row
        ends = windows(self._bytes, 8)[at].view("<i4").astype(np.int64)
        if (ends < 0).any() or (ends[:, 0] > ends[:, 1]).any() or (ends[:, 1] > column.text_bytes[batch]).any():
            raise Damage(f"the text in column {column.name} leads out of its place")
        spans = (ends + column.text_at[batch][:, None]).tolist()
        try:
            return [str(self._memory[a:b], "utf-8") for a, b in spans]
        except UnicodeDecodeError:
            raise Damage(f"column {column.name} holds text that is not UTF-8") from None

    def _where(self, column: Column, rows: np.ndarray) -> np.ndarray:
        batch, row = np.divmod(rows, self.layout.rows_per_batch)
        return np.asarray(column.at.of(batch) + row * column.row_bytes)


def _blocks(raw: np.ndarray, mapped: mmap.mmap, batches: int) -> tuple[int, np.ndarray]:
    """Where the footer starts, and for each record batch offset, metadata bytes, body bytes: [B, 3] int64."""
    size = len(raw)
    if size < 24 or mapped[:6] != _MAGIC or mapped[-6:] != _MAGIC:
        raise Damage("it is not a whole Arrow file")
    length = int.from_bytes(mapped[-10:-6], "little")
    start = size - 10 - length
    if start < 8:
        raise Damage("its footer is longer than the file")
    footer = Tables.root(raw, np.array([start]), np.array([size - 10]))
    if footer.length(2).any():
        raise Damage("it has dictionaries, which no part has")
    if int(footer.length(3)[0]) != batches:
        raise Damage("its record batches don't add up to the rows promised")
    blocks = footer.structs(3, batches, _BLOCK_WORDS)[0]
    # Metadata bytes are 32 bits wide; what pads them to 64 is anything.
    blocks = np.stack([blocks[:, 0], blocks[:, 1] & 0xFFFFFFFF, blocks[:, 2]], axis=1)
    if (blocks < 0).any() or (blocks > size).any() or (blocks.sum(axis=1) > start).any() or (blocks[:, 1] < 16).any():
        raise Damage("a record batch leads out of the file")
    return start, blocks


def _messages(raw: np.ndarray, blocks: np.ndarray, schema: pa.Schema, rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """The field nodes [B, n, 2] (length, nulls) and buffers [B, m, 2] (offset, length) of all record batches."""
    # A message's metadata follow 8 bytes of prefix (a marker and their length).
    message = Tables.root(raw, blocks[:, 0] + 8, blocks[:, 0] + blocks[:, 1])
    if (message.scalar(1, "u1") != _RECORD_BATCH).any():
        raise Damage("a message in it is no record batch")
    batch = message.tables(2)
    if batch.has(3).any():
        raise Damage("a record batch is compressed, which no part is")
    if (batch.scalar(0, "<i8") != rows).any():
        raise Damage("its record batches don't add up to the rows promised")
    kinds = [_counts(field) for field in schema]
    nodes = batch.structs(1, sum(n for n, _ in kinds), _NODE_WORDS)
    buffers = batch.structs(2, sum(m for _, m in kinds), _BUFFER_WORDS)
    if nodes[:, :, 1].any():
        names = [field.name for field, (n, _) in zip(schema, kinds, strict=True) for _ in range(n)]
        raise Damage(f"column {names[int(np.argmax(nodes[:, :, 1].any(axis=0)))]} has nulls")
    return nodes, buffers


def _counts(field: pa.Field) -> tuple[int, int]:
    """How many nodes and buffers a column takes in a record batch."""
    if pa.types.is_string(field.type):
        return 1, 3
    _number_type(field)
    return (2, 3) if pa.types.is_fixed_size_list(field.type) else (1, 2)


def _number_type(field: pa.Field) -> np.dtype:
    kind = field.type.value_type if pa.types.is_fixed_size_list(field.type) else field.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise Damage(f"column {field.name} is {str(field.type)[:100]}, which no part holds")
    found: np.dtype = np.dtype(kind.to_pandas_dtype())
    return found


class _Places:
    """Walks the columns in the order of the schema through nodes and buffers."""

    def __init__(self, at: np.ndarray, length: np.ndarray, nodes: np.ndarray, rows: np.ndarray) -> None:
        self._at, self._length, self._nodes, self._rows = at, length, nodes[:, :, 0], rows
        self._node = self._buffer = 0
        self._bases: list[np.ndarray] = []

    def column(self, field: pa.Field) -> Column:
        nodes, buffers = _counts(field)
        node, last = self._node, self._buffer + buffers - 1
        self._node, self._buffer = node + nodes, last + 1
        self._expect(field, self._nodes[:, node] == self._rows)
        if pa.types.is_string(field.type):
            self._expect(field, self._length[:, last - 1] >= 4 * (self._rows + 1))
            # Copies: a view would keep all columns' numbers alive.
            text = self._at[:, last].copy(), self._length[:, last].copy()
            return Column(field.name, None, (), self._places(self._at[:, last - 1]), 0, *text)
        dtype = _number_type(field)
        shape: tuple[int, ...] = ()
        values = self._rows
        if pa.types.is_fixed_size_list(field.type):
            width = field.type.list_size
            shape, values = (width,), self._rows * width
            self._expect(field, (self._nodes[:, node + 1] == values) & (width >= 0))
        # Compared by division: the product of numbers from a hostile file may overflow.
        self._expect(field, self._length[:, last] // dtype.itemsize >= values)
        if values.any():
            self._expect(field, self._at[:, last] % dtype.itemsize == 0)
        row_bytes = dtype.itemsize * (shape[0] if shape else 1)
        return Column(field.name, dtype, shape, self._places(self._at[:, last]), row_bytes)

    def _expect(self, field: pa.Field, fine: np.ndarray) -> None:
        if not np.all(fine):
            raise Damage(f"column {field.name} is not as long as its rows")

    def _places(self, at: np.ndarray) -> Places:
        for base in self._bases:
            distance = at - base
            if (distance == distance[0]).all():
                return Places(base, int(distance[0]))
        self._bases.append(at.copy())
        return Places(self._bases[-1])
