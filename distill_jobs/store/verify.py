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
from distill_jobs.store.check import check_signal
from distill_jobs.store.plan import PARTS, SPLIT, StorePlan
from distill_jobs.store.reader import LogitStore, as_tensor, open_parts, read_manifest
from distill_jobs.store.writer import PREFIX, contract

_POSITIONS_AT_ONCE = 1 << 14


def verify(folder: Folder, data: Folder | None = None) -> list[str]:
    """Check a whole store; an empty list means that all is well.

    Checked are: plan and manifest (present, valid, sealed, of one another), a commit record for every planned part that
    agrees with both and was made from the data's part where ``data`` is given, each file's size and SHA-256, the
    schema, and every row of the data there, in its place, once. Then the values: finite, class ids and gold ranks in
    range, no class twice in a head, no draw that the head holds, all draws counted, the gold class as likely as the
    head has it, and probabilities that add up to one.
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
    try:
        table = open_parts(folder, plan, manifest)
        source, problem = _source(plan, table, data)
        found += [problem] if problem else []
        found += _records(folder / PARTS, plan, manifest, table, source)
        # What lies in files that are not the ones written needs no reading.
        return found or [*_rows(folder, plan, table, source)]
    except (StoreError, DataError, FileError) as error:
        return [*found, str(error)]


def labels_of(columns: dict[str, np.ndarray], facts: DataFacts) -> torch.Tensor:
    """The right class at each position, [rows, positions]; -100 where nothing is scored."""
    if facts.features == "documents":
        ids = torch.from_numpy(columns["input_ids"].astype(np.int64))
        return next_tokens(ids, torch.from_numpy(columns["segments"].astype(np.int64)))
    return torch.from_numpy(columns["label"].astype(np.int64))[:, None]


def _source(plan: StorePlan, table: TableReader, data: Folder | None) -> tuple[TableReader | None, str | None]:
    """The data's training split, or what is wrong with it."""
    if data is None:
        return None, None
    if DataFacts.load(data).fingerprint != plan.data_fingerprint:
        return None, f"the store was made from other data than {data}: the fingerprints differ"
    source = TableReader(data / SPLIT, error=StoreError)
    if source.facts["part_rows"] != table.facts["part_rows"]:
        return None, f"{data} and the store don't hold the same number of rows in every part"
    return source, None


def _records(
    parts: Folder, plan: StorePlan, manifest: dict[str, Any], table: TableReader, source: TableReader | None
) -> Iterator[str]:
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
        yield from _made_from(plan, part, record, source)
        yield from _file(parts, part, record, table)
    if len(records) == plan.parts:
        for name in ("rows", "tokens", "bytes"):
            total = sum(getattr(record, name) for record in records)
            if total != manifest[name]:
                yield f"the manifest counts {manifest[name]} {name}, but the parts add up to {total}"


def _made_from(plan: StorePlan, part: int, record: PartRecord, source: TableReader | None) -> Iterator[str]:
    made_from = str(record.extra.get("data_sha256", ""))
    if record.inputs != plan.part_inputs(made_from):
        yield f"part {part} was made under another plan"
    if source is not None and made_from != _listed(source, "part_sha256", part):
        yield f"part {part} was made from another part {part} of the data than the one that is there"


def _file(parts: Folder, part: int, record: PartRecord, table: TableReader) -> Iterator[str]:
    if record.part != part:
        yield f"the commit record of part {part} speaks of part {record.part}"
    listed = [_listed(table, name, part) for name in ("part_files", "part_rows", "part_sha256")]
    if listed != [record.file, record.rows, record.sha256]:
        yield f"the manifest and the commit record of part {part} disagree about its file, rows or SHA-256"
    if record.file is None:
        return
    try:
        if parts.size(record.file) != record.bytes:
            yield f"{parts}/{record.file} has {parts.size(record.file)} bytes, not the {record.bytes} written"
        elif sha256(parts, record.file) != record.sha256:
            yield f"{parts}/{record.file} is not the file that was written: its SHA-256 differs"
    except (FileError, OSError) as error:
        yield f"part {part}: {error}"


def _listed(table: TableReader, name: str, part: int) -> Any:
    values = table.facts.get(name)
    return values[part] if isinstance(values, list) and part < len(values) else None


def _rows(folder: Folder, plan: StorePlan, table: TableReader, source: TableReader | None) -> Iterator[str]:
    if not table.rows:
        yield f"{folder} holds no rows"
        return
    # Reads soft targets and labels alone, so that it needs no pixels.
    store = LogitStore(plan, {}, table, None)
    wanted = [name for name in table.schema.names if name.startswith(PREFIX)]
    wanted += ["input_ids", "segments"] if store.facts.features == "documents" else ["label"]
    at_once = max(1, _POSITIONS_AT_ONCE // plan.positions_per_row)
    for part in range(table.parts):
        numbers = np.asarray(table.part_range(part), dtype=np.int64)
        yield from _ids(part, table, source, numbers)
        for start in range(0, len(numbers), at_once):
            columns = table.take(numbers[start : start + at_once], wanted)
            for problem in _values(store, columns):
                yield f"part {part}, rows {start} to {start + len(columns[wanted[0]]) - 1}: {problem}"


def _ids(part: int, table: TableReader, source: TableReader | None, numbers: np.ndarray) -> Iterator[str]:
    if not len(numbers):
        return
    ids = table.take(numbers, ["sample_id"])["sample_id"]
    if len(np.unique(ids)) != len(ids):
        yield f"part {part} holds a sample id twice"
    elif np.any(ids >> 32 != part):
        yield f"part {part} holds sample ids of another part"
    elif np.any(np.diff(ids) != 1) or ids[0] & 0xFFFFFFFF:
        yield f"part {part} does not hold its rows in the order of their sample ids, none missing"
    if source is not None and not np.array_equal(ids, source.take(numbers, ["sample_id"])["sample_id"]):
        yield f"part {part} does not hold the rows of the data's part {part} in their order"


def _values(store: LogitStore, columns: dict[str, np.ndarray]) -> Iterator[str]:
    labels = labels_of(columns, store.facts)
    keep = labels != IGNORED
    if bool((labels[keep] >= store.plan.classes).any()) or bool((labels[keep] < 0).any()):
        yield f"labels lie outside 0 … {store.plan.classes - 1}"
        return
    try:
        signal = store.signal(columns, "cpu", keep)
        codec, classes = store.plan.make_codec(), store.plan.classes
        shaped = {name: columns[PREFIX + name].reshape(-1, f.width) for name, f in codec.fields(classes).items()}
        codec.check({name: as_tensor(values) for name, values in shaped.items()}, classes)
    except StoreError as error:
        yield str(error)
        return
    yield from check_signal(signal, labels[keep])
