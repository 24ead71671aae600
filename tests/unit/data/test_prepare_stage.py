"""The whole stage over small files: what comes out, and one sentence for whatever is wrong with what goes in."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cluster.files import Folder
from distill_jobs.data.batch import make_batch
from distill_jobs.data.prepare import data_digest
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import where
from distill_jobs.errors import DataError

TABULAR = {"tabular": {"numeric": ["age"], "categorical": ["sex"]}}


def people(count, seed=0):
    random = np.random.default_rng(seed)
    return {
        "age": random.normal(40, 10, count),
        "sex": random.choice(["Male", "Female"], count).tolist(),
        "income": random.choice(["low", "high"], count).tolist(),
    }


def all_rows(job, split="train"):
    reader = TableReader(Folder(job.workdir) / "data" / split)
    return reader.take(np.arange(reader.rows))


def test_tabular_rows_are_all_accounted_for(make_job, prepared, parquet):
    job = make_job(
        train=parquet("people", **people(3000)), features=TABULAR, label="income", slices=["sex"], rows_per_part=700
    )
    facts = prepared(job)
    assert facts.classes == ("high", "low")
    assert facts.feature_width == 3
    assert facts.splits["train"]["parts"] == 5
    splits = [all_rows(job, name) for name in ("train", "validation", "test")]
    sources = np.concatenate([rows["source"] for rows in splits])
    assert sorted(sources) == sorted(f"people.parquet:{i + 1}" for i in range(3000))
    assert 0.07 < facts.splits["test"]["rows"] / 3000 < 0.13
    train = splits[0]
    parts = [where(int(i)) for i in train["sample_id"]]
    assert len(set(parts)) == len(parts)
    features = train["features"]
    assert abs(features[:, 0].mean()) < 1e-5
    assert abs(features[:, 0].std() - 1) < 1e-5
    np.testing.assert_array_equal(features[:, 1] == 1, train["slice.sex"] == "Female")


def test_same_output_for_csv_jsonl_and_parquet(make_job, prepared, parquet, tmp_path):
    columns = people(300)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [",".join(f'"{value}"' for value in row.values()) for row in rows]
    (tmp_path / "people.csv").write_text("age,sex,income\r\n" + "\r\n".join(lines))
    outcomes = []
    paths = [parquet("people", **columns), str(tmp_path / "people.jsonl"), str(tmp_path / "people.csv")]
    for number, path in enumerate(paths):
        job = make_job(train=path, features=TABULAR, label="income", validation=0.0, test=0.0)
        job = job.model_copy(update={"workdir": str(tmp_path / f"work{number}")})
        prepared(job)
        outcomes.append(all_rows(job))
    for other in outcomes[1:]:
        np.testing.assert_array_equal(other["features"], outcomes[0]["features"])
        np.testing.assert_array_equal(other["label"], outcomes[0]["label"])


def test_documents_come_back_whole_from_their_segments(make_job, prepared, tmp_path):
    texts = [f"document {i}: " + "é" * (i % 37) for i in range(120)] + ["", "   "]
    corpora = ["a" if i % 3 else "b" for i in range(122)]
    rows = [json.dumps({"text": t, "corpus": c}, ensure_ascii=False) for t, c in zip(texts, corpora, strict=True)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    features = {"documents": {"sequence_length": 64, "tokenizer": "bytes"}}
    job = make_job(
        train=str(tmp_path / "texts.jsonl"),
        features=features,
        slices=["corpus"],
        validation=0.0,
        test=0.0,
        rows_per_part=50,
    )
    facts = prepared(job)
    assert facts.vocabulary == 258
    assert facts.targets == 258
    assert facts.dropped["empty"] == 2
    rows = all_rows(job)
    pieces = []
    for ids, segments, tokens in zip(rows["input_ids"], rows["segments"], rows["tokens"], strict=True):
        assert (segments > 0).sum() == tokens
        pieces += [ids[segments == n] for n in range(1, segments.max() + 1)]
    whole = sorted(
        bytes(p[:-1].astype(np.uint8)).decode(errors="replace") for p in pieces if len(p) < 64 and p[-1] == 257
    )
    short = sorted(t for t in texts if t.strip() and len(t.encode()) < 63)
    assert set(short) <= set(whole)
    batch = make_batch(rows, facts)
    assert batch.positions == sum(len(piece) - 1 for piece in pieces)
    assert (batch.inputs["position_ids"][batch.inputs["segments"] > 0].numpy().max()) < 64


def test_held_out_rows_name_the_document_of_every_piece(make_job, prepared, tmp_path):
    texts = [f"{i} " + "x" * (25 * i % 90) for i in range(60)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    features = {"documents": {"sequence_length": 32, "tokenizer": "bytes"}}
    job = make_job(train=str(tmp_path / "texts.jsonl"), features=features, validation=0.0, test=0.5)
    prepared(job)
    held_out, training = (TableReader(Folder(job.workdir) / "data" / split) for split in ("test", "train"))
    assert "documents" in held_out.schema.names and "documents" not in training.schema.names
    rows, found = held_out.take(range(held_out.rows)), {}
    for ids, segments, named in zip(rows["input_ids"], rows["segments"], rows["documents"], strict=True):
        for number, source in enumerate(named.split("\n"), 1):
            found.setdefault(source, bytearray()).extend(ids[segments == number].clip(max=10).astype(np.uint8))
        assert number == segments.max()
    # A byte a token, and one that ends it; a piece of one token is left out.
    for source, pieces in found.items():
        whole = len(texts[int(source.rpartition(":")[2]) - 1]) + 1
        assert len(pieces) == whole - (whole % 32 == 1)


def test_text_is_cut_padded_and_counted(make_job, prepared, parquet):
    path = parquet("texts", text=["short", "x" * 50, "", "four"], label=[0, 1, 0, 1])
    job = make_job(
        train=path,
        features={"text": {"max_length": 16, "tokenizer": "bytes"}},
        label="label",
        validation=0.0,
        test=0.0,
    )
    facts = prepared(job)
    assert facts.dropped == {"truncated": 1}
    batch = make_batch(all_rows(job), facts)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [5, 16, 1, 4]
    assert bytes(batch.inputs["input_ids"][0, :5].tolist()) == b"short"


def encoded(pixels, kind="PNG"):
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def test_images_as_bytes_structs_and_numbers_agree(make_job, prepared, parquet, tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
    pngs = [encoded(image) for image in images]
    nested = np.moveaxis(images, -1, 1).tolist()
    flat = pa.FixedSizeListArray.from_arrays(pa.array(np.moveaxis(images, -1, 1).reshape(-1)), 90)
    columns = {"png": pngs, "struct": [{"bytes": p, "path": None} for p in pngs], "nested": nested, "flat": flat}
    outcomes = []
    for name, column in columns.items():
        path = parquet(name, image=column, label=list(range(10)) * 2)
        features = {"image": {"shape": [3, 6, 5]}}
        job = make_job(train=path, features=features, label="label", validation=0.0, test=0.0)
        job = job.model_copy(update={"workdir": str(tmp_path / f"work-{name}")})
        facts = prepared(job)
        assert facts.classes == tuple(str(i) for i in range(10))
        outcomes.append(make_batch(all_rows(job), facts).inputs["pixels"].numpy())
    expected = np.moveaxis(images, -1, 1).astype(np.float32) / 255
    for outcome in outcomes:
        np.testing.assert_allclose(outcome, expected, atol=1e-6)


def bad(columns, **changes):
    return {**columns, **changes}


@pytest.mark.parametrize(
    ("columns", "changes", "sentence"),
    [
        ({"income": ["low"] * 9 + [None]}, {}, "row 10 of people.parquet: the label income is missing"),
        ({"income": ["low"] * 9 + ["?"]}, {"classes": ["low", "high"]}, "label '?' is not among the classes"),
        ({"income": ["low"] * 10}, {}, "fewer than two classes"),
        ({"age": [1.0] * 9 + [float("nan")]}, {}, "row 10 of people.parquet: numeric column age holds nan"),
        ({"age": [1.0] * 3 + [float("inf")] * 7}, {}, "row 4 of people.parquet: numeric column age holds inf"),
        ({"age": [1.0] * 3 + [None] * 7}, {}, "row 4 of people.parquet: numeric column age is empty; fill"),
        ({"age": ["1", "2", "x"] + ["3"] * 7}, {}, "row 3 of people.parquet: numeric column age holds 'x'"),
        ({}, {"label": "incme"}, "people.parquet has no column 'incme' (data.label); did you mean 'income'?"),
        ({}, {"slices": ["country"]}, "people.parquet has no column 'country' (data.slices); it has age, sex"),
        ({}, {"train": "/nowhere/people.parquet"}, "/nowhere/people.parquet does not exist"),
        ({}, {"train": "/nowhere/*.parquet"}, "no file matches /nowhere/*.parquet"),
        ({}, {"test": 0.001}, "the test split is empty"),
        ({"age": [], "sex": [], "income": []}, {}, "the train data are empty"),
    ],
)
def test_bad_tables_get_one_sentence(make_job, prepared, parquet, columns, changes, sentence):
    path = parquet("people", **{**people(10), **columns})
    data = {"train": path, "features": TABULAR, "label": "income", "validation": 0.0, "test": 0.0, **changes}
    job = make_job(**data)
    with pytest.raises(DataError) as caught:
        prepared(job)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (Folder(job.workdir) / "data").exists("manifest.json")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (encoded(np.zeros((4, 4), np.uint8)), "has the shape (1, 4, 4), not (1, 8, 8)"),
        (b"not an image", "can't be decoded"),
        (encoded(np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8))[:60], "can't be decoded"),
        (None, "is missing"),
    ],
)
def test_bad_images_get_one_sentence(make_job, prepared, parquet, value, sentence):
    good = encoded(np.zeros((8, 8), np.uint8))
    path = parquet("images", image=pa.array([good, value], pa.binary()), label=[0, 1])
    job = make_job(train=path, features={"image": {"shape": [1, 8, 8]}}, label="label", validation=0.0, test=0.0)
    with pytest.raises(DataError, match=r"row 2 of images.parquet: image image") as caught:
        prepared(job)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "row 2 of bad.jsonl: it is not UTF-8 text"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "row 2 of bad.jsonl: it is not valid JSON"),
        ("bad.jsonl", b'{"text": "a"}\n[1]\n', "row 2 of bad.jsonl: it is not a JSON object"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": 5}\n', "row 2 of bad.jsonl: column text holds 5, which is not text"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "row 2 of bad.jsonl: column text is not valid Unicode"),
        ("bad.csv", b"text,n\na,1\nb\n", "row 2 of bad.csv: it has 1 fields where the header has 2"),
        ("bad.txt", b"\xff\xfe", "row 1 of bad.txt: it is not UTF-8 text"),
        ("bad.parquet", b"PAR1 no", "bad.parquet is not a readable Parquet file"),
        ("empty.txt", b" \n", "the train split is empty"),
        ("what.bin", b"x", "can't tell the format of"),
    ],
)
def test_bad_texts_get_one_sentence(make_job, prepared, tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    features = {"documents": {"sequence_length": 16, "tokenizer": "bytes"}}
    with pytest.raises(DataError) as caught:
        prepared(make_job(train=str(tmp_path / name), features=features, validation=0.0, test=0.0))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_digest_follows_content_and_spec_alone(make_job, parquet, tmp_path):
    path = parquet("people", **people(50))
    data = {"train": path, "features": TABULAR, "label": "income"}
    first = data_digest(make_job(**data))
    assert data_digest(make_job(**data, actors=2)) == first
    assert data_digest(make_job(**data, slices=["sex"])) != first
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    Path(path).rename(moved / "people.parquet")
    assert data_digest(make_job(**{**data, "train": str(moved / "people.parquet")})) == first
    parquet("people", **people(51))
    assert data_digest(make_job(**data)) != first


def test_a_file_in_two_splits_is_refused(make_job, prepared, parquet):
    path = parquet("people", **people(50))
    with pytest.raises(DataError, match=r"is in both data\.train and data\.test"):
        prepared(make_job(train=path, test=path, features=TABULAR, label="income"))
