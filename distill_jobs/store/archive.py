"""A store's cold form: its parts compressed for keeping, and turned back byte for byte.

``cold.json`` is written before the first part is touched and removed after the last one is back: while it is there, the
store is not read. A part goes over in two commits (the new form appears whole, then the old one is removed), so that
either command can be killed at any moment and run again.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cluster.errors import FileError
from cluster.files import Folder, sha256
from distill_jobs.data.table import MANIFEST, PartRecord, read_record
from distill_jobs.errors import DataError, StoreError
from distill_jobs.store.plan import COLD, PARTS, StorePlan
from distill_jobs.store.reader import read_manifest

SUFFIX = ".zst"
_CODEC, _LEVEL = "zstd", 9
_BLOCK = 1 << 22

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sizes:
    """Bytes of a store's parts, as they are read and in cold form."""

    hot: int
    cold: int


def archive(folder: Folder, on_progress: Progress = lambda *_: None) -> Sizes:
    """Put a complete store into cold form. On one that is half-way there already it goes on.

    Args:
        on_progress: told the parts done and their number.

    Raises:
        StoreError: the store is incomplete or damaged; what is damaged is never archived.
    """
    records, parts = list(_records(folder)), folder / PARTS
    if not folder.exists(COLD):
        folder.write_json(COLD, {"codec": _CODEC, "suffix": SUFFIX})
    there, cold = set(parts.names()), 0
    for done, record in enumerate(records, 1):
        name = str(record.file)
        # While the part itself is there, what stands beside it may be of another attempt.
        if name in there:
            _compress(parts, record)
            parts.remove(name)
        elif name + SUFFIX not in there:
            raise StoreError(f"{parts}/{name} is missing, and so is its cold form; capture again")
        cold += parts.size(name + SUFFIX)
        on_progress(done, len(records))
    return Sizes(sum(record.bytes for record in records), cold)


def restore(folder: Folder, on_progress: Progress = lambda *_: None) -> Sizes:
    """Turn a cold store back, byte for byte, or go on with that; a store that isn't cold is left alone.

    Raises:
        StoreError: a compressed part is missing or damaged, or unpacks to anything but the part that was archived.
    """
    records, parts = list(_records(folder)), folder / PARTS
    hot = sum(record.bytes for record in records)
    if not folder.exists(COLD):
        return Sizes(hot, 0)
    there, cold = set(parts.names()), 0
    for done, record in enumerate(records, 1):
        name = str(record.file)
        if name + SUFFIX in there:
            cold += parts.size(name + SUFFIX)
            if name not in there or sha256(parts, name) != record.sha256:
                _unpack(parts, record)
            parts.remove(name + SUFFIX)
        elif name not in there:
            raise StoreError(f"{parts}/{name}{SUFFIX} is missing, and so is the part itself; capture again")
        on_progress(done, len(records))
    folder.remove(COLD)
    return Sizes(hot, cold)


def _records(folder: Folder) -> Iterator[PartRecord]:
    """The commit records of the parts that have a file, after a look whether they are those of the manifest."""
    plan = StorePlan.load(folder)
    manifest = read_manifest(folder, plan, cold=True)
    parts = folder / PARTS
    try:
        table = parts.read_json(MANIFEST)
        if sha256(parts, MANIFEST) != manifest.get("table_sha256"):
            raise StoreError(f"{parts}/{MANIFEST} is not the file that was written; capture again")
        for part in range(plan.parts):
            record = read_record(parts, part)
            if record is None or _listed(table, part) != (record.file, record.sha256):
                raise StoreError(f"the commit record of part {part} in {parts} is missing or not the manifest's")
            if record.file is not None:
                yield record
    except (FileError, DataError) as error:
        raise StoreError(str(error)) from None


def _listed(table: Any, part: int) -> tuple[Any, Any]:
    try:
        return table["part_files"][part], table["part_sha256"][part]
    except (KeyError, TypeError, IndexError):
        return None, None


def _compress(parts: Folder, record: PartRecord) -> None:
    name, seen = str(record.file), hashlib.sha256()
    codec = pa.Codec(_CODEC, compression_level=_LEVEL)
    with parts.create(name + SUFFIX) as sink, parts.open(name) as source:
        # Frames behind one another are one zstd file.
        while block := source.read(_BLOCK):
            seen.update(block)
            sink.write(codec.compress(block))
        # Raised before the file appears: nothing that is damaged is archived, nor its original removed.
        if seen.hexdigest() != record.sha256:
            raise StoreError(f"{parts}/{name} is not the file that was written: its SHA-256 differs; capture again")


def _unpack(parts: Folder, record: PartRecord) -> None:
    name, seen, size = str(record.file), hashlib.sha256(), 0
    where = f"{parts}/{name}{SUFFIX}"
    with parts.create(name) as sink:
        for block in _blocks(parts, name + SUFFIX):
            size += len(block)
            # A few compressed bytes can stand for any number: not one more than was archived is written.
            if size > record.bytes:
                raise StoreError(f"{where} unpacks to more than the {record.bytes} bytes that were archived")
            seen.update(block)
            sink.write(block)
        if size != record.bytes or seen.hexdigest() != record.sha256:
            raise StoreError(f"{where} does not unpack to the part that was archived: its SHA-256 differs")


def _blocks(parts: Folder, name: str) -> Iterator[bytes]:
    try:
        with parts.open(name) as source, pa.CompressedInputStream(source, _CODEC) as packed:
            while block := packed.read(_BLOCK):
                yield block
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{parts}/{name} is damaged: {' '.join(str(error).split())[:200]}") from None
