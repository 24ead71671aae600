"""The index of a table's commits: pieces ``commits/00001.<digest>.arrow``, a row for each part, each written once.

A piece's name holds the digest of its content, so that nothing of a damaged one is read. What a later piece says of a
part takes the place of what earlier ones said. Removing any of them costs time at the next start, and nothing else.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.files import Folder

SHA_BYTES = 32
FIELDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "rows": (np.int64, ()),
    "tokens": (np.int64, ()),
    "bytes": (np.int64, ()),
    "quarantined": (np.uint32, ()),
    "attempt": (np.uint32, ()),
    "sha256": (np.uint8, (SHA_BYTES,)),
}
_FOLDER = "commits"
_NAME = re.compile(r"(\d{5,9})\.([0-9a-f]{32})\.arrow")


def append(folder: Folder, parts: np.ndarray, columns: dict[str, np.ndarray], inputs: list[str]) -> None:
    """Write one more piece: for each of ``parts`` [n] its columns [n, ...] and the digest of what it was made from."""
    arrays = {"part": pa.array(parts, pa.int64()), "inputs": pa.array(inputs, pa.string())}
    for name, (_, shape) in FIELDS.items():
        flat = pa.array(columns[name].reshape(-1))
        arrays[name] = pa.FixedSizeListArray.from_arrays(flat, shape[0]) if shape else flat
    sink = pa.BufferOutputStream()
    batch = pa.record_batch(arrays)
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = sink.getvalue()
    number = max((number for number, _, _ in _pieces(folder)), default=0) + 1
    (folder / _FOLDER).write(f"{number:05d}.{_digest(content)}.arrow", content)


def read(folder: Folder) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]]:
    """The pieces in the order in which they were written: parts [n], columns [n, ...] and inputs [n] of each."""
    for _, digest, name in sorted(_pieces(folder)):
        content = (folder / _FOLDER).read(name)
        if _digest(content) != digest:
            continue
        batch = pa.ipc.open_file(pa.py_buffer(content)).get_batch(0)
        columns = {}
        for field, (dtype, shape) in FIELDS.items():
            column = batch.column(field)
            flat = column.flatten() if shape else column
            columns[field] = np.asarray(flat, dtype).reshape(batch.num_rows, *shape)
        inputs = np.array(batch.column("inputs").to_pylist(), object)
        yield np.asarray(batch.column("part"), np.int64), columns, inputs


def remove(folder: Folder) -> None:
    """Forget the index."""
    (folder / _FOLDER).clear()


def _pieces(folder: Folder) -> list[tuple[int, str, str]]:
    """Number, digest and name of each piece that is there."""
    named = (_NAME.fullmatch(name) for name in (folder / _FOLDER).scan())
    return [(int(n[1]), n[2], n[0]) for n in named if n]


def _digest(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
