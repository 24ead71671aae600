"""The quarantine: rows that the teacher could not score, each with the reason, beside the store's parts.

A row of the data is in exactly one of the two. The quarantined rows of a part stand in one file of ``quarantine/``, a
JSON object a line in the order of their ids, written after the part's own file and before the commit record, which
names it with its SHA-256 and counts its lines.
"""

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.errors import FileError
from cluster.files import Folder, is_temporary
from distill_jobs.data.commits import Commits
from distill_jobs.data.table import PartRecord, read_record, where
from distill_jobs.errors import DataError, StoreError
from distill_jobs.store.plan import PARTS

QUARANTINE = "quarantine"
FILE, SHA256 = "quarantine_file", "quarantine_sha256"
"""Where the commit record's ``extra`` names a part's file, and its SHA-256."""

_LONGEST = 500


@dataclass(frozen=True)
class Quarantined:
    """A row that is left out of the store.

    Attributes:
        sample_id: the row's.
        source: where it came from, for people; empty where the data don't say.
        reason: why the teacher could not score it, in one line.
    """

    sample_id: int
    source: str
    reason: str


def write_quarantine(folder: Folder, part: int, rows: Sequence[Quarantined]) -> dict[str, Any]:
    """Write the quarantine file of an attempt at a part.

    Args:
        folder: the store's.

    Returns:
        what the part's commit record says of it: name, SHA-256 and number of rows; nothing for no rows.

    Raises:
        StoreError: a row is of another part, or given twice.
    """
    if not rows:
        return {}
    ordered = sorted(rows, key=lambda row: row.sample_id)
    ids = [row.sample_id for row in ordered]
    if len(set(ids)) < len(ids) or any(where(sample)[0] != part for sample in ids):
        raise StoreError(f"the quarantine of part {part} was given a row twice, or a row of another part")
    name = f"part-{part:05d}.{uuid.uuid4().hex[:8]}.jsonl"
    content = "".join(_line(row) for row in ordered).encode()
    (folder / QUARANTINE).write(name, content)
    return {FILE: name, SHA256: hashlib.sha256(content).hexdigest(), "quarantined": len(ordered)}


def read_quarantine(folder: Folder, record: PartRecord) -> list[Quarantined]:
    """The quarantined rows of a part, in the order of their ids.

    Args:
        folder: the store's.

    Raises:
        StoreError: the file is missing, is not the one that was written, or holds anything but rows of this part.
    """
    name = quarantine_file(folder, record)
    if name is None:
        return []
    where_ = f"{folder}/{QUARANTINE}/{name}"
    try:
        content = (folder / QUARANTINE).read(name)
    except FileError as error:
        raise StoreError(f"the quarantine of part {record.part}: {error}; capture again") from None
    if hashlib.sha256(content).hexdigest() != record.extra.get(SHA256):
        raise StoreError(f"{where_} is not the file that was written: its SHA-256 differs; capture again")
    try:
        rows = [_row(line, record) for line in content.decode().splitlines()]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise StoreError(f"{where_} holds a line that is no quarantined row of part {record.part}") from None
    ids = [row.sample_id for row in rows]
    if ids != sorted(set(ids)) or len(ids) != record.quarantined:
        raise StoreError(
            f"{where_} should hold {record.quarantined} rows in the order of their ids, none twice, but it does not"
        )
    return rows


def quarantine_file(folder: Folder, record: PartRecord) -> str | None:
    """The name of a part's quarantine file, None where it has none.

    Raises:
        StoreError: what the record says of it can't be: a name without rows, rows without a name, another's name.
    """
    name = record.extra.get(FILE)
    if name is None and not record.quarantined:
        return None
    if not isinstance(name, str) or not record.quarantined or not _of_part(name, record.part):
        raise StoreError(
            f"the commit record of part {record.part} in {folder} names no quarantine that could be its own"
        )
    return name


def few_of(folder: Folder, part_quarantined: np.ndarray, count: int) -> list[Quarantined]:
    """The first rows in quarantine of a complete store, at most ``count``.

    Args:
        part_quarantined: [parts] how many each part has.

    Raises:
        StoreError: a commit record or a file of the quarantine is missing or damaged.
    """
    found: list[Quarantined] = []
    for part in np.flatnonzero(part_quarantined).tolist():
        if len(found) >= count:
            break
        try:
            record = read_record(folder / PARTS, part)
        except (DataError, FileError) as error:
            raise StoreError(str(error)) from None
        if record is None:
            raise StoreError(f"part {part} has no commit record in {folder / PARTS}; capture again")
        found += read_quarantine(folder, record)[: count - len(found)]
    return found


def without_quarantine(folder: Folder, commits: Commits) -> list[int]:
    """The committed parts of a store that count quarantined rows, but have no file left that tells which."""
    if not commits.quarantined:
        return []
    there = {part for part, _ in _named(folder)}
    return [p for p in range(commits.parts) if p in commits and commits.quarantined_of(p) and p not in there]


def sweep(folder: Folder, commits: Commits) -> None:
    """Remove the quarantine files of a store that no commit record names: those of dead attempts."""
    several: dict[int, list[str]] = {}
    for part, name in _named(folder):
        several.setdefault(part, []).append(name)
    for part, names in several.items():
        keep: set[Any] = set()
        if 0 <= part < commits.parts and commits.quarantined_of(part):
            # A single file is the one: the record that counts its rows came after it.
            record = read_record(folder / PARTS, part) if len(names) > 1 else None
            keep = {record.extra.get(FILE)} if record else set(names)
        for name in names:
            if name not in keep:
                (folder / QUARANTINE).remove(name)


def _named(folder: Folder) -> Iterator[tuple[int, str]]:
    """The files in quarantine with the parts that they are of; unfinished ones are of none, -1."""
    for name in (folder / QUARANTINE).scan():
        number = name.removeprefix("part-").partition(".")[0]
        if name.startswith("part-") and name.endswith(".jsonl") and number.isdecimal():
            yield int(number), name
        elif is_temporary(name):
            yield -1, name


def _of_part(name: str, part: int) -> bool:
    return name.startswith(f"part-{part:05d}.") and name.endswith(".jsonl") and "/" not in name and "\0" not in name


def _line(row: Quarantined) -> str:
    reason = " ".join(row.reason.split())
    reason = reason if len(reason) <= _LONGEST else f"{reason[: _LONGEST - 3]}..."
    return json.dumps({**asdict(row), "reason": reason}, sort_keys=True) + "\n"


def _row(line: str, record: PartRecord) -> Quarantined:
    row = Quarantined(**json.loads(line))
    sample, words = row.sample_id, (row.source, row.reason)
    if not isinstance(sample, int) or isinstance(sample, bool) or not all(isinstance(word, str) for word in words):
        raise TypeError
    part, number = where(sample)
    if part != record.part or number >= record.rows + record.quarantined:
        raise ValueError
    return row
