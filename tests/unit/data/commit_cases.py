"""Parts of a small table."""

import pyarrow as pa

from cluster.files import Folder
from distill_jobs.data.table import PartRecord, commit_part

SCHEMA = pa.schema([("n", pa.int64())])


def part(folder: Folder, number: int, rows: int = 2, inputs: str = "x", **more: object) -> PartRecord:
    batch = pa.record_batch([pa.array(range(rows), pa.int64())], schema=SCHEMA)
    return commit_part(folder, number, SCHEMA, [batch] if rows else [], inputs=inputs, **more)  # type: ignore[arg-type]
