"""How many requests an object store gets: what a part or a step costs must not grow with the number of parts.

``HEAD`` and ``GET ?list-type=2`` are what is asked beside the content itself; a listing has at most 1,000 names a page.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fault_proxy import FaultProxy

from cluster.files import Folder
from distill_jobs.data.cache import PartCache
from distill_jobs.data.commits import Commits
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import commit_part, sample_id
from distill_jobs.training.feed import WindowOrder

SCHEMA = pa.schema([pa.field("sample_id", pa.int64(), nullable=False), pa.field("x", pa.float32(), nullable=False)])
ROWS, INPUTS = 4, "the inputs"


@pytest.fixture
def proxy(s3: Callable[[str], Folder], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    host, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
    s3("requests")
    proxy = FaultProxy(host, int(port))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    yield proxy
    proxy.stop()


def commit(folder: Folder, part: int) -> None:
    ids = pa.array([sample_id(part, row) for row in range(ROWS)], pa.int64())
    batch = pa.record_batch([ids, pa.array(np.arange(ROWS, dtype=np.float32))], schema=SCHEMA)
    commit_part(folder, part, SCHEMA, [batch], inputs=INPUTS)


def table(name: str, parts: int) -> Folder:
    """A complete table; its parts are copies of each other's bytes, as nobody reads their rows' values here."""
    folder = Folder(f"s3://requests/{name}")
    commits = Commits.open(folder, parts, INPUTS)
    for part in range(parts):
        commit(folder, part)
    commits = Commits.open(folder, parts, INPUTS)
    commits.manifest(rows_per_batch=ROWS)
    return folder


def kinds(proxy: FaultProxy) -> Counter[str]:
    """What was asked since the last time, by kind."""
    found: Counter[str] = Counter()
    for request in proxy.seen:
        method, path = request.split(" ", 1)
        found["LIST" if "list-type" in path else method] += 1
    proxy.seen.clear()
    return found


@pytest.mark.parametrize("there", [2, 16])
def test_what_a_part_costs_to_commit(proxy: FaultProxy, there: int) -> None:
    folder = Folder(f"s3://requests/commit-{there}")
    for part in range(there):
        commit(folder, part)
    kinds(proxy)
    for part in range(there, there + 3):
        commit(folder, part)
        asked = kinds(proxy)
        # The part and its record are written once each; a name that is not there costs a look for a folder.
        assert asked["PUT"] == 2 and asked["POST"] == asked["DELETE"] == 0, asked
        assert asked.total() <= 13 and asked["LIST"] <= 3, asked


@pytest.mark.slow
def test_finding_what_is_committed_lists_once(proxy: FaultProxy) -> None:
    """Every page of names once; and with an index, no record is read."""
    folder, parts = Folder("s3://requests/many"), 1300
    commit(folder, 0)
    name = next(name for name in folder.names(".arrow"))
    content = folder.read(name)
    records = Folder("s3://requests/many")
    for part in range(1, parts):
        # Only names, which no record stands behind: attempts that were cut off.
        records.write(f"part-{part:05d}.{part:08x}.arrow", content[:8])
    kinds(proxy)
    commits = Commits.open(folder, parts, INPUTS)
    asked = kinds(proxy)
    assert len(commits) == 1 and asked["LIST"] <= 2 + 2 and asked.total() <= asked["LIST"] + 4, asked


@pytest.mark.parametrize("parts", [6, 12])
def test_what_a_step_costs_to_read(proxy: FaultProxy, tmp_path: Path, parts: int) -> None:
    folder = table(f"read-{parts}", parts)
    kinds(proxy)
    cache = PartCache(tmp_path / "cache")
    reader = TableReader(folder, cache=cache)
    opened = kinds(proxy)
    assert opened.total() <= 4 and opened["LIST"] == 0, opened
    order = WindowOrder(reader.part_rows, 1, 2, reader.prefetch)
    for step in range(parts):
        reader.take(order.take(step * ROWS, ROWS), ["x"])
    end = time.monotonic() + 20
    while len(cache.arrived) < parts and time.monotonic() < end:
        time.sleep(0.01)
    epoch = kinds(proxy)
    # A part is asked for its size and read; the first one's footer is read before, for the columns.
    assert epoch["LIST"] == 0 and epoch["HEAD"] <= parts + 2 and epoch["GET"] <= parts + 3, epoch
    assert epoch.total() == epoch["HEAD"] + epoch["GET"]
    for step in range(parts, 3 * parts):
        reader.take(order.take(step * ROWS, ROWS), ["x"])
    assert kinds(proxy).total() == 0
    assert cache.tally.missed < parts
