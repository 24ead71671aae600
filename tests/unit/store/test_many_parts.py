"""A store of very many parts, simulated by a manifest that names one file over and over: nothing goes part by part."""

import dataclasses
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from store_cases import lm_facts, make_data, make_store

from cluster.files import Folder, sha256
from distill_jobs.data.table import MANIFEST
from distill_jobs.errors import StoreError
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.plan import PARTS, StorePlan
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.writer import SEAL, contract, seal

COUNT, ROWS = 20_000, 3


def many(root: Folder, count: int) -> Folder:
    facts, folder = lm_facts(parts=1, rows=ROWS), root / "store"
    make_data(root / "data", facts)
    make_store(folder, facts, root / "data", TopKCodec(4))
    table = (folder / PARTS).read_json(MANIFEST)
    totals = {name: table[name] * count for name in ("parts", "rows", "tokens", "bytes")}
    lists = {name: value * count for name, value in table.items() if isinstance(value, list)}
    (folder / PARTS).write_json(MANIFEST, {**table, **lists, **totals})
    plan = dataclasses.replace(StorePlan.load(folder), parts=count)
    plan.save(folder)
    manifest = {**contract(plan), "table_sha256": sha256(folder / PARTS, MANIFEST), **totals, "quarantined": 0}
    folder.write_json(MANIFEST, {**manifest, SEAL: seal(manifest)})
    return folder


def test_opening_reads_the_manifest_and_one_footer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = many(Folder(str(tmp_path)), COUNT)
    opened: list[str] = []
    for way in ("open", "read"):
        plain = getattr(Folder, way)
        monkeypatch.setattr(Folder, way, lambda self, name, plain=plain: (opened.append(name), plain(self, name))[1])
    tracemalloc.start()
    store = LogitStore.open(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert store.rows == COUNT * ROWS and store.table.parts == COUNT
    # Plan and manifest, the parts' own manifest twice, and the footer of one part.
    assert 4 < len(opened) <= 6 and len({name for name in opened if name.startswith("part-")}) == 1
    assert peak < 20e6, f"{peak / 1e6:.1f} MB for {COUNT} parts"


def test_rows_anywhere_and_few_files_open_at_once(tmp_path: Path) -> None:
    store = LogitStore.open(many(Folder(str(tmp_path)), 600))
    before = len(os.listdir("/proc/self/fd"))
    rows = np.random.default_rng(0).permutation(store.rows)[:500]
    assert np.array_equal(store.take(rows, soft=False)["sample_id"], rows % ROWS)
    assert len(os.listdir("/proc/self/fd")) - before <= 256


def test_a_manifest_that_is_not_one_is_refused(tmp_path: Path) -> None:
    folder = many(Folder(str(tmp_path)), 5)
    good = (folder / PARTS).read_json(MANIFEST)
    wrong = [
        {"part_rows": [3, 3, 3, 3]},
        {"part_rows": [3, 3, 3, 3, -1]},
        {"part_rows": [3, 3, 3, 3, 1 << 40]},
        {"part_rows": [3, 3, 3, 3, True]},
        {"part_files": [*good["part_files"][:4], "../part-x"]},
        {"part_files": [*good["part_files"][:4], "part-\0"]},
        {"part_sha256": [None] * 5},
        {"rows_per_batch": 0},
        {"part_rows": 3},
        {"part_quarantined": [1, 0, 0, 0]},
        {"part_quarantined": [1, 0, 0, 0, 0]},
        {"part_quarantined": [0, 0, 0, 0, -1]},
        {"part_quarantined": 3},
    ]
    for change in wrong:
        (folder / PARTS).write_json(MANIFEST, {**good, **change})
        manifest = folder.read_json(MANIFEST)
        manifest["table_sha256"] = sha256(folder / PARTS, MANIFEST)
        folder.write_json(MANIFEST, {**manifest, SEAL: seal(manifest)})
        with pytest.raises(StoreError):
            LogitStore.open(folder).take(np.arange(15))
