"""Whatever is damaged in a store, repairing it and capturing again gives back the very same store, and no more work."""

import os
from pathlib import Path

import pytest
from store_cases import lm_facts, make_data, make_store

from cluster.files import Folder
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.repair import repair
from distill_jobs.store.verify import verify


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def part_file(store: Path, part: int) -> Path:
    [found] = (store / "parts").glob(f"part-{part:05d}.*.arrow")
    return found


DAMAGE = {
    "a flipped bit in a part": ([1], lambda store: flip(part_file(store, 1))),
    "a part cut short": ([0], lambda store: os.truncate(part_file(store, 0), 100)),
    "a part deleted": ([2], lambda store: part_file(store, 2).unlink()),
    "a flipped bit in a record": ([1], lambda store: flip(store / "parts/part-00001.json")),
    "a record deleted": ([], lambda store: (store / "parts/part-00001.json").unlink()),
    "two parts swapped": ([0, 2], lambda store: swap(part_file(store, 0), part_file(store, 2))),
    "a flipped bit in the manifest": ([], lambda store: flip(store / "manifest.json")),
    "a flipped bit in the parts' manifest": ([], lambda store: flip(store / "parts/manifest.json")),
    "a plan deleted": ([], lambda store: (store / "plan.json").unlink()),
}


def swap(first: Path, second: Path) -> None:
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_capturing_again_mends_what_was_set_aside(tmp_path: Path, damage: str) -> None:
    facts, codec = lm_facts(parts=3), TopKCodec(4)
    data, folder = Folder(str(tmp_path / "data")), Folder(str(tmp_path / "store"))
    make_data(data, facts)
    make_store(folder, facts, data, codec)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("store/parts/*") if path.suffix == ".arrow"}
    sums = folder.read_json("parts/manifest.json")["part_sha256"]
    expected, strike = DAMAGE[damage]
    strike(tmp_path / "store")
    assert verify(folder, data)
    assert repair(folder) == expected
    assert not folder.exists("manifest.json")
    make_store(folder, facts, data, codec)
    assert verify(folder, data) == []
    assert folder.read_json("parts/manifest.json")["part_sha256"] == sums
    kept = [n for n in before if (tmp_path / "store/parts" / n).exists()]
    assert len(kept) == 3 - len(expected) - (damage == "a record deleted")


def test_a_sound_store_is_left_alone(tmp_path: Path) -> None:
    facts = lm_facts(parts=2)
    data, folder = Folder(str(tmp_path / "data")), Folder(str(tmp_path / "store"))
    make_data(data, facts)
    make_store(folder, facts, data, TopKCodec(4))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert repair(folder) == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files
