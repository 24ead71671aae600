"""A table on disk: numbered Arrow parts, a commit record for each, and a manifest written last.

Both ``data/<split>`` and the logit store are such tables. A part is an uncompressed Arrow IPC file, named after its
number and the attempt that wrote it; its commit record ``part-00017.json`` is written after it and names it, so that
a part without a record does not count and an attempt that died leaves nothing that is read. The presence of
``manifest.json`` means that every part is committed.

A *row* is one sample: a packed sequence, or one row of a classification table. ``sample_id`` is
``part << 32 | row within the part``: unique, fixed by the data and the split alone, and it says where the row lies.
"""

import json
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from cluster.commit import hashed
from cluster.files import Folder, digest, json_bytes
from cluster.meter import Usage, writer_name
from distill_jobs.errors import DataError

MANIFEST = "manifest.json"
_SEAL = "digest"
_FILE = re.compile(r"part-\d{5,18}\.[0-9a-f]{8}\.arrow")


def sample_id(part: int, row: int) -> int:
    """The id of row ``row`` of part ``part``."""
    return part << 32 | row


def where(sample: int) -> tuple[int, int]:
    """The part and the row within it of a sample id."""
    return sample >> 32, sample & 0xFFFFFFFF


def record_name(part: int) -> str:
    return f"part-{part:05d}.json"


@dataclass(frozen=True)
class PartRecord:
    """The commit record of one part. ``file`` is None for a part without rows.

    ``quarantined`` counts the rows of the data's part that are not in this one because they stand in the quarantine.
    """

    part: int
    file: str | None
    rows: int
    tokens: int
    bytes: int
    sha256: str
    inputs: str
    writer: str = ""
    quarantined: int = 0
    usage: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Any, origin: str) -> "PartRecord":
        """Check what was read from a record file; raises DataError naming ``origin``."""
        try:
            record = cls(**values)
            sizes = (record.part, record.rows, record.tokens, record.bytes, record.quarantined)
            sizes_ok = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62 for n in sizes)
            sizes_ok = sizes_ok and max(record.rows, record.quarantined) < 1 << 32
            name, sha = record.file, record.sha256
            # A record must never lead the reader out of its own folder.
            name_ok = name is None or bool(_FILE.fullmatch(name) and name.startswith(f"part-{record.part:05d}."))
            whole = (name is None) == (record.rows == 0) and bool(re.fullmatch("[0-9a-f]{64}" if name else "", sha))
            whole = whole and isinstance(record.usage, dict) and isinstance(record.extra, dict)
            if not (sizes_ok and name_ok and whole):
                raise TypeError
        except (TypeError, ValueError):
            raise DataError(f"{origin} is not a valid commit record; make the part again") from None
        return record


def commit_part(
    folder: Folder,
    part: int,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    *,
    inputs: str,
    tokens: int | Callable[[], int] | None = None,
    usage: Usage | Callable[[], Usage] | None = None,
    extra: dict[str, Any] | None = None,
    beside: Callable[[], dict[str, Any]] | None = None,
) -> PartRecord:
    """Write one part and then its commit record; of several attempts at one part, the first to commit stays.

    Args:
        inputs: digest of everything the part was made from; a part with another digest is made again.
        tokens: tokens in the part, or a function that is asked once the part is written; None counts one a row.
        usage: what making it has used; a function is asked once all batches have been made and written.
        beside: called after the part was written and before its record is; what it returns joins ``extra``, but for
            ``quarantined``, the number of rows that are in the quarantine in place of the part.

    Returns:
        the record that counts: this attempt's, or another's that was committed meanwhile from the same inputs. Then
        this attempt's part is removed again; what ``beside`` wrote is left to be swept.
    """
    file = f"part-{part:05d}.{uuid.uuid4().hex[:8]}.arrow"
    rows, size, sha = _write(folder, file, schema, batches)
    there = adopted(folder, part, inputs)
    if there is None:
        more = {**(extra or {}), **(beside() if beside else {})}
        record = PartRecord(
            part=part,
            file=file if rows else None,
            rows=rows,
            tokens=rows if tokens is None else tokens() if callable(tokens) else tokens,
            bytes=size,
            sha256=sha,
            inputs=inputs,
            writer=writer_name(),
            quarantined=more.pop("quarantined", 0),
            usage=((usage() if callable(usage) else usage) or Usage()).as_dict(),
            extra=more,
        )
        there = _commit(folder, record)
    if rows and there.file != file:
        folder.remove(file)
    return there


def adopted(folder: Folder, part: int, inputs: str) -> PartRecord | None:
    """The record of a part that is committed, valid and made from ``inputs``: there is nothing left to do then."""
    try:
        record = read_record(folder, part)
        fits = record is not None and record.part == part and record.inputs == inputs
        return record if fits and record and (record.file is None or folder.exists(record.file)) else None
    except DataError:
        return None


def read_record(folder: Folder, part: int) -> PartRecord | None:
    """The commit record of a part, or None when the part is not committed.

    Raises:
        DataError: the file is not, to the byte, a record as it was written.
    """
    name = record_name(part)
    raw, origin = folder.find(name), f"{folder}/{name}"
    if raw is None:
        return None
    try:
        values = json.loads(raw.decode())
        told = values.pop(_SEAL, None)
        # One form for one value, and a digest over all values: no flipped bit leaves both as they were.
        whole = told == digest(values) and json_bytes({**values, _SEAL: told}) == raw
    except (ValueError, TypeError, AttributeError, RecursionError):
        whole, values = False, {}
    if not whole:
        raise DataError(f"{origin} is not a valid commit record; make the part again")
    return PartRecord.of(values, origin)


def _write(folder: Folder, file: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> tuple[int, int, str]:
    """Write an attempt's file; its rows, bytes and SHA-256. Without rows there is no file."""
    rows = 0
    with folder.create(file) as sink, hashed(sink) as (stream, written), pa.ipc.new_file(stream, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += batch.num_rows
    if rows == 0:
        folder.remove(file)
        return 0, 0, ""
    return rows, written.bytes, written.sha256


def _commit(folder: Folder, record: PartRecord) -> PartRecord:
    """Write a record, unless another attempt's that is as good came first; the one that counts."""
    values = vars(record)
    sealed = {**values, _SEAL: digest(values)}
    if not folder.write_json(record_name(record.part), sealed, once=True):
        first = adopted(folder, record.part, record.inputs)
        if first is not None:
            return first
        # Damaged, or of other inputs: it stands for nothing that is wanted any more.
        folder.write_json(record_name(record.part), sealed)
    # Where two could write at the same moment, the record that stayed decides whose part counts.
    return adopted(folder, record.part, record.inputs) or record
