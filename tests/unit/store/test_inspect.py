"""Inspect tells a person what is in a store, whatever its codec."""

from pathlib import Path

import pytest
from store_cases import LENGTH, VOCABULARY, lm_facts, make_data, make_store, table_facts

from cluster.files import Folder
from distill_jobs.store.codecs import Codec
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.sampled import SampledCodec
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.inspect import describe, render


def store_of(tmp_path: Path, codec: Codec, rows: int = 6) -> Folder:
    folder, data = Folder(str(tmp_path / "store")), Folder(str(tmp_path / "data"))
    make_data(data, lm_facts(rows=rows))
    make_store(folder, lm_facts(rows=rows), data, codec)
    return folder


def test_language_model(tmp_path: Path) -> None:
    text = render(describe(store_of(tmp_path, TopKCodec(6)), samples=2))
    for expected in (
        "teacher-1",
        "topk (k 6)",
        "6 in 2 parts",
        "mass in the head",
        "mean entropy",
        "part0.jsonl",
        "seed 0",
    ):
        assert expected in text, text
    assert "draws" not in text


@pytest.mark.parametrize("codec", [TopKCodec(6), DenseCodec(), HybridCodec(6, 4), SampledCodec(8)])
def test_where_the_bytes_are(tmp_path: Path, codec: Codec) -> None:
    folder = store_of(tmp_path, codec, rows=40)
    page = describe(folder)
    assert sum(page["disk"].values()) == page["bytes"] == sum(p.stat().st_size for p in folder.path().rglob("*.arrow"))
    assert page["disk"]["target"] == 40 * LENGTH * page["bytes_per_position"]
    # Two lists of 8 ids, the sample id, the tokens, and two short texts a row.
    assert 40 * (2 * 4 * LENGTH + 12) < page["disk"]["data"] < 40 * (2 * 4 * LENGTH + 60)
    assert page["disk"]["framing"] > 0 and "Arrow's framing" in render(page)


@pytest.mark.parametrize("codec", [HybridCodec(6, 4), SampledCodec(8)])
def test_draws(tmp_path: Path, codec: Codec) -> None:
    page = describe(store_of(tmp_path, codec), samples=4)
    most = codec.arguments()["draws"]
    assert 1 <= page["draws"]["classes"] <= most and 0 < page["draws"]["mass"] <= 1.001
    assert page["head_mass"] + page["draws"]["mass"] == pytest.approx(1, abs=0.02)
    assert "mass left to the draws" in render(page)
    for sample in page["samples"]:
        names, probabilities = zip(*sample["likely"], strict=True)
        assert len(set(names)) == len(names) and list(probabilities) == sorted(probabilities, reverse=True)


def test_images(tmp_path: Path) -> None:
    facts, folder = table_facts("image", rows=200), Folder(str(tmp_path / "store"))
    make_data(Folder(str(tmp_path / "data")), facts)
    make_store(folder, facts, Folder(str(tmp_path / "data")), TopKCodec(2))
    page = describe(folder, samples=3)
    assert len(page["samples"]) == 3 and "'class " in render(page)
    assert 0.5 < page["teacher_wrong"] < 1.0 and 0 < page["head_mass"] < 1
    assert describe(folder, samples=0)["samples"] == []


def test_text_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    folder, root = store_of(tmp_path, HybridCodec(6, 4)), tmp_path
    (root / "data" / "tokenizer").mkdir()
    words = {f"word{i}": i for i in range(VOCABULARY)}
    Tokenizer(models.WordLevel(words, unk_token="word0")).save(str(root / "data" / "tokenizer" / "tokenizer.json"))
    assert "'word" in render(describe(folder))
