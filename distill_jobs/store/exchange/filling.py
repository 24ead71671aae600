"""One part of an imported store: a run of a file's rows, packed into sequences and their entries encoded.

Shapes: n rows, T tokens of a run, W entries listed at a position.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cluster.files import Folder
from cluster.meter import Meter
from distill_jobs.data.packing import Document, Sequence, as_arrays, pack
from distill_jobs.data.table import PartRecord, sample_id
from distill_jobs.data.tokenizer import TokenizerFacts
from distill_jobs.errors import DataError
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.exchange.lists import Documents
from distill_jobs.store.exchange.source import TOKENS, Listed, Source
from distill_jobs.store.exchange.sparse import ABSENT, listed, nothing_known, whole
from distill_jobs.store.plan import StorePlan
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.store.writer import write_part

_ENTRIES_AT_ONCE = 1 << 20
_EXACT_MASS, _LOSSY_MASS = 1.02, 2.0


@dataclass(frozen=True)
class Layout:
    """How the source is to be read.

    Attributes:
        form: ``topk`` (plain lists) or ``distillkit``.
        tokens, ids, values: names of columns of plain lists; None looks for the usual ones.
        kind: what the values are: ``logprobs`` (natural logarithm), ``logits`` or ``probs``.
        align: ``next``: entry t foretells token t+1; ``same``: entry t is about token t itself, and the first is idle.
        k: entries to keep; None takes what the source lists.
        length: tokens in a sequence; None takes the longest row.
        padded: width of the teacher's logits, where it exceeds the tokenizer's: entries beyond are no tokens.
        config: DistillKit's compression configuration; None looks beside the data.
        teacher: a name for the teacher.
    """

    form: str = "topk"
    tokens: str = TOKENS
    ids: str | None = None
    values: str | None = None
    kind: str = "logprobs"
    align: str = "next"
    k: int | None = None
    length: int | None = None
    padded: int | None = None
    config: str | None = None
    teacher: str = "unknown"


@dataclass(frozen=True)
class Run:
    """What one part is made from: the rows ``start`` … ``stop``-1 of a file, and the documents in them."""

    name: str
    sha256: str
    start: int
    stop: int
    documents: Documents

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return self.documents.lengths

    @property
    def identity(self) -> list[Any]:
        return [self.sha256, self.start, self.stop]


@dataclass(frozen=True)
class Work:
    """All that making a part takes beside its run of rows."""

    source: Source
    layout: Layout
    tokenizer: TokenizerFacts

    @property
    def length(self) -> int:
        return self.layout.length or 1

    @property
    def k(self) -> int:
        return self.layout.k or 1

    @property
    def classes(self) -> int:
        return self.tokenizer.vocabulary

    @property
    def padded(self) -> int:
        """Width of the teacher's logits: the tokenizer's size, or more."""
        coded = self.source.coding.d if self.source.coding else 0
        return max(self.classes, coded, self.layout.padded or 0)

    @property
    def rules(self) -> dict[str, Any]:
        """What shapes a part beside its rows, as plain values."""
        shaping = {name: value for name, value in asdict(self.layout).items() if name not in ("config", "teacher")}
        coding = asdict(self.source.coding) if self.source.coding else None
        return {**shaping, "coding": coding, "tokenizer": self.tokenizer.sha, "pad": self.tokenizer.pad_id}

    def sequences(self, run: Run) -> list[Sequence]:
        """The documents of a run packed; in place of token ids they hold the tokens' numbers within the run."""
        ends = np.cumsum(run.lengths)
        told = zip(ends.tolist(), run.lengths.tolist(), run.documents.rows.tolist(), strict=True)
        # pack() only cuts ids and counts them, which a range does without being held.
        documents = [
            Document(range(end - length, end), "", f"{run.name}:{row}")  # type: ignore[arg-type]
            for end, length, row in told
        ]
        return pack(documents, self.length)[0]


def write_rows(work: Work, into: Folder, plan: StorePlan, part: int, run: Run, inputs: str) -> PartRecord:
    with Meter() as meter:
        sequences = work.sequences(run)
        tokens, targets = _encoded(work, plan, run)
        # as_arrays writes the tokens' numbers; the number that fills a row up is that of the last, spare entry.
        places, segments = as_arrays(sequences, work.length, len(tokens) - 1)
        batches = _rows(part, sequences, tokens[places], segments)
        columns = ({name: values[row] for name, values in targets.items()} for row in torch.from_numpy(places).long())
        return write_part(into, plan, part, batches, columns, data_sha256=inputs, usage=meter.read)


def _rows(part: int, sequences: list[Sequence], ids: np.ndarray, segments: np.ndarray) -> Iterator[pa.RecordBatch]:
    for row, sequence in enumerate(sequences):
        length = ids.shape[1]
        yield pa.RecordBatch.from_pydict(
            {
                "sample_id": pa.array([sample_id(part, row)], pa.int64()),
                "source": pa.array([sequence.source]),
                "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids[row]), length),
                "segments": pa.FixedSizeListArray.from_arrays(pa.array(segments[row]), length),
                "tokens": pa.array([sequence.tokens], pa.int32()),
            }
        )


def _encoded(work: Work, plan: StorePlan, run: Run) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """All tokens of a run and their targets under the store's codec, [T + 1] each; the last entry is for padding."""
    codec = TopKCodec(**{name: value for name, value in plan.codec.items() if name != "name"})
    total = int(run.lengths.sum())
    tokens = np.full(total + 1, work.tokenizer.pad_id, dtype=np.int32)
    spare = codec.pack(nothing_known(work.classes, codec.k))
    targets = {name: value.new_empty((total + 1, *value.shape[1:])) for name, value in spare.items()}
    for name, value in spare.items():
        targets[name][-1] = value[0]
    at = 0
    width = max(codec.k, work.source.coding.k if work.source.coding else 0)
    positions = max(256, _ENTRIES_AT_ONCE // width)
    rows = int(np.clip(2 * positions // max(1, run.lengths.max()), 1, 256))
    for first, starts, flat, entries in work.source.read(run.name, run.start, run.stop, rows):
        where = f"{work.source.folder}/{run.name}, rows {first} to {first + len(starts) - 2}"
        documents = run.documents.within(first, first + len(starts) - 1).after(-first)
        chosen, gold, ids, values = _aligned(work, starts, flat, documents, entries, where)
        tokens[at : at + len(chosen)] = chosen
        for low in range(0, len(chosen), positions):
            some = slice(low, low + positions)
            packed = codec.pack(_signal(work, ids[some], values[some], gold[some], where))
            for name, value in packed.items():
                targets[name][at + low : at + low + len(value)] = value
        at += len(chosen)
    if at != total:
        raise DataError(f"{work.source.folder}/{run.name} has changed while it was read; import it again")
    return tokens, targets


def _aligned(
    work: Work, starts: np.ndarray, flat: np.ndarray, documents: Documents, entries: Listed, where: str
) -> tuple[np.ndarray, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each token kept of a batch of rows [T]: itself, the token that follows in its piece (-1 where none does),
    and the entries that foretell that one, [T, W] each."""
    shift = int(work.layout.align == "same")
    ends = documents.begins + documents.lengths
    whole_rows, given = np.diff(starts), np.diff(entries.starts)
    wrong = np.flatnonzero((given != whole_rows) & ((given != whole_rows - 1) | bool(shift)))
    if len(wrong):
        raise DataError(
            f"{where}: row {wrong[0]} of them has {whole_rows[wrong[0]]} tokens but lists entries for "
            f"{given[wrong[0]]} positions; it should be as many{'' if shift else ', or one fewer'}"
        )
    if (ends > whole_rows[documents.rows]).any():
        raise DataError(f"{where}: the file has changed while it was read; import it again")
    lengths = documents.lengths
    row, length = np.repeat(documents.rows, lengths), np.repeat(lengths, lengths)
    within = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    place = within + np.repeat(documents.begins, lengths)
    last = (within == length - 1) | (within % work.length == work.length - 1)
    following = flat[np.minimum(starts[row] + place + 1, len(flat) - 1)]
    # The last token of a row may have no entry: nothing is scored there.
    listed_there = place + shift < given[row]
    entry = np.where(listed_there, entries.starts[row] + place + shift, -1)
    # The last, spare entry stands for those that are not there.
    ids = np.pad(entries.ids, ((0, 1), (0, 0)), constant_values=ABSENT)[entry]
    values = np.pad(entries.values, ((0, 1), (0, 0)))[entry]
    gold = torch.from_numpy(np.where(last, -1, following))
    return flat[starts[row] + place], gold, torch.from_numpy(ids), torch.from_numpy(values)


def _signal(work: Work, ids: torch.Tensor, values: torch.Tensor, gold: torch.Tensor, where: str) -> TeacherSignal:
    coded = work.source.coding is not None
    # Columns of the teacher's output beyond the tokenizer's size are no classes.
    ids = ids.masked_fill((ids >= work.classes) & (ids < work.padded), ABSENT)
    try:
        ids, logprob = listed(ids, values, work.layout.kind, work.classes, _LOSSY_MASS if coded else _EXACT_MASS)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if bool(((ids == ABSENT).all(dim=-1) & (gold >= 0)).any()):
        raise DataError(f"{where}: a position lists nothing, so that there is no teacher to learn from")
    return whole(ids, logprob, gold, work.classes, work.k)
