"""What travels with a job that is submitted, and where it lies then."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.files import Folder
from distill_jobs import shipping
from distill_jobs.errors import SpecError
from distill_jobs.shipping import pack, places, unpack
from distill_jobs.submitting import parse_env


def tree_of(**data: Any) -> dict[str, Any]:
    return {
        "data": {"train": "s3://b/train.parquet", "validation": 0.1, "features": {"tabular": {}}, **data},
        "teacher": {"model": {"mlp": {}}},
        "student": {"model": {"mlp": {}}},
        "distill": {"mix": [{"store": "s3://b/store", "share": 0.1}]},
        "costs": {},
    }


def test_every_setting_that_names_something_to_read_is_found() -> None:
    tree = tree_of(test=["/a", "/b"])
    tree["teacher"]["model"] = {"hf": "/models/big"}
    tree["distill"]["mix"].append({"store": "/other/store", "data": "/other/data", "share": 0.2})
    assert sorted(places(tree)) == [
        ("data.test", "/a"),
        ("data.test", "/b"),
        ("data.train", "s3://b/train.parquet"),
        ("distill.mix.0.store", "s3://b/store"),
        ("distill.mix.1.data", "/other/data"),
        ("distill.mix.1.store", "/other/store"),
        ("teacher.model.hf", "/models/big"),
    ]


def test_files_folders_and_globs_travel_and_are_found_again_in_the_workdir(tmp_path: Path) -> None:
    here = tmp_path / "here"
    for name in ("train.csv", "more/a.csv", "more/deep/b.csv", "more/c.txt", "model/config.json", "model/w/x.bin"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    tree = tree_of(train=[str(here / "train.csv"), str(here / "more/**/*.csv")], test="s3://b/test.csv")
    tree["teacher"]["model"] = {"hf": str(here / "model")}
    workdir = Folder(str(tmp_path / "run"))
    pack(tree, str(workdir), tmp_path / "box")
    unpack(tmp_path / "box", workdir)

    one, glob = tree["data"]["train"]
    assert Path(one).read_text() == "train.csv" and Path(one).is_relative_to(workdir.path("inputs"))
    base = glob.removesuffix("/**/*.csv")
    assert sorted(str(p.relative_to(base)) for p in Path(base).rglob("*.csv")) == ["a.csv", "deep/b.csv"]
    assert (Path(tree["teacher"]["model"]["hf"]) / "w/x.bin").read_text() == "model/w/x.bin"
    assert tree["data"]["test"] == "s3://b/test.csv"

    # The same content lies at the same place, wherever and whenever it is submitted from.
    again = tree_of(train=[str(here / "train.csv"), str(here / "more/**/*.csv")])
    os.utime(here / "train.csv", (time.time(), 1.0))
    pack(again, str(workdir), tmp_path / "box2")
    assert again["data"]["train"] == tree["data"]["train"]
    (here / "train.csv").write_text("other")
    pack(again := tree_of(train=str(here / "train.csv")), str(workdir), tmp_path / "box3")
    assert again["data"]["train"] != one


def test_what_is_too_large_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "MOST_BYTES", 100)
    (tmp_path / "small").write_bytes(b"s" * 60)
    (tmp_path / "large").write_bytes(b"l" * 70)
    tree = tree_of(train=str(tmp_path / "large"), test=str(tmp_path / "small"), validation=str(tmp_path / "nowhere"))
    pack(tree, "s3://b/run", tmp_path / "box")
    assert tree["data"]["train"] == str(tmp_path / "large")
    assert tree["data"]["test"].startswith("s3://b/run/inputs/")
    assert tree["data"]["validation"] == str(tmp_path / "nowhere")


def test_the_modules_of_factories_travel(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1")
    (tmp_path / "pack/__pycache__").mkdir(parents=True)
    (tmp_path / "pack/__init__.py").write_text("")
    tree = tree_of()
    tree["teacher"]["model"] = {"factory": {"target": "mine:make"}}
    tree["student"]["model"] = {"factory": {"target": "pack.models:make"}}
    found = shipping.code_of(tree, tmp_path)
    assert [path.name for path in found] == ["mine.py", "pack"]
    (tmp_path / "box").mkdir()
    for path in found:
        shipping.copy(path, tmp_path / "box")
    assert sorted(str(p.relative_to(tmp_path / "box")) for p in (tmp_path / "box").rglob("*")) == [
        "mine.py",
        "pack",
        "pack/__init__.py",
    ]
    tree["teacher"]["model"] = {"factory": {"target": "torchvision.models:resnet18"}}
    assert shipping.code_of({**tree, "student": {"model": {}}}, tmp_path) == []


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "HF_TOKEN"])
def test_no_secret_travels_in_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "value-of-it")
    for given in (name, f"{name}=value-of-it"):
        with pytest.raises(SpecError, match=f"--env {name}: .*no secret travels") as refused:
            parse_env([given])
        assert "value-of-it" not in str(refused.value)


def test_an_environment_is_given_or_taken_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    assert parse_env(["AWS_ENDPOINT_URL", "A=1=2", "B="]) == {
        "AWS_ENDPOINT_URL": "http://store:9000",
        "A": "1=2",
        "B": "",
    }
    with pytest.raises(SpecError, match="--env NOT_SET: it is not set here"):
        parse_env(["NOT_SET"])
