"""The prepare stage on a real Ray: the same data whatever the actors, resumed part by part, errors as themselves."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.files import Folder
from cluster.session import Session
from distill_jobs.data.facts import SPLITS
from distill_jobs.data.prepare import data_digest, prepare
from distill_jobs.errors import DataError
from distill_jobs.spec import parse_job


@pytest.fixture(scope="module")
def session():
    with Session(cpus=2) as session:
        yield session


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    random = np.random.default_rng(0)
    columns = {
        "age": random.normal(40, 10, 500),
        "sex": random.choice(["Male", "Female"], 500),
        "income": random.choice(["low", "high"], 500),
    }
    path = tmp_path_factory.mktemp("people") / "people.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def job_of(workdir, train, actors=2):
    model = {"mlp": {"hidden": [4]}}
    return parse_job(
        {
            "name": "people",
            "task": "classification",
            "workdir": str(workdir),
            "data": {
                "train": str(train),
                "features": {"tabular": {"numeric": ["age"], "categorical": ["sex"]}},
                "label": "income",
                "rows_per_part": 60,
                "actors": actors,
                "cpus_per_actor": 0.5,
            },
            "teacher": {"model": model, "train": {}},
            "student": {"model": model, "train": {}},
        }
    )


def checksums(workdir):
    return [Folder(str(workdir / "data" / name)).read_json("manifest.json")["part_sha256"] for name in SPLITS]


def test_same_data_whatever_the_actors_and_resumed(session, people, tmp_path):
    told = []
    facts, usage = prepare(
        job_of(tmp_path / "a", people), session, Folder(str(tmp_path / "a")), lambda *n: told.append(n)
    )
    assert told[-1] == (1000, 1000)
    assert facts.fingerprint == data_digest(job_of(tmp_path / "a", people))
    assert usage.rows == sum(split["rows"] for split in facts.splits.values()) == 500
    assert usage.core_seconds > 0
    assert usage.bytes_written > 0
    alone, _ = prepare(job_of(tmp_path / "b", people, 1), session, Folder(str(tmp_path / "b")), lambda *_: None)
    assert alone == facts
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")

    # Killed before the end: manifests not written, one part not committed.
    data = Folder(str(tmp_path / "a" / "data"))
    before = {name: (data / "train").read(name) for name in (data / "train").names(".json") if "part" in name}
    for folder in (data, *(data / name for name in SPLITS)):
        folder.remove("manifest.json")
    (data / "test").remove("part-00003.json")
    again, _ = prepare(job_of(tmp_path / "a", people), session, Folder(str(tmp_path / "a")), lambda *_: None)
    assert again == facts
    assert checksums(tmp_path / "a") == checksums(tmp_path / "b")
    after = {name: (data / "train").read(name) for name in before}
    # Range 3 was cut again for the test split; what it had given the train split already was adopted.
    assert before == after and (data / "test").exists("part-00003.json")

    # Nothing to do: nothing is touched.
    same, usage = prepare(job_of(tmp_path / "a", people), session, Folder(str(tmp_path / "a")), lambda *_: None)
    assert same == facts
    assert {name: (data / "train").read(name) for name in before} == after


def test_a_bad_row_ends_it_as_itself(session, people, tmp_path):
    table = pq.read_table(people).to_pydict()
    table["age"][321] = float("nan")
    pq.write_table(pa.table(table), tmp_path / "bad.parquet")
    work = tmp_path / "work"
    with pytest.raises(DataError, match=r"^row 322 of bad\.parquet: numeric column age holds nan"):
        prepare(job_of(work, tmp_path / "bad.parquet"), session, Folder(str(work)), lambda *_: None)
    assert not (work / "data" / "manifest.json").exists()
