"""Rows read become rows of the data table: one class for each kind of features, all alike to the worker above them.

Each *encodes* a chunk of rows when it is read, and *assembles* the chunks of one range and split into a table.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from cluster.files import Folder
from distill_jobs.data import packing
from distill_jobs.data.encoder import Encoder
from distill_jobs.data.images import pixels
from distill_jobs.data.rows import Rows, row_error
from distill_jobs.data.tokenizer import TokenizerFacts, open_tokenizer
from distill_jobs.data.values import categories, class_numbers, texts
from distill_jobs.spec import Data

_TEXTS_AT_ONCE = 256


@dataclass
class Made:
    """One part's rows without their sample ids, their tokens (None: one a row), and what was dropped by reason.

    ``documents`` [rows] names, of packed rows, the source of each piece in order, one a line.
    """

    table: pa.Table
    tokens: int | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    documents: pa.Array | None = None


class RowEncoder(Protocol):
    """What a range of rows goes through."""

    def encode(self, rows: Rows) -> Any:
        """Turn a chunk into what ``assemble`` takes; DataError names a row that can't be."""

    def assemble(self, chunks: list[Any]) -> Made:
        """The chunks of one range and split, in order, as a table; no chunks give a table without rows."""


def make_row_encoder(data: Data, classes: tuple[str, ...], facts: TokenizerFacts | None, folder: Folder) -> RowEncoder:
    """The encoder for the spec's kind of features; ``folder`` is ``data/`` with its fitted encoder or tokenizer."""
    kind = data.features.kind
    if kind == "documents":
        assert facts is not None
        return DocumentEncoder(data, facts, folder)
    if kind == "text":
        assert facts is not None
        return TextEncoder(data, classes, facts, folder)
    return ImageEncoder(data, classes) if kind == "image" else TabularEncoder(data, classes, Encoder.load(folder))


class _Classified:
    """What tabular rows, texts and images share: a row stays a row, with its slices and its label."""

    def __init__(self, data: Data, classes: tuple[str, ...], features: list[pa.Field]) -> None:
        self._data, self._classes = data, {name: number for number, name in enumerate(classes)}
        self._schema = pa.schema([*_leading(data.slices), *features, pa.field("label", pa.int64())])

    def _features(self, rows: Rows) -> tuple[list[pa.Array], Counter[str]]:
        raise NotImplementedError

    def encode(self, rows: Rows) -> Made:
        assert self._data.label is not None
        labels = class_numbers(rows, self._data.label, self._classes)
        features, dropped = self._features(rows)
        columns = [*_leading_columns(rows, self._data.slices), *features, pa.array(labels)]
        return Made(pa.table(columns, schema=self._schema), dropped=dropped)

    def assemble(self, chunks: list[Made]) -> Made:
        table = pa.concat_tables([self._schema.empty_table(), *(c.table for c in chunks)]).combine_chunks()
        tokens = int(np.asarray(table["tokens"]).sum()) if "tokens" in table.schema.names else None
        return Made(table, tokens, sum((c.dropped for c in chunks), Counter()))


class TabularEncoder(_Classified):
    """``features`` [D] by the fitted encoder."""

    def __init__(self, data: Data, classes: tuple[str, ...], encoder: Encoder) -> None:
        super().__init__(data, classes, [pa.field("features", pa.list_(pa.float32(), encoder.width))])
        self._encoder = encoder

    def _features(self, rows: Rows) -> tuple[list[pa.Array], Counter[str]]:
        return [_fixed(self._encoder.encode(rows))], Counter()


class ImageEncoder(_Classified):
    """``pixels`` [C·H·W]."""

    def __init__(self, data: Data, classes: tuple[str, ...]) -> None:
        self._spec = data.features.image
        width = int(np.prod(self._spec.shape)) if self._spec else 0
        super().__init__(data, classes, [pa.field("pixels", pa.list_(pa.float32(), width))])

    def _features(self, rows: Rows) -> tuple[list[pa.Array], Counter[str]]:
        assert self._spec is not None
        return [_fixed(pixels(rows, self._spec))], Counter()


class TextEncoder(_Classified):
    """``input_ids`` [max_length], padded on the right, and ``tokens``, how many of them are real."""

    def __init__(self, data: Data, classes: tuple[str, ...], facts: TokenizerFacts, folder: Folder) -> None:
        self._spec, self._facts = data.features.chosen, facts
        fields = [pa.field("input_ids", pa.list_(pa.int32(), self._spec.max_length)), pa.field("tokens", pa.int32())]
        super().__init__(data, classes, fields)
        self._tokenizer = open_tokenizer(folder)
        self._tokenizer.enable_truncation(self._spec.max_length)

    def _features(self, rows: Rows) -> tuple[list[pa.Array], Counter[str]]:
        found = texts(rows, self._spec.column)
        for text, source in zip(found, rows.sources, strict=True):
            if text is None:
                raise row_error(source, f"text column {self._spec.column} is empty; fill it or drop the row")
        ids = np.full((len(rows), self._spec.max_length), self._facts.pad_id, dtype=np.int32)
        tokens = np.zeros(len(rows), dtype=np.int32)
        dropped: Counter[str] = Counter()
        for row, encoding in enumerate(self._tokenizer.encode_batch(found)):
            # A model needs at least one token to look at, also for an empty text.
            piece = encoding.ids or [self._facts.pad_id if self._facts.end_id is None else self._facts.end_id]
            ids[row, : len(piece)] = piece
            tokens[row] = len(piece)
            dropped["truncated"] += bool(encoding.overflowing)
        return [_fixed(ids), pa.array(tokens)], +dropped


class DocumentEncoder:
    """Documents, each ended by the end-of-sequence token, packed: ``input_ids`` and ``segments`` [L], ``tokens``."""

    def __init__(self, data: Data, facts: TokenizerFacts, folder: Folder) -> None:
        spec = data.features.chosen
        self._column, self._length, self._naive = spec.column, spec.sequence_length, spec.packing == "naive"
        self._slices, self._facts, self._tokenizer = data.slices, facts, open_tokenizer(folder)
        ids = pa.list_(pa.int32(), self._length)
        fields = [pa.field("input_ids", ids), pa.field("segments", ids), pa.field("tokens", pa.int32())]
        self._schema = pa.schema([*_leading(self._slices), *fields])

    def encode(self, rows: Rows) -> list[packing.Document | None]:
        """The documents, and None for each row without text."""
        found = texts(rows, self._column)
        keys = list(zip(*(categories(rows, name) for name in self._slices), strict=True)) or [()] * len(rows)
        documents: list[packing.Document | None] = []
        for start in range(0, len(rows), _TEXTS_AT_ONCE):
            some = [text or "" for text in found[start : start + _TEXTS_AT_ONCE]]
            for at, encoding in enumerate(self._tokenizer.encode_batch_fast(some), start):
                blank = not (found[at] or "").strip() or not encoding.ids
                ended = self._ended(encoding.ids)
                documents.append(None if blank else packing.Document(ended, keys[at], rows.sources[at]))
        return documents

    def assemble(self, chunks: list[list[packing.Document | None]]) -> Made:
        every = [document for chunk in chunks for document in chunk]
        documents = [document for document in every if document is not None]
        packed, single = packing.pack(documents, self._length, self._naive)
        ids, segments = packing.as_arrays(packed, self._length, self._facts.pad_id)
        tokens = np.array([sequence.tokens for sequence in packed], dtype=np.int32)
        slices = [pa.array([s.key[i] for s in packed], pa.string()) for i in range(len(self._slices))]  # type: ignore[index]
        columns = [pa.array([s.source for s in packed], pa.string()), *slices, _fixed(ids), _fixed(segments)]
        table = pa.table([*columns, pa.array(tokens)], schema=self._schema)
        dropped = +Counter({"empty": len(every) - len(documents), "single token": single})
        named = pa.array(["\n".join(s.sources) for s in packed], pa.string())
        return Made(table, int(tokens.sum()), dropped, None if self._naive else named)

    def _ended(self, ids: list[int]) -> list[int]:
        end = self._facts.end_id
        assert end is not None
        return ids if ids and ids[-1] == end else [*ids, end]


def _leading(slices: Sequence[str]) -> list[pa.Field]:
    return [pa.field("source", pa.string()), *(pa.field(f"slice.{name}", pa.string()) for name in slices)]


def _leading_columns(rows: Rows, slices: Sequence[str]) -> list[pa.Array]:
    return [pa.array(rows.sources), *(pa.array(categories(rows, name), pa.string()) for name in slices)]


def _fixed(values: np.ndarray) -> pa.Array:
    """[n, width] as a column of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])
