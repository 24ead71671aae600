"""Everything that a logit store promises, checked. Each broken promise is one sentence; damage never crashes this."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cluster.errors import FileError
from cluster.files import Folder, sha256
from distill_jobs.data.batch import IGNORED, next_tokens
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import MANIFEST, PartRecord, read_record
from distill_jobs.errors import DataError, StoreError
from distill_jobs.store.plan import PARTS, SPLIT, StorePlan
from distill_jobs.store.reader import LogitStore, read_manifest
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.store.writer import PREFIX, contract

MASS_TOLERANCE = 0.02
"""fp16 rounds a log-probability near -16 by up to 0.008, and so the mass of a flat distribution."""

_ROWS_AT_ONCE = 64


def verify(folder: Folder, data: Folder | None = None) -> list[str]:
    """Check a whole store; an empty list means that all is well.

    Checked are: plan and manifest (present, valid, of one another), a commit record for every planned part, each
    file's size and SHA-256, the schema, sample ids (none twice, each in the part that it names, the same as the
    data's where ``data`` is given), finite values, class ids and gold ranks in range, no class twice in a head, and
    probabilities that add up to one.
    """
    try:
        plan = StorePlan.load(folder)
        manifest = read_manifest(folder, plan)
    except (StoreError, FileError) as error:
        return [str(error)]
    expected = contract(plan)
    found = [
        f"{folder}/{MANIFEST} says {name} {manifest.get(name)!r}, but by the plan it is {value!r}"
        for name, value in expected.items()
        if manifest.get(name) != value
    ]
    found += _records(folder, plan, manifest)
    if found:
        # What lies in files that are not the ones written needs no reading.
        return found
    try:
        return [*_rows(folder, plan, data)]
    except (StoreError, DataError, FileError) as error:
        return [str(error)]


def labels_of(columns: dict[str, np.ndarray], facts: DataFacts) -> torch.Tensor:
    """The right class at each position, [rows, positions]; -100 where nothing is scored."""
    if facts.features == "documents":
        ids = torch.from_numpy(columns["input_ids"].astype(np.int64))
        return next_tokens(ids, torch.from_numpy(columns["segments"].astype(np.int64)))
    return torch.from_numpy(columns["label"].astype(np.int64))[:, None]


def _records(folder: Folder, plan: StorePlan, manifest: dict[str, Any]) -> Iterator[str]:
    parts = folder / PARTS
    try:
        if sha256(parts, MANIFEST) != manifest.get("table_sha256"):
            yield f"{parts}/{MANIFEST} is not the file that was written: its SHA-256 differs"
        table = TableReader(parts, error=StoreError)
    except (StoreError, FileError) as error:
        yield str(error)
        return
    if table.parts != plan.parts:
        yield f"the plan has {plan.parts} parts, but {parts}/{MANIFEST} lists {table.parts}"
        return
    records: list[PartRecord] = []
    for part in range(plan.parts):
        try:
            record = read_record(parts, part)
        except (DataError, FileError) as error:
            yield str(error)
            continue
        if record is None:
            yield f"part {part} has no commit record in {parts}"
            continue
        records.append(record)
        yield from _file(parts, plan, part, record, table)
    if len(records) == plan.parts:
        for name in ("rows", "tokens", "bytes"):
            total = sum(getattr(record, name) for record in records)
            if total != manifest[name]:
                yield f"the manifest counts {manifest[name]} {name}, but the parts add up to {total}"


def _file(parts: Folder, plan: StorePlan, part: int, record: PartRecord, table: TableReader) -> Iterator[str]:
    if record.part != part:
        yield f"the commit record of part {part} speaks of part {record.part}"
    if record.inputs != plan.part_inputs(str(record.extra.get("data_sha256", ""))):
        yield f"part {part} was made under another plan"
    if record.file != table.facts["part_files"][part] or record.rows != table.facts["part_rows"][part]:
        yield f"the manifest and the commit record of part {part} disagree about its file or rows"
    if record.file is None:
        return
    try:
        if parts.size(record.file) != record.bytes:
            yield f"{parts}/{record.file} has {parts.size(record.file)} bytes, not the {record.bytes} written"
        elif sha256(parts, record.file) != record.sha256:
            yield f"{parts}/{record.file} is not the file that was written: its SHA-256 differs"
    except (FileError, OSError) as error:
        yield f"part {part}: {error}"


def _rows(folder: Folder, plan: StorePlan, data: Folder | None) -> Iterator[str]:
    table = TableReader(folder / PARTS, error=StoreError)
    source = None
    if data is not None:
        facts = DataFacts.load(data)
        if facts.fingerprint != plan.data_fingerprint:
            yield f"the store was made from other data than {data}: the fingerprints differ"
        else:
            source = TableReader(data / SPLIT, error=StoreError)
            if source.facts["part_rows"] != table.facts["part_rows"]:
                yield f"{data} and the store don't hold the same number of rows in every part"
                source = None
    if not table.rows:
        yield f"{folder} holds no rows"
        return
    # Reads soft targets and labels alone, so that it needs no pixels.
    store = LogitStore(plan, {}, table, None)
    wanted = [name for name in table.schema.names if name.startswith(PREFIX)]
    wanted += ["input_ids", "segments"] if store.facts.features == "documents" else ["label"]
    for part in range(table.parts):
        numbers = np.asarray(table.part_range(part), dtype=np.int64)
        yield from _ids(part, table, source, numbers)
        for start in range(0, len(numbers), _ROWS_AT_ONCE):
            columns = table.take(numbers[start : start + _ROWS_AT_ONCE], wanted)
            for problem in _values(store, columns):
                yield f"part {part}, rows {start} to {start + len(columns[wanted[0]]) - 1}: {problem}"


def _ids(part: int, table: TableReader, source: TableReader | None, numbers: np.ndarray) -> Iterator[str]:
    if not len(numbers):
        return
    ids = table.take(numbers, ["sample_id"])["sample_id"]
    if len(np.unique(ids)) != len(ids):
        yield f"part {part} holds a sample id twice"
    if np.any(ids >> 32 != part):
        yield f"part {part} holds sample ids of another part"
    if source is not None and not np.array_equal(ids, source.take(numbers, ["sample_id"])["sample_id"]):
        yield f"part {part} does not hold the rows of the data's part {part} in their order"


def _values(store: LogitStore, columns: dict[str, np.ndarray]) -> Iterator[str]:
    for name, values in columns.items():
        if name.startswith(PREFIX) and values.dtype.kind == "f" and not np.isfinite(values).all():
            yield f"{name} holds values that are not finite"
            return
    labels = labels_of(columns, store.facts)
    keep = labels != IGNORED
    if bool((labels[keep] >= store.plan.classes).any()) or bool((labels[keep] < 0).any()):
        yield f"labels lie outside 0 … {store.plan.classes - 1}"
    try:
        signal = store.signal(columns, "cpu", keep)
    except StoreError as error:
        yield str(error)
        return
    yield from check_signal(signal)


def check_signal(signal: TeacherSignal) -> Iterator[str]:
    """What is wrong with a signal whose every position has a gold class, one sentence for each kind of fault."""
    if not len(signal):
        return
    head, tail = signal.head_logprob.double(), signal.tail_nodes
    mass = head.exp().sum(dim=-1)
    if tail is not None:
        mass = mass + signal.tail_at(1.0).double().exp()
    worst = float((mass - 1).abs().max())
    if not worst <= MASS_TOLERANCE:
        yield f"probabilities add up to {float(mass[(mass - 1).abs().argmax()]):.4g}, not 1"
    if signal.head_ids is not None:
        ids = signal.head_ids.sort(dim=-1).values
        if bool((ids[:, 1:] == ids[:, :-1]).any()):
            yield "a class stands twice in one head"
        if int(ids.max()) >= signal.classes:
            yield f"class ids reach {int(ids.max())}, but there are {signal.classes} classes"
    if bool((signal.gold_rank < 0).any()):
        yield "positions that are scored have no gold rank"
    if int(signal.gold_rank.max()) >= signal.classes:
        yield f"gold ranks reach {int(signal.gold_rank.max())}, but there are {signal.classes} classes"
    if bool((signal.gold_logprob > 1e-3).any()):
        yield "a gold log-probability is above 0"
    if bool((signal.entropy < -1e-3).any()) or bool((signal.entropy > np.log(signal.classes) + 1e-2).any()):
        yield f"an entropy lies outside 0 … log {signal.classes}"
