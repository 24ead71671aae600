"""Damage to a file of a store: a bit flipped, the end cut off, noise, another file in its place. All must be seen."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from store_cases import lm_facts, make_data, make_store, table_facts

from cluster.files import Folder
from distill_jobs.data.table import sample_id
from distill_jobs.errors import StoreError
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.inspect import describe, render
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.verify import verify

KINDS = ("flip", "cut", "noise", "swap")
GROUPS = {
    "parts": "parts/*.arrow",
    "records": "parts/part-*.json",
    "quarantine": "quarantine/*.jsonl",
    "manifests": "**/*n*.json",
}


@dataclass
class Damaged:
    """A store and its data, with all that the files of the store hold while they are whole."""

    store: Folder
    data: Folder
    files: dict[Path, bytes]

    def group(self, name: str) -> list[Path]:
        found = sorted(self.store.path().glob(GROUPS[name]))
        return [path for path in found if name != "manifests" or not path.name.startswith("part-")]


def make_stores(root: Path) -> list[Damaged]:
    """Two stores with holes, one of them with a part that is all in quarantine: of documents, and of images."""
    stores = []
    out = [sample_id(0, 1), sample_id(1, 0), sample_id(1, 1), sample_id(1, 2), sample_id(2, 2)]
    for name, facts, codec in (
        ("documents", lm_facts(3, 9), HybridCodec(6, 4)),
        ("image", table_facts("image", 3, 9), TopKCodec(3)),
    ):
        data, store = Folder(str(root / name / "data")), Folder(str(root / name / "store"))
        make_data(data, facts)
        make_store(store, facts, data, codec, without=out)
        files = {path: path.read_bytes() for path in store.path().rglob("*.*")}
        stores.append(Damaged(store, data, files))
        assert verify(store, data) == [] and {len(stores[-1].group(group)) > 1 for group in GROUPS} == {True}
    return stores


def damage(case: Damaged, group: str, kind: str, rng: random.Random) -> tuple[dict[Path, bytes], str]:
    """What one or two files hold then, and what was done."""
    path = rng.choice(case.group(group))
    content = bytearray(case.files[path])
    if kind == "swap":
        others = [other for other in case.files if case.files[other] != case.files[path]]
        other = rng.choice(others)
        # The two change places, or one is there twice.
        both = {path: case.files[other], other: case.files[path]} if rng.random() < 0.5 else {path: case.files[other]}
        return both, f"{other.name} as {path.name}{' and the other way round' if len(both) > 1 else ''}"
    at = rng.randrange(len(content))
    if kind == "flip":
        bit = rng.randrange(8)
        content[at] ^= 1 << bit
        return {path: bytes(content)}, f"bit {bit} of byte {at} of {path.name}"
    if kind == "noise":
        content[at : at + 16] = rng.randbytes(len(content[at : at + 16]))
        return {path: bytes(content)}, f"noise at {at} of {path.name}"
    return {path: bytes(content[:at])}, f"{path.name} cut at {at}"


def prove(cases: list[Damaged], numbers: range) -> int:
    """Damage of each kind to each group of files, one after the other; returns how many there were.

    Raises:
        AssertionError: verify saw nothing wrong, or reading ended in anything but StoreError.
    """
    count = 0
    for number, group, kind in _all(numbers):
        rng = random.Random(f"{group} {kind} {number}")
        case = rng.choice(cases)
        changed, what = damage(case, group, kind, rng)
        _write(changed)
        try:
            found = verify(case.store, case.data if rng.random() < 0.5 else None)
            assert found, f"verify did not see: {what}"
            assert all("\n" not in sentence and len(sentence) < 1000 for sentence in found), what
            _read(case, what)
        finally:
            _write({path: case.files[path] for path in changed})
        count += 1
    for case in cases:
        assert verify(case.store, case.data) == []
    return count


def _read(case: Damaged, what: str) -> None:
    try:
        store = LogitStore.open(case.store, case.data)
        columns = store.take(np.arange(store.rows))
        store.rows_of(columns["sample_id"])
        store.signal(columns, "cpu").at(2.0)
        render(describe(case.store))
    except StoreError:
        pass
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def _all(numbers: range) -> Iterator[tuple[int, str, str]]:
    return ((number, group, kind) for number in numbers for group in GROUPS for kind in KINDS)


def _write(files: dict[Path, bytes]) -> None:
    """Under new inodes, since what is mapped of the old ones must stay as it is."""
    for path, content in files.items():
        path.unlink()
        path.write_bytes(content)
