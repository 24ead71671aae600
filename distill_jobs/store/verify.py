"""Everything that a logit store promises, checked. Each broken promise is one sentence; damage never crashes this."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from cluster.errors import FileError
from cluster.files import Folder, json_bytes, sha256
from distill_jobs.data.batch import IGNORED, next_tokens
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import MANIFEST, PartRecord, read_record
from distill_jobs.errors import DataError, ModelError, StoreError
from distill_jobs.models.files import model_digest
from distill_jobs.store.check import check_signal
from distill_jobs.store.coverage import uncovered
from distill_jobs.store.plan import PARTS, PLAN, SPLIT, StorePlan
from distill_jobs.store.quarantine import read_quarantine
from distill_jobs.store.reader import LogitStore, open_parts, read_manifest
from distill_jobs.store.writer import PREFIX, contract

_POSITIONS_AT_ONCE = 1 << 14


def verify(folder: Folder, data: Folder | None = None, teacher: Folder | None = None) -> list[str]:
    """Check a whole store; an empty list means that all is well.

    Checked are: plan and manifests (present, valid, sealed, in the very form in which they were written, of one
    another), a sealed commit record for every planned part that agrees with them and was made from the data's part
    where ``data`` is given, size and SHA-256 of each part and of each file of the quarantine, and the schema. Every row
    of the data is in one part, in its place, or in the quarantine with its reason: none in both, twice or nowhere.
    Then the values: finite, class ids and gold ranks in range, no class twice in a head, no draw that the head holds,
    all draws counted, the gold class as likely as the head has it, probabilities that add up to one, and features that
    fit their scales.

    Args:
        data: what the store was made from. Without them the plan's facts and the ids themselves tell what there was.
        teacher: the model's folder, to see whether the store is of this teacher.
    """
    found: list[str] = []
    try:
        plan = StorePlan.load(folder)
        manifest = read_manifest(folder, plan)
        found += [*_of_one_another(folder, plan, manifest), *_counts(plan, manifest)]
        table = open_parts(folder, plan, manifest)
        if teacher is not None and model_digest(teacher) != plan.teacher:
            found.append(f"the store was made by another teacher than the one in {teacher}")
        source, problem = _source(plan, table, data)
        found += [problem] if problem else []
        found += _records(folder, plan, manifest, table, source)
        # What lies in files that are not the ones written needs no reading.
        return found or [*_rows(folder, plan, table, source)]
    except (StoreError, DataError, FileError, ModelError) as error:
        return [*found, str(error)]


def labels_of(columns: dict[str, np.ndarray], facts: DataFacts) -> torch.Tensor:
    """The right class at each position, [rows, positions]; -100 where nothing is scored."""
    if facts.features == "documents":
        ids = torch.from_numpy(columns["input_ids"].astype(np.int64))
        return next_tokens(ids, torch.from_numpy(columns["segments"].astype(np.int64)))
    return torch.from_numpy(columns["label"].astype(np.int64))[:, None]


def _of_one_another(folder: Folder, plan: StorePlan, manifest: dict[str, Any]) -> Iterator[str]:
    for name, value in contract(plan).items():
        if manifest.get(name) != value:
            yield f"{folder}/{MANIFEST} says {name} {manifest.get(name)!r}, but by the plan it is {value!r}"
    for name, values in ((PLAN, plan.as_dict()), (MANIFEST, manifest)):
        # The digests are of values: what changes only how these are written is seen by the bytes alone.
        try:
            same = folder.read(name) == json_bytes(values)
        except ValueError:
            # A number that is none: nobody writes that.
            same = False
        if not same:
            yield f"{folder}/{name} is not, to the byte, the file that was written"


def _counts(plan: StorePlan, manifest: dict[str, Any]) -> Iterator[str]:
    try:
        rows = plan.make_facts().splits[SPLIT]["rows"]
    except (KeyError, TypeError):
        yield "the plan does not say how many rows its data have"
        return
    held = manifest["rows"] + manifest["quarantined"]
    if rows != held:
        yield f"the plan is of data with {rows} rows, but {held} are in the store or in the quarantine"


def _source(plan: StorePlan, table: TableReader, data: Folder | None) -> tuple[TableReader | None, str | None]:
    """The data's training split, or what is wrong with it."""
    if data is None:
        return None, None
    if DataFacts.load(data).fingerprint != plan.data_fingerprint:
        return None, f"the store was made from other data than {data}: the fingerprints differ"
    source = TableReader(data / SPLIT, error=StoreError)
    if not np.array_equal(source.part_rows, table.part_rows + table.part_quarantined):
        return None, f"{data} and the store don't hold the same number of rows in every part"
    return source, None


def _records(
    folder: Folder, plan: StorePlan, manifest: dict[str, Any], table: TableReader, source: TableReader | None
) -> Iterator[str]:
    parts, whole = folder / PARTS, True
    totals = dict.fromkeys(("rows", "tokens", "bytes", "quarantined"), 0)
    for part in range(plan.parts):
        try:
            record = read_record(parts, part)
            if record is None:
                raise StoreError(f"part {part} has no commit record in {parts}")
        except (StoreError, DataError, FileError) as error:
            whole = False
            yield str(error)
            continue
        for name in totals:
            totals[name] += getattr(record, name)
        yield from _made_from(plan, part, record, source)
        yield from _file(parts, part, record, table)
        yield from _quarantine(folder, record)
    for name, total in totals.items():
        if whole and total != manifest[name]:
            yield f"the manifest counts {manifest[name]} {name}, but the parts add up to {total}"


def _quarantine(folder: Folder, record: PartRecord) -> Iterator[str]:
    try:
        read_quarantine(folder, record)
    except StoreError as error:
        yield str(error)


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
    listed.append(int(table.part_quarantined[part]))
    if listed != [record.file, record.rows, record.sha256, record.quarantined]:
        yield f"the manifest and the commit record of part {part} disagree about its file, rows, SHA-256 or quarantine"
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
    # Reads soft targets and labels alone, so that it needs no pixels. From here on parts are looked into when opened.
    store = LogitStore(plan, {}, table, None)
    for part in range(table.parts):
        yield from _covered(folder, part, table, source)
    if not table.rows:
        yield f"{folder} holds no rows"
        return
    wanted = [name for name in table.schema.names if name.startswith(PREFIX)]
    wanted += ["input_ids", "segments"] if store.facts.features == "documents" else ["label"]
    at_once = max(1, _POSITIONS_AT_ONCE // plan.positions_per_row)
    for part in range(table.parts):
        numbers = np.asarray(table.part_range(part), dtype=np.int64)
        for start in range(0, len(numbers), at_once):
            columns = table.take(numbers[start : start + at_once], wanted)
            for problem in _values(store, columns):
                yield f"part {part}, rows {start} to {start + len(columns[wanted[0]]) - 1}: {problem}"


def _covered(folder: Folder, part: int, table: TableReader, source: TableReader | None) -> Iterator[str]:
    ids, left_out = _ids(table, part), int(table.part_quarantined[part])
    record = read_record(folder / PARTS, part) if left_out else None
    quarantined = [row.sample_id for row in read_quarantine(folder, record)] if record else []
    own = None if source is None else _ids(source, part)
    yield from uncovered(part, ids, np.asarray(quarantined, dtype=np.int64), len(ids) + left_out, own)


def _ids(table: TableReader, part: int) -> np.ndarray:
    numbers = np.asarray(table.part_range(part), dtype=np.int64)
    return table.take(numbers, ["sample_id"])["sample_id"] if len(numbers) else numbers


def _values(store: LogitStore, columns: dict[str, np.ndarray]) -> Iterator[str]:
    labels = labels_of(columns, store.facts)
    keep = labels != IGNORED
    if bool((labels[keep] >= store.plan.classes).any()) or bool((labels[keep] < 0).any()):
        yield f"labels lie outside 0 … {store.plan.classes - 1}"
        return
    try:
        signal = store.signal(columns, "cpu", keep)
        store.check(columns)
    except StoreError as error:
        yield str(error)
        return
    yield from check_signal(signal, labels[keep])
