"""A table on disk: numbered Arrow parts, a commit record for each, and a manifest written last.

Both ``data/<split>`` and the logit store are such tables. A part is an uncompressed Arrow IPC file, named after its
number and the attempt that wrote it; its commit record ``part-00017.json`` is written after it and names it, so that
a part without a record does not count and an attempt that died leaves nothing that is read. The presence of
``manifest.json`` means that every part is committed.

A *row* is one sample: a packed sequence, or one row of a classification table. ``sample_id`` is
``part << 32 | row within the part``: unique, fixed by the data and the split alone, and it says where the row lies.
"""

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from cluster.errors import FileError
from cluster.files import Folder, sha256
from cluster.meter import Usage, writer_name
from distill_jobs.errors import DataError

MANIFEST = "manifest.json"


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
            sizes_ok = all(
                isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62
                for n in (record.part, record.rows, record.tokens, record.bytes, record.quarantined)
            )
            name = record.file
            # A record must never lead the reader out of its own folder.
            name_ok = name is None or (isinstance(name, str) and "/" not in name and name.startswith("part-"))
            whole = isinstance(record.sha256, str) and (name is None) == (record.rows == 0)
            whole = whole and isinstance(record.usage, dict) and isinstance(record.extra, dict)
            if not (sizes_ok and name_ok and whole):
                raise TypeError
        except TypeError:
            raise DataError(f"{origin} is not a valid commit record; make the part again") from None
        return record


def commit_part(
    folder: Folder,
    part: int,
    schema: pa.Schema,
    batches: Iterable[pa.RecordBatch],
    *,
    inputs: str,
    tokens: int | None = None,
    usage: Usage | Callable[[], Usage] | None = None,
    extra: dict[str, Any] | None = None,
) -> PartRecord:
    """Write one part and then its commit record.

    Args:
        inputs: digest of everything the part was made from; a part with another digest is made again.
        tokens: tokens in the part; None counts one a row.
        usage: what making it has used; a function is asked once all batches have been made and written.
    """
    file = f"part-{part:05d}.{uuid.uuid4().hex[:8]}.arrow"
    rows = 0
    with folder.create(file) as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += batch.num_rows
    if rows == 0:
        folder.remove(file)
    record = PartRecord(
        part=part,
        file=file if rows else None,
        rows=rows,
        tokens=rows if tokens is None else tokens,
        bytes=folder.size(file) if rows else 0,
        sha256=sha256(folder, file) if rows else "",
        inputs=inputs,
        writer=writer_name(),
        usage=((usage() if callable(usage) else usage) or Usage()).as_dict(),
        extra=extra or {},
    )
    folder.write_json(record_name(part), vars(record))
    return record


def read_record(folder: Folder, part: int) -> PartRecord | None:
    """The commit record of a part, or None when the part is not committed."""
    return _record(folder, part) if folder.exists(record_name(part)) else None


def _record(folder: Folder, part: int) -> PartRecord:
    name = record_name(part)
    return PartRecord.of(folder.read_json(name), f"{folder}/{name}")


def committed(folder: Folder, parts: int, inputs: str | Sequence[str]) -> dict[int, PartRecord]:
    """The committed parts among ``range(parts)`` that were made from ``inputs``: what a resumed stage may skip.

    ``inputs`` is one digest for all parts, or one for each. A record that can't be read counts as absent: its part is
    made again.
    """
    # Listed once: asking for each file would cost an object store two requests a part.
    there = set(folder.names())
    found: dict[int, PartRecord] = {}
    for part in range(parts):
        if record_name(part) not in there:
            continue
        try:
            record = _record(folder, part)
        except (DataError, FileError):
            continue
        wanted = inputs if isinstance(inputs, str) else inputs[part]
        if record.part == part and record.inputs == wanted and (record.file is None or record.file in there):
            found[part] = record
    return found


def commit_manifest(folder: Folder, records: dict[int, PartRecord], **facts: Any) -> dict[str, Any]:
    """Sweep the files of dead attempts, then write the manifest: totals, ``facts``, and what each part holds."""
    keep = {r.file for r in records.values()} | {record_name(p) for p in records}
    for name in folder.names():
        if name.startswith("part-") and name not in keep:
            folder.remove(name)
    ordered = [records[part] for part in sorted(records)]
    manifest = {
        **facts,
        "parts": len(ordered),
        "rows": sum(r.rows for r in ordered),
        "tokens": sum(r.tokens for r in ordered),
        "bytes": sum(r.bytes for r in ordered),
        "part_rows": [r.rows for r in ordered],
        "part_sha256": [r.sha256 for r in ordered],
        "part_files": [r.file for r in ordered],
    }
    folder.write_json(MANIFEST, manifest)
    return manifest
