"""A store written out as Parquet shards or as a Hugging Face ``datasets`` folder, part by part.

An export appears whole or not at all: it is written beside its place under another name, and put there at the end; its
index ``export.json`` (and ``state.json``, without which ``datasets`` opens nothing) comes last.
"""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cluster.errors import FileError
from cluster.files import Folder, digest, filesystem
from distill_jobs.errors import StoreError
from distill_jobs.store.exchange.tables import METADATA, batches_of_part, facts_of
from distill_jobs.store.plan import SPLIT
from distill_jobs.store.reader import LogitStore

INDEX = "export.json"
STATE = "state.json"
INFO = "dataset_info.json"
UNFINISHED = ".unfinished"

Progress = Callable[[int, int], None]


def export_store(
    folder: Folder,
    to: Folder,
    form: str = "parquet",
    data: Folder | None = None,
    on_progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Write the store in ``folder`` out into ``to``, one file for each part that has rows.

    Args:
        to: a folder that is not there yet, on disk or in an object store.
        form: ``parquet``, or ``datasets`` for what ``datasets.load_from_disk`` opens.
        data: the prepared data; needed only where features stay there (images).
        on_progress: told the parts done and their number.

    Returns:
        the index that is written as ``export.json``: format, rows, bytes, files, and what the store says of itself.

    Raises:
        StoreError: the store is incomplete or damaged, holds no rows, or ``to`` is taken.
    """
    store = LogitStore.open(folder, data)
    if not store.rows:
        raise StoreError(f"{folder} holds no rows to export")
    if _taken(to):
        raise StoreError(f"{to} exists already; name a new folder, or remove that one first")
    aside = Folder(to.uri.rstrip("/") + UNFINISHED)
    aside.clear()
    write = {"parquet": _write_parquet, "datasets": _write_stream}[form]
    suffix = {"parquet": "parquet", "datasets": "arrow"}[form]
    facts = facts_of(store)
    filled = [part for part in range(store.table.parts) if len(store.table.part_range(part))]
    names, schema = [], None
    for number, part in enumerate(filled):
        name = f"{SPLIT}-{number:05d}-of-{len(filled):05d}.{suffix}"
        schema = write(aside, name, batches_of_part(store, part), facts)
        names.append(name)
        on_progress(number + 1, len(filled))
    assert schema is not None
    last = {}
    if form == "datasets":
        # Not by write_json: the columns' order counts.
        aside.write(INFO, json.dumps(_dataset_info(schema, folder), indent=1).encode())
        last = {STATE: _dataset_state(names, store)}
    index = {"format": form, "rows": store.rows, "bytes": sum(map(aside.size, names)), "files": names, "store": facts}
    last[INDEX] = index
    for name, value in last.items():
        aside.write_json(name, value)
    _put(aside, to, [name for name in aside.names() if name not in last] + list(last))
    return index


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """The columns as ``datasets`` describes them in ``dataset_info.json``."""
    return {field.name: _feature(field.type) for field in schema}


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_list(kind):
        # The name that every version of the library reads.
        return {"feature": _feature(kind.value_type), "_type": "Sequence"}
    names = {pa.float32(): "float32", pa.float64(): "float64", pa.string(): "string"}
    return {"dtype": names.get(kind, str(kind)), "_type": "Value"}


def _write_parquet(folder: Folder, name: str, batches: Iterator[pa.RecordBatch], facts: dict[str, Any]) -> pa.Schema:
    first = next(batches)
    schema = _tagged(first.schema, facts)
    with folder.create(name) as sink, pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)
    return schema


def _write_stream(folder: Folder, name: str, batches: Iterator[pa.RecordBatch], facts: dict[str, Any]) -> pa.Schema:
    first = next(batches)
    schema = _tagged(first.schema, facts)
    with folder.create(name) as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)
    return schema


def _tagged(schema: pa.Schema, facts: dict[str, Any]) -> pa.Schema:
    return schema.with_metadata({METADATA: json.dumps(facts, sort_keys=True).encode()})


def _dataset_info(schema: pa.Schema, folder: Folder) -> dict[str, Any]:
    about = f"A teacher's soft targets, exported by distill-jobs from {folder}."
    return {"citation": "", "description": about, "features": features_of(schema), "homepage": "", "license": ""}


def _dataset_state(names: list[str], store: LogitStore) -> dict[str, Any]:
    return {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": digest([store.plan.digest, store.rows]),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": SPLIT,
    }


def _taken(to: Folder) -> bool:
    """Whether there is anything at that place: a file, or a folder that holds something."""
    system, root = filesystem(to.uri)
    try:
        info = system.get_file_info(root)
        if info.type == fs.FileType.Directory:
            return bool(system.get_file_info(fs.FileSelector(root)))
    except (pa.ArrowException, OSError) as error:
        raise FileError(f"can't write {to}: {' '.join(str(error).split())}") from None
    return bool(info.type != fs.FileType.NotFound)


def _put(aside: Folder, to: Folder, names: list[str]) -> None:
    """Give a finished export its name: in one step on disk, file by file and the index last in an object store."""
    system, source = filesystem(aside.uri)
    _, target = filesystem(to.uri)
    try:
        if isinstance(system, fs.LocalFileSystem):
            # An empty folder may be there; a folder with anything in it has been refused, and would be refused here.
            os.replace(source, target)
            return
        for name in names:
            system.move(f"{source}/{name}", f"{target}/{name}")
    except (pa.ArrowException, OSError) as error:
        raise FileError(f"can't write {to}: {' '.join(str(error).split())}") from None
