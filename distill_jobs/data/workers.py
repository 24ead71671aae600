"""What an actor does to one range of the user's rows, in the two passes of preparing: fit, then cut into parts."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.files import Folder
from cluster.meter import Meter, Usage
from distill_jobs.data.encode import Made, make_row_encoder
from distill_jobs.data.encoder import Tally
from distill_jobs.data.facts import ROWS_PER_BATCH, SPLITS
from distill_jobs.data.rows import RangeReader, Rows
from distill_jobs.data.sources import Range
from distill_jobs.data.table import PartRecord, commit_part, sample_id
from distill_jobs.data.tokenizer import TokenizerFacts
from distill_jobs.data.values import labels
from distill_jobs.errors import DataError
from distill_jobs.spec import Data

FIT = "fit"
MOST_CLASSES = 10_000


@dataclass(frozen=True)
class Work:
    """All that a worker must know; ``inputs`` is the digest of everything that its results depend on."""

    data: Data
    folder: Folder
    inputs: str
    classes: tuple[str, ...] = ()
    tokenizer: TokenizerFacts | None = None

    def splits(self, group: str) -> list[str]:
        """The splits that a source group is cut into: ``train`` also gives those that are a share of it."""
        if group != "train":
            return [group]
        return [name for name in SPLITS if name == "train" or isinstance(getattr(self.data, name), float)]

    def split_rows(self, group: str, rows: Rows) -> dict[str, Rows]:
        """The rows of each split, by a hash of where a row stands: the same whoever asks."""
        splits = self.splits(group)
        if len(splits) == 1:
            return {splits[0]: rows}
        shares = {name: getattr(self.data, name) for name in splits if name != "train"}
        place = np.array([_split_of(source, shares) for source in rows.sources])
        return {name: rows.select(place == name) for name in splits}


class FitWorker:
    """First pass: what a range contributes to the tabular encoder and to the list of classes, as one JSON file."""

    def __init__(self, work: Work) -> None:
        tabular = work.data.features.tabular
        columns = [*tabular.numeric, *tabular.categorical] if tabular else []
        labelled = [work.data.label] if work.data.label and work.data.label not in columns else []
        self._work, self._reader = work, RangeReader(columns + labelled, text_column(work.data))

    def run(self, shard: Range) -> str:
        """Count the range; returns the name of the file in ``fit/`` that holds the result."""
        tally, found = Tally(), set[str]()
        tabular, label = self._work.data.features.tabular, self._work.data.label
        for rows in self._reader.read(shard):
            if label is not None:
                found.update(labels(rows, label))
                check_class_count(len(found), label)
            if tabular is not None:
                tally.add(self._work.split_rows(shard.group, rows)["train"], tabular)
        result = {"inputs": self._work.inputs, "tally": tally.as_dict(), "labels": sorted(found)}
        name = fit_name(shard.number)
        (self._work.folder / FIT).write_json(name, result)
        return name


class PrepareWorker:
    """Second pass: one range becomes one part of each split that is cut from it.

    It holds the encoded rows of one range in memory: ``data.rows_per_part`` bounds that.
    """

    def __init__(self, work: Work) -> None:
        self._work, self._reader = work, RangeReader(list(needed_columns(work.data)), text_column(work.data))
        self._encoder = make_row_encoder(work.data, work.classes, work.tokenizer, work.folder)

    def run(self, shard: Range) -> dict[str, PartRecord]:
        """Read, encode and commit; returns the commit record of each split's part."""
        chunks: dict[str, list[Any]] = {name: [] for name in self._work.splits(shard.group)}
        with Meter() as meter:
            for rows in self._reader.read(shard):
                for split, chosen in self._work.split_rows(shard.group, rows).items():
                    chunks[split].append(self._encoder.encode(chosen))
            made = {split: self._encoder.assemble(some) for split, some in chunks.items()}
        # The range was read once for all its splits: the first of them carries what that has used.
        first = next(iter(made))
        return {
            split: self._commit(split, shard.number, one, meter.usage if split == first else None)
            for split, one in made.items()
        }

    def _commit(self, split: str, part: int, made: Made, usage: Usage | None) -> PartRecord:
        table = made.table
        if split == "test" and made.documents is not None:
            # What is evaluated is counted by document; training needs no such names, and a store would carry them.
            table = table.append_column("documents", made.documents)
        ids = pa.array([sample_id(part, row) for row in range(table.num_rows)], pa.int64())
        table = table.add_column(0, pa.field("sample_id", pa.int64()), ids)
        size = 1 if self._work.data.features.kind == "documents" else ROWS_PER_BATCH
        return commit_part(
            self._work.folder / split,
            part,
            table.schema,
            _batches(table, size),
            inputs=self._work.inputs,
            tokens=made.tokens,
            usage=usage,
            extra={"dropped": dict(made.dropped)},
        )


def needed_columns(data: Data) -> dict[str, str]:
    """The columns that the spec names, each with the first place that names it."""
    features, kind = data.features.chosen, data.features.kind
    needed: dict[str, str] = {}
    if kind == "tabular":
        needed |= dict.fromkeys(features.numeric, "data.features.tabular.numeric")
        needed |= dict.fromkeys(features.categorical, "data.features.tabular.categorical")
    else:
        needed[features.column] = f"data.features.{kind}.column"
    if data.label is not None:
        needed.setdefault(data.label, "data.label")
    for name in data.slices:
        needed.setdefault(name, "data.slices")
    return needed


def text_column(data: Data) -> str:
    """The column name that the content of a plain text file goes by."""
    return str(getattr(data.features.chosen, "column", "text"))


def fit_name(number: int) -> str:
    return f"range-{number:05d}.json"


def check_class_count(count: int, label: str) -> None:
    """More distinct labels than a classifier has any use for mean that the label is not a class."""
    if count > MOST_CLASSES:
        raise DataError(f"the label {label} has more than {MOST_CLASSES} different values; is it a class at all?")


def _split_of(source: str, shares: dict[str, float]) -> str:
    at = int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest()) / 2**64
    for name, share in shares.items():
        if at < share:
            return name
        at -= share
    return "train"


def _batches(table: pa.Table, size: int) -> Iterator[pa.RecordBatch]:
    whole = table.combine_chunks()
    for start in range(0, whole.num_rows, size):
        yield from whole.slice(start, size).to_batches()
