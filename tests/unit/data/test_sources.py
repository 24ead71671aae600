"""Files found, indexed and cut in ranges: every row once, whatever the cut."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.files import Folder
from distill_jobs.data import sources
from distill_jobs.data.rows import RangeReader
from distill_jobs.spec import Data

FEATURES = {"documents": {"tokenizer": "bytes"}}


def data_of(train, **more):
    return Data.model_validate_json(json.dumps({"train": train, "features": FEATURES, **more}))


def read_all(found, rows_per_part):
    reader = RangeReader(["text"], "text")
    texts, names = [], []
    for shard in sources.ranges(found, rows_per_part)["train"]:
        assert shard.rows <= rows_per_part
        for rows in reader.read(shard):
            texts += rows.values("text")
            names += rows.sources
    return texts, names


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1, max_size=40),
    rows_per_part=st.integers(1, 50),
    kind=st.sampled_from(["jsonl", "csv"]),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_are_read_once_each(tmp_path, monkeypatch, texts, rows_per_part, kind):
    monkeypatch.setattr(sources, "STRIDE", 4)
    monkeypatch.setattr(sources, "_BLOCK", 7)
    if kind == "jsonl":
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    else:
        content = "n,text\n" + "".join(f'{i},"{text.replace(chr(34), chr(34) * 2)}"\n' for i, text in enumerate(texts))
    (tmp_path / f"a.{kind}").write_bytes(content.encode())
    found = sources.survey(data_of(str(tmp_path / f"a.{kind}")))
    read, names = read_all(found, rows_per_part)
    assert [text or "" for text in read] == texts
    assert names == [f"a.{kind}:{i + 1}" for i in range(len(texts))]


@pytest.mark.parametrize("rows_per_part", [1, 7, 10, 64, 1000])
def test_parquet_over_row_groups_and_files(parquet, tmp_path, rows_per_part):
    parquet("a", text=[f"a{i}" for i in range(23)], row_group_size=10)
    parquet("b", text=[f"b{i}" for i in range(40)], row_group_size=7)
    found = sources.survey(data_of(str(tmp_path / "*.parquet")))
    texts, _ = read_all(found, rows_per_part)
    assert texts == [f"a{i}" for i in range(23)] + [f"b{i}" for i in range(40)]
    # Out of order too, as an actor may get them.
    reader, shards = RangeReader(["text"], "text"), sources.ranges(found, rows_per_part)["train"]
    for number in np.random.default_rng(0).permutation(len(shards)):
        first = int(number) * rows_per_part
        read = [text for rows in reader.read(shards[number]) for text in rows.values("text")]
        assert read == texts[first : first + rows_per_part]


def test_globs_stay_in_their_folder_unless_told(tmp_path):
    for name in ("x/a.txt", "x/b.txt", "x/deep/c.txt", "x/deep/d.md", "y/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")

    def names(path):
        return [uri.removeprefix(f"{tmp_path}/") for uri, _, _ in sources.find(str(tmp_path / path))]

    assert names("x/*.txt") == ["x/a.txt", "x/b.txt"]
    assert names("*/[ae].txt") == ["x/a.txt", "y/e.txt"]
    assert names("x/**/*.txt") == ["x/a.txt", "x/b.txt", "x/deep/c.txt"]
    assert names("x/[!a].txt") == ["x/b.txt"]
    assert names("x") == ["x/a.txt", "x/b.txt", "x/deep/c.txt", "x/deep/d.md"]


def test_plain_text_files_carry_their_folder(tmp_path):
    for name in ("old/a.txt", "new/a.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f"the text of {name}")
    shard = sources.ranges(sources.survey(data_of(str(tmp_path / "*/a.txt"))), 10)["train"][0]
    rows = list(RangeReader(["text", "folder"], "text").read(shard))
    assert [r.values("folder")[0] for r in rows] == ["new", "old"]
    assert [r.sources[0] for r in rows] == ["new/a.txt:1", "old/a.txt:1"]


def test_unchanged_files_are_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    folder = Folder(str(tmp_path / "data"))
    first = sources.survey(data_of(str(path)), folder)
    sources.save_survey(first, folder)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_hashed", None)
        assert sources.survey(data_of(str(path)), folder) == first
    path.write_text('{"text": "another"}\n')
    assert sources.survey(data_of(str(path)), folder)["train"][0].sha256 != first["train"][0].sha256
