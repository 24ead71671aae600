"""The cold form: smaller, turned back byte for byte, and safe against kills, damage and bombs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from store_cases import lm_facts, make_data, make_store
from typer.testing import CliRunner

from cluster.files import Folder, store_folder
from distill_jobs.cli_store import store as commands
from distill_jobs.errors import StoreError
from distill_jobs.store import archive as module
from distill_jobs.store.archive import archive, restore
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.inspect import describe
from distill_jobs.store.plan import StorePlan
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.verify import verify
from distill_jobs.store.writer import start


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    folder, data = Folder(str(root / "store")), Folder(str(root / "data"))
    facts = lm_facts(parts=2, rows=80)
    make_data(data, facts)
    make_store(folder, facts, data, HybridCodec(6, 4))
    return root / "store"


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Folder:
    shutil.copytree(made, tmp_path / "store")
    return Folder(str(tmp_path / "store"))


def contents(folder: Folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder.path())): path.read_bytes() for path in folder.path().rglob("*.*")}


def test_there_and_back(store: Folder) -> None:
    before = contents(store)
    sizes = archive(store)
    after = contents(store)
    assert sizes.cold < 0.7 * sizes.hot == 0.7 * sum(len(v) for k, v in before.items() if k.endswith(".arrow"))
    assert not [name for name in after if name.endswith(".arrow")]
    assert sizes.cold == sum(len(v) for k, v in after.items() if k.endswith(".arrow.zst"))
    for refused in (
        lambda: LogitStore.open(store),
        lambda: describe(store),
        lambda: start(store, StorePlan.load(store)),
    ):
        with pytest.raises(StoreError, match=f"distill store restore {store}"):
            refused()
    assert "distill store restore" in verify(store)[0]
    assert archive(store) == sizes
    assert restore(store) == sizes
    assert contents(store) == before and verify(store) == []
    assert restore(store).cold == 0


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("when", range(6))
def test_killed_and_run_again(store: Folder, monkeypatch: pytest.MonkeyPatch, there: bool, when: int) -> None:
    """Stop at each of the file operations in turn, as a kill would, then run the command again."""
    before = contents(store)
    if not there:
        archive(store)
    steps = 0

    def dying(real: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == when + 1:
                raise KeyboardInterrupt
            return real(*args, **named)

        return call

    with monkeypatch.context() as patch:
        for name in ("create", "remove", "write_json"):
            patch.setattr(Folder, name, dying(getattr(Folder, name)))
        try:
            (archive if there else restore)(store)
        except KeyboardInterrupt:
            # Whatever was reached, the store is refused or whole: never read half.
            try:
                LogitStore.open(store).take(np.arange(80))
            except StoreError as error:
                assert "restore" in str(error)
    (archive if there else restore)(store)
    restore(store)
    assert contents(store) == before


def test_what_is_damaged_is_neither_archived_nor_restored(store: Folder) -> None:
    part = next(store.path("parts").glob("*.arrow"))
    good = part.read_bytes()
    part.write_bytes(good[:-9] + b"x" + good[-8:])
    with pytest.raises(StoreError, match="not the file that was written"):
        archive(store)
    assert part.exists()
    part.write_bytes(good)
    archive(store)
    cold = part.with_name(part.name + ".zst")
    packed, codec = cold.read_bytes(), pa.Codec("zstd")
    for content, message in [
        (packed[: len(packed) // 2], "damaged|SHA-256"),
        (packed[:20] + b"\xff" * 20 + packed[40:], "damaged|SHA-256"),
        (b"not zstd at all", "damaged"),
        (b"", "SHA-256"),
        (codec.compress(good[:-1], asbytes=True), "SHA-256"),
        (codec.compress(good[:-1] + b"x", asbytes=True), "SHA-256"),
        (codec.compress(bytes(1 << 28), asbytes=True), "unpacks to more"),
    ]:
        cold.write_bytes(content)
        with pytest.raises(StoreError, match=message):
            restore(store)
        assert not part.exists() and store.exists("cold.json")
    cold.unlink()
    with pytest.raises(StoreError, match="and so is the part itself"):
        restore(store)
    with pytest.raises(StoreError, match="and so is its cold form"):
        archive(store)
    cold.write_bytes(packed)
    part.write_bytes(b"left by somebody")
    restore(store)
    assert part.read_bytes() == good and verify(store) == []


def test_parts_larger_than_a_block(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 1000)
    before = contents(store)
    archive(store)
    monkeypatch.setattr(module, "_BLOCK", 1 << 22)
    restore(store)
    assert contents(store) == before


def test_commands(store: Folder) -> None:
    run = CliRunner()
    said = run.invoke(commands, ["archive", str(store)])
    assert said.exit_code == 0 and "is archived:" in said.output and "2 of 2 parts" in said.output
    said = run.invoke(commands, ["restore", str(store)])
    assert said.exit_code == 0 and "is back:" in said.output
    assert "nothing to restore" in run.invoke(commands, ["restore", str(store)]).output


@pytest.fixture
def bucket(s3: Callable[[str], Folder]) -> Folder:
    return s3("cold") / "store"


def test_in_an_object_store(store: Folder, bucket: Folder) -> None:
    store_folder(store.path(), bucket)
    names = (bucket / "parts").names()
    sizes = archive(bucket)
    assert sizes.cold < sizes.hot and len((bucket / "parts").names(".arrow.zst")) == 2
    restore(bucket)
    assert (bucket / "parts").names() == names
    for name in names:
        assert (bucket / "parts").read(name) == (store / "parts").read(name)
