"""From the rows of a part to the teacher's batches, and back: windows of rows, batches formed by length, never a part.

A *window* is as many neighbouring rows as fit into a few dozen MiB. Inside it rows are sorted by length and cut into
batches of at most ``tokens`` = rows x longest row, each trimmed to its longest row; what the teacher says goes back to
the rows' own places. Which batches there are depends on the rows and on ``tokens`` alone.

Shapes: R rows of a window, P positions a row, B rows of a batch, L its longest row, N scored positions of a batch.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distill_jobs.data.batch import IGNORED, Batch, batch_columns, make_batch
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import as_array
from distill_jobs.store.codecs import Field
from distill_jobs.store.quarantine import Quarantined

TARGET_BYTES = 32 << 20
"""Encoded targets of a window at most (of three at once: one that fills, one on its way, one being written)."""

INPUT_BYTES = 64 << 20
"""The data's own columns of a window at most."""

_FEW = 8
"""Batches are cut to a multiple of this many positions, which suits tensor cores; the last few are padding."""


class Window:
    """Neighbouring rows of a part, and the room for their encoded targets.

    Attributes:
        rows: R.
        columns: what a batch is made of, one array a column.
        lengths: [R] int64, positions up to the last that is no padding (1 where a row is one position).
        targets: for each field of the codec [R · P, width]; 0 where nothing was scored.
        bad: why a row is left out, by its number in the window.
    """

    def __init__(self, pieces: list[pa.RecordBatch], facts: DataFacts, fields: dict[str, Field]) -> None:
        self.pieces, self.facts = pieces, facts
        self.rows = sum(piece.num_rows for piece in pieces)
        self.columns = {name: _column(pieces, name) for name in batch_columns(facts)}
        self.lengths = _lengths(self.columns, facts, self.rows)
        # Zeroed memory that is not touched before it is written takes no room.
        shape = self.rows * facts.positions_per_row
        self.targets = {name: np.zeros((shape, field.width), field.dtype) for name, field in fields.items()}
        self.bad: dict[int, str] = {}

    @property
    def sample_ids(self) -> np.ndarray:
        """[R] int64."""
        return self.columns["sample_id"]

    def source(self, row: int) -> str:
        """Where a row came from, for people; empty where the data don't say."""
        for piece in self.pieces:
            if row < piece.num_rows:
                return str(piece.column("source")[row]) if "source" in piece.schema.names else ""
            row -= piece.num_rows
        raise IndexError(row)

    def left_out(self) -> list[Quarantined]:
        """The rows that are ``bad``, in their order."""
        return [Quarantined(int(self.sample_ids[row]), self.source(row), self.bad[row]) for row in sorted(self.bad)]

    def kept(self) -> tuple[pa.RecordBatch, dict[str, Tensor]]:
        """The rows that are not ``bad``, in their order, and their targets: [kept rows · P, width] a field."""
        whole = self.pieces[0] if len(self.pieces) == 1 else pa.concat_batches(self.pieces)
        if not self.bad:
            return whole, {name: torch.from_numpy(values) for name, values in self.targets.items()}
        keep = np.ones(self.rows, dtype=bool)
        keep[list(self.bad)] = False
        chosen = {n: v.reshape(self.rows, -1)[keep].reshape(-1, v.shape[1]) for n, v in self.targets.items()}
        return whole.filter(pa.array(keep)), {name: torch.from_numpy(values) for name, values in chosen.items()}


@dataclass
class Group:
    """Some rows of a window, ready for the teacher.

    Attributes:
        rows: [B] numbers in the window, rising.
        longest: L, tokens of each row that the teacher works through; 1 where rows are no sequences.
        batch: the tensors, on the host.
        scored: [N] int64, which of the batch's B · (L or 1) positions are scored, in order.
    """

    window: Window
    rows: np.ndarray
    longest: int
    batch: Batch
    scored: Tensor

    @property
    def positions_per_row(self) -> int:
        """L where every token gets a distribution, else 1."""
        return self.longest if self.window.facts.positions_per_row > 1 else 1

    @property
    def size(self) -> int:
        """Tokens that the teacher works through, padding included."""
        return len(self.rows) * self.longest

    @property
    def tokens(self) -> int:
        """Those of them that are no padding."""
        return int(self.window.lengths[self.rows].sum())

    def places(self) -> np.ndarray:
        """Where the scored positions lie in the window's targets, [N] int64."""
        row, position = np.divmod(self.scored.numpy(), self.positions_per_row)
        return np.asarray(self.rows[row] * self.window.facts.positions_per_row + position)

    def rows_of(self, scored: Tensor) -> np.ndarray:
        """The rows in the window of the scored positions of these numbers, each once."""
        return np.unique(self.rows[self.scored[scored].numpy() // self.positions_per_row])

    def halves(self, trim: "Trim") -> list["Group"]:
        """The same rows in two groups; of a single row, that row."""
        middle = (len(self.rows) + 1) // 2
        return [group_of(self.window, some, trim) for some in (self.rows[:middle], self.rows[middle:]) if len(some)]


@dataclass(frozen=True)
class Trim:
    """How batches are cut to length.

    Attributes:
        whole: rows keep their full length: a model of one's own may be built for no other.
        step: lengths are rounded up to a multiple; larger for a compiled model, which is compiled for each anew.
        pin: the tensors lie in page-locked memory, from which a GPU copies beside its work.
    """

    whole: bool = False
    step: int = _FEW
    pin: bool = False

    def length(self, longest: int, full: int, rows: int) -> int:
        """Positions for ``rows`` rows of which the longest has ``longest`` and that can have ``full``."""
        if self.whole:
            return full
        # A row alone has no padding at all, which could lie beyond the positions that a model knows.
        step = 1 if rows == 1 and self.step == _FEW else self.step
        return min(full, -(-longest // step) * step)


def window_rows(schema: pa.Schema, facts: DataFacts, fields: dict[str, Field]) -> int:
    """How many rows a window holds."""
    targets = facts.positions_per_row * sum(field.bytes for field in fields.values())
    inputs = sum(_bytes(kind) for kind in schema.types)
    return int(max(1, min(TARGET_BYTES // max(1, targets), INPUT_BYTES // max(1, inputs))))


def windows(batches: Iterable[pa.RecordBatch], facts: DataFacts, fields: dict[str, Field]) -> Iterator[Window]:
    """A part's rows in windows, in order; record batches are cut where that is needed, without a copy."""
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    most = window_rows(first.schema, facts, fields)
    held: list[pa.RecordBatch] = []
    room = most
    for whole in itertools.chain([first], batches):
        start = 0
        while start < whole.num_rows:
            piece = whole.slice(start, room)
            held.append(piece)
            start, room = start + piece.num_rows, room - piece.num_rows
            if not room:
                yield Window(held, facts, fields)
                held, room = [], most
    if held:
        yield Window(held, facts, fields)


def groups(window: Window, tokens: Callable[[], int], trim: Trim) -> Iterator[Group]:
    """A window's rows that are not ``bad`` in batches: the longest rows first, and of equal ones the first.

    Args:
        tokens: rows x longest at most, asked before each batch; a single row may be longer.
    """
    full = full_length(window.facts)
    order = np.argsort(-window.lengths, kind="stable")
    order = order[~np.isin(order, list(window.bad))]
    start = 0
    while start < len(order):
        longest = trim.length(int(window.lengths[order[start]]), full, rows=2)
        stop = start + max(1, tokens() // longest)
        # In their own order, so that what lies together is read together.
        yield group_of(window, np.sort(order[start:stop]), trim)
        start = stop


def group_of(window: Window, rows: np.ndarray, trim: Trim) -> Group:
    """The tensors of some rows of a window."""
    facts = window.facts
    longest = trim.length(int(window.lengths[rows].max()), full_length(facts), len(rows))
    some = {name: values[rows] for name, values in window.columns.items()}
    for name in {"input_ids", "segments"} & some.keys():
        some[name] = some[name][:, :longest]
    batch = make_batch(some, facts)
    if trim.pin:
        batch.inputs = {name: values.pin_memory() for name, values in batch.inputs.items()}
    scored = (batch.labels.flatten() != IGNORED).nonzero().flatten()
    return Group(window, rows, longest, batch, scored)


def full_length(facts: DataFacts) -> int:
    """Tokens of a row at most; 1 where rows are no sequences."""
    return facts.sequence_length or 1 if facts.features in ("documents", "text") else 1


def _lengths(columns: dict[str, np.ndarray], facts: DataFacts, rows: int) -> np.ndarray:
    if facts.features == "documents":
        real = columns["segments"] != 0
        # Padding is at the row's end.
        return np.asarray(np.maximum(1, real.shape[1] - real[:, ::-1].argmax(axis=1)) * real.any(axis=1)).clip(min=1)
    if facts.features == "text":
        return np.asarray(columns["tokens"], dtype=np.int64).clip(1, full_length(facts))
    return np.ones(rows, dtype=np.int64)


def _column(pieces: list[pa.RecordBatch], name: str) -> np.ndarray:
    found = [as_array(piece.column(name)) for piece in pieces]
    return found[0] if len(found) == 1 else np.concatenate(found)


def _bytes(kind: pa.DataType) -> int:
    """Bytes of a value of a column; a guess for text."""
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size) * _bytes(kind.value_type)
    return int(kind.bit_width // 8) if pa.types.is_primitive(kind) else 64
