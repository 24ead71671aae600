"""Checkpoints without a gang: what counts as one, which stay, what becomes of unfinished and damaged ones."""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import fs

from cluster.errors import CheckpointError, FileError
from cluster.files import Folder, filesystem
from distill_jobs.spec.train import Checkpoint
from distill_jobs.training import checkpoint
from distill_jobs.training.chances import restore_chances, take_chances
from distill_jobs.training.checkpoint import Errand, Keeper
from distill_jobs.training.shelf import Shelf


@dataclass
class Place:
    """One of several ranks that share nothing but the folder."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    leaving: bool = False
    kept_until: int = 0

    def agreed(self, number: int) -> int:
        return number

    def must_leave(self) -> bool:
        return self.leaving

    def kept(self) -> None:
        self.kept_until += 1


@dataclass
class Written:
    text: str
    rank: int

    def write(self, folder: Path) -> list[str]:
        (folder / f"engine-{self.rank}").write_text(self.text)
        return [f"engine-{self.rank}"]


@dataclass
class Motor:
    """Stands for the engine: its whole state is a text."""

    text: str = ""
    rank: int = 0
    loaded: list[Path] = field(default_factory=list)
    fails: Exception | None = None

    def snapshot(self) -> Any:
        if self.fails is not None:
            return _Failing(self.fails)
        return Written(self.text, self.rank)

    def load_state(self, folder: Path) -> None:
        self.text = (folder / f"engine-{self.rank}").read_text()
        self.loaded.append(folder)

    def sum(self, values: list[float]) -> list[float]:
        return values

    def barrier(self) -> None:
        return


@dataclass
class _Failing:
    error: Exception

    def write(self, _: Path) -> list[str]:
        raise self.error


def keeper(folder: Path | Folder, digest: str = "d", place: Place | None = None, **spec: Any) -> Keeper:
    wanted = {"every_steps": 2, "every_minutes": None, **spec}
    return Keeper(Folder(str(folder)), digest, Checkpoint(**wanted), place or Place())  # type: ignore[arg-type]


def save(kept: Keeper, step: int, best: bool = False, text: str | None = None) -> None:
    kept.save(Motor(text or f"at {step}"), {"step": step}, best=best)  # type: ignore[arg-type]
    kept.wait()


def committed(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.json"))


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    kept = keeper(tmp_path, keep=2)
    for step in (2, 4, 6, 8, 10):
        save(kept, step, best=step in (2, 4))
    assert committed(tmp_path) == [4, 8, 10]
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3
    again, motor = keeper(tmp_path), Motor()
    record = again.restore(motor)  # type: ignore[arg-type]
    assert record is not None and record["loop"] == {"step": 10} and motor.text == "at 10"
    again.load_best(motor, 4)  # type: ignore[arg-type]
    assert motor.text == "at 4"


def test_what_is_damaged_is_passed_over(tmp_path: Path) -> None:
    kept = keeper(tmp_path, keep=3)
    for step in (2, 4, 6):
        save(kept, step)
    [newest] = tmp_path.glob("step-000006.*/engine-0")
    newest.write_text("at 7")
    [second] = tmp_path.glob("step-000004.*/engine-0")
    second.unlink()
    motor = Motor()
    record = keeper(tmp_path).restore(motor)  # type: ignore[arg-type]
    assert record is not None and record["step"] == 2 and motor.text == "at 2"
    assert committed(tmp_path) == [2] and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(FileError, match=r"step-000006\.json is missing"):
        kept.load_best(motor, 6)  # type: ignore[arg-type]
    (tmp_path / record["folder"] / "engine-0").unlink()
    with pytest.raises(CheckpointError, match="of step 2, is damaged"):
        kept.load_best(motor, 2)  # type: ignore[arg-type]


def test_another_arms_and_unfinished_ones_are_removed(tmp_path: Path) -> None:
    save(keeper(tmp_path, digest="before"), 8)
    (tmp_path / "step-000009.json").write_text("{")
    unfinished = Shelf(Folder(str(tmp_path)), "d", "0badcafe")
    unfinished.put(10, 0, Written("at 10", 0).write)
    (tmp_path / "notes.txt").write_text("somebody else's")
    assert keeper(tmp_path).restore(Motor()) is None  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_nothing_is_committed_before_all_ranks_have_written(tmp_path: Path) -> None:
    first = keeper(tmp_path, place=Place(0, 2))
    first.save(Motor("whole"), {"step": 2})  # type: ignore[arg-type]
    [writing] = [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    writing.join(0.5)
    assert writing.is_alive() and committed(tmp_path) == []
    second = keeper(tmp_path, place=Place(1, 2))
    second.shelf = Shelf(Folder(str(tmp_path)), "d", first.shelf.attempt)
    second.save(Motor("whole", 1), {"step": 2})  # type: ignore[arg-type]
    second.wait()
    first.wait()
    assert committed(tmp_path) == [2]
    # On other ranks the other number of files is no trouble: each finds its own.
    motor = Motor()
    record = keeper(tmp_path).restore(motor)  # type: ignore[arg-type]
    assert record is not None and record["world"] == 2 and motor.text == "whole"


def test_a_run_that_ends_waits_for_no_other_rank(tmp_path: Path) -> None:
    kept = keeper(tmp_path, place=Place(0, 2))
    kept.save(Motor("half"), {"step": 2})  # type: ignore[arg-type]
    kept.finish()
    assert committed(tmp_path) == []


def test_ranks_that_share_no_folder_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_PATIENCE_SECONDS", 0.0)
    kept = keeper(tmp_path, place=Place(0, 2))
    kept.save(Motor("half"), {"step": 2})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"not all of 2 ranks .* give all nodes the same workdir"):
        kept.wait()


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    kept = keeper(tmp_path)
    kept.save(Motor(fails=FileError("no space is left")), {"step": 2})  # type: ignore[arg-type]
    with pytest.raises(FileError, match="no space"):
        save(kept, 4)


def test_when_one_is_due(tmp_path: Path) -> None:
    now = [0.0]
    place = Place()
    spec = Checkpoint(every_steps=5, every_minutes=2.0)
    kept = Keeper(Folder(str(tmp_path)), "d", spec, place, clock=lambda: now[0])  # type: ignore[arg-type]
    assert [kept.errand(step) for step in (1, 4, 5)] == [Errand.NONE, Errand.NONE, Errand.SAVE]
    now[0] = 119.0
    assert kept.errand(6) == Errand.NONE
    now[0] = 120.0
    assert kept.errand(6) == Errand.SAVE
    save(kept, 6)
    assert kept.errand(7) == Errand.NONE
    place.leaving = True
    assert kept.errand(7) == Errand.LEAVE
    other = Keeper(Folder(str(tmp_path)), "d", spec, Place(1, 2))  # type: ignore[arg-type]
    assert other.errand(5) == Errand.NONE


def test_an_object_store_keeps_them_too(
    s3: Callable[[str], Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_NODE_CACHE", str(tmp_path / "cache"))
    folder = s3("bucket") / "arm/checkpoints"
    assert keeper(folder).restore(Motor()) is None  # type: ignore[arg-type]
    save(keeper(folder, digest="before"), 8)
    kept = keeper(folder, keep=1)
    Shelf(folder, "d", "0badcafe").put(10, 0, Written("at 10", 0).write)
    save(kept, 2, best=True)
    save(kept, 4)
    save(kept, 6)
    assert sorted(kept.shelf.records()) == [2, 6]
    motor = Motor()
    record = keeper(folder).restore(motor)  # type: ignore[arg-type]
    assert record is not None and record["step"] == 6 and motor.text == "at 6"
    assert folder.names() == ["step-000002.json", "step-000006.json"]
    system, root = filesystem(folder.uri)
    inside = [info for info in system.get_file_info(fs.FileSelector(root, recursive=True)) if info.is_file]
    assert len(inside) == 2 * 4
    kept.load_best(motor, 2)  # type: ignore[arg-type]
    assert motor.text == "at 2"
    folder.write(f"{record['folder']}/engine-0", b"at 7")
    again = keeper(folder).restore(motor)  # type: ignore[arg-type]
    assert again is not None and again["step"] == 2


def test_random_numbers_go_on_where_they_were() -> None:
    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), random.gauss(), np.random.randn()

    draw()
    state = take_chances("cpu")
    first = draw()
    draw()
    restore_chances(state, "cpu")
    assert draw() == first
