"""Writing a logit store: part by part, each committed by its record, and the manifest last."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from cluster.errors import FileError
from cluster.files import Folder, digest, sha256
from cluster.meter import Usage
from distill_jobs.data.commits import Commits
from distill_jobs.data.table import MANIFEST, PartRecord, commit_part, record_name
from distill_jobs.errors import DataError, StoreError
from distill_jobs.store.codecs import Field
from distill_jobs.store.plan import PARTS, PLAN, StorePlan, refuse_cold
from distill_jobs.store.quarantine import FILE, QUARANTINE, Quarantined, sweep, without_quarantine, write_quarantine

PREFIX = "t."
STAYS_IN_DATA = "pixels"
SEAL = "digest"


def start(folder: Folder, plan: StorePlan, data_sha256: Sequence[str] | None = None) -> Commits:
    """Begin, go on with or grow a store: write the plan, and find the parts that need not be made.

    Those are the committed parts of the same contract whose part of the data has not changed. A store that was made
    under another plan loses its manifest here, so that it no longer counts as complete.

    Args:
        data_sha256: SHA-256 of each of the data's parts (``part_sha256`` of their manifest); None without data.
    """
    refuse_cold(folder)
    if not _same_plan(folder, plan):
        folder.remove(MANIFEST)
        plan.save(folder)
    commits = Commits.open(folder / PARTS, plan.parts, _inputs(plan, data_sha256))
    lost = without_quarantine(folder, commits)
    if not lost:
        return commits
    # Nothing tells any more which rows those are: the parts are made again.
    for part in lost:
        (folder / PARTS).remove(record_name(part))
    return Commits.open(folder / PARTS, plan.parts, _inputs(plan, data_sha256))


def write_part(
    folder: Folder,
    plan: StorePlan,
    part: int,
    source: Iterable[pa.RecordBatch],
    targets: Iterable[dict[str, Tensor]],
    *,
    data_sha256: str = "",
    usage: Usage | Callable[[], Usage] | None = None,
    extra: dict[str, Any] | None = None,
    quarantined: Callable[[], Sequence[Quarantined]] | None = None,
) -> PartRecord:
    """Write one part of the store, and beside it what the teacher could not score, and commit both.

    Args:
        source: the rows of the data's part ``part`` that are kept, in order, as record batches of any sizes. They may
            be made as they are asked for: no more than the rows of one record batch of the store are held.
        targets: for each of them what codec and features ``encode``: [rows · positions_per_row, width] for each field.
        data_sha256: SHA-256 of the data's part; empty where it has no rows or there are no data.
        usage: what making it has used; a function is asked once all batches have been made and written.
        quarantined: asked then for the rows of the data's part that ``source`` has left out.

    Raises:
        StoreError: ``targets`` doesn't fit ``source`` or the codec, or a quarantined row is of another part.
    """
    fields = plan.fields()
    counted = _Counted(source)
    batches = iter(counted)
    first = next(batches, None)
    schema = store_schema(first.schema if first is not None else pa.schema([]), fields, plan.positions_per_row)
    rows = itertools.chain([first] if first is not None else [], batches)
    joined = _joined(rows, targets, schema, fields, plan.positions_per_row)
    mine: dict[str, Any] = {}

    def beside() -> dict[str, Any]:
        mine.update(write_quarantine(folder, part, quarantined() if quarantined else ()))
        return mine

    record = commit_part(
        folder / PARTS,
        part,
        schema,
        _recut(joined, plan.make_facts().rows_per_batch),
        inputs=plan.part_inputs(data_sha256),
        tokens=lambda: counted.tokens,
        usage=usage,
        extra={**(extra or {}), "data_sha256": data_sha256},
        beside=beside,
    )
    if mine and record.extra.get(FILE) != mine[FILE]:
        # Another attempt was committed first.
        (folder / QUARANTINE).remove(mine[FILE])
    return record


def finish(folder: Folder, plan: StorePlan, commits: Commits) -> dict[str, Any]:
    """Declare the store complete: sweep up what dead attempts left, write the manifests, and return the store's own.

    Args:
        commits: as ``start`` gave them, and with every part since added. No attempt may be running any more.

    Raises:
        StoreError: parts are missing.
    """
    try:
        table = commits.manifest(rows_per_batch=plan.make_facts().rows_per_batch)
    except DataError as error:
        raise StoreError(f"{error}; capture again") from None
    sweep(folder, commits)
    manifest = {
        **contract(plan),
        "table_sha256": sha256(folder / PARTS, MANIFEST),
        **{name: table[name] for name in ("parts", "rows", "tokens", "bytes")},
        "quarantined": commits.quarantined,
    }
    manifest[SEAL] = seal(manifest)
    folder.write_json(MANIFEST, manifest)
    return manifest


def seal(manifest: dict[str, Any]) -> str:
    """The digest of everything else in a manifest, so that no value changes unnoticed."""
    return digest({name: value for name, value in manifest.items() if name != SEAL})


def contract(plan: StorePlan) -> dict[str, Any]:
    """What a store's manifest repeats of its plan, for those who read the manifest alone."""
    return {
        "schema_version": plan.schema_version,
        "plan": plan.digest,
        "codec": plan.codec,
        "bytes_per_position": plan.bytes_per_position,
        "positions_per_row": plan.positions_per_row,
    }


def store_schema(source: pa.Schema, fields: dict[str, Field], positions: int) -> pa.Schema:
    """The data's columns (pixels stay in ``data/``) and after them the soft target's, one list a row."""
    kept = [field for field in source if field.name != STAYS_IN_DATA]
    soft = [pa.field(PREFIX + name, column_type(field, positions)) for name, field in fields.items()]
    return pa.schema(kept + soft)


def column_type(field: Field, positions: int) -> pa.DataType:
    """The Arrow type of a field's column: all positions of a row behind one another."""
    return pa.list_(pa.from_numpy_dtype(np.dtype(field.dtype)), positions * field.width)


class _Counted:
    """Record batches as they pass by, and the tokens seen in them so far: one a row where there is no such column."""

    def __init__(self, source: Iterable[pa.RecordBatch]) -> None:
        self._source, self.tokens = source, 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self._source:
            told = "tokens" in batch.schema.names
            self.tokens += int(pc.sum(batch.column("tokens")).as_py() or 0) if told else batch.num_rows
            yield batch


def _recut(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[pa.RecordBatch]:
    """The same rows in record batches of ``size`` rows, the last of what is left: a reader locates rows by that."""
    held: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        while batch.num_rows:
            piece = batch.slice(0, size - rows)
            batch = batch.slice(piece.num_rows)
            held.append(piece)
            rows += piece.num_rows
            if rows == size:
                yield _one(held)
                held, rows = [], 0
    if held:
        yield _one(held)


def _one(pieces: list[pa.RecordBatch]) -> pa.RecordBatch:
    batch = pieces[0] if len(pieces) == 1 else pa.concat_batches(pieces)
    every = pa.array(np.arange(batch.num_rows))
    # Arrow fills a slice of text up with what lies behind it: copied, the same rows give the same bytes.
    columns = [column.take(every) if pa.types.is_string(column.type) else column for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def _joined(
    source: Iterable[pa.RecordBatch],
    targets: Iterable[dict[str, Tensor]],
    schema: pa.Schema,
    fields: dict[str, Field],
    positions: int,
) -> Iterator[pa.RecordBatch]:
    for batch, target in itertools.zip_longest(source, targets):
        if batch is None or target is None:
            raise StoreError("there are not as many soft targets as record batches in the data's part")
        columns = [batch.column(name) for name in batch.schema.names if name != STAYS_IN_DATA]
        columns += [_column(name, field, target, batch.num_rows, positions) for name, field in fields.items()]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _column(name: str, field: Field, target: dict[str, Tensor], rows: int, positions: int) -> pa.Array:
    values = target[name].detach().cpu().contiguous().numpy()
    if values.shape != (rows * positions, field.width) or values.dtype != np.dtype(field.dtype):
        raise StoreError(
            f"the soft target {name} is {values.dtype} {list(values.shape)}, but {rows} rows of {positions} positions "
            f"take {field.dtype} [{rows * positions}, {field.width}]"
        )
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), positions * field.width)


def _inputs(plan: StorePlan, data_sha256: Sequence[str] | None) -> Callable[[int], str]:
    if data_sha256 is None:
        return lambda _: plan.part_inputs("")
    if len(data_sha256) != plan.parts:
        raise StoreError(
            f"the plan has {plan.parts} parts, but the data beside it {len(data_sha256)}; prepare the data again"
        )
    return lambda part: plan.part_inputs(data_sha256[part])


def _same_plan(folder: Folder, plan: StorePlan) -> bool:
    try:
        return folder.exists(PLAN) and StorePlan.load(folder).digest == plan.digest
    except (StoreError, FileError):
        return False
