"""The stores of several teachers over the same rows: rows, weights, quarantine, and what doesn't fit together."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_cases import CLASSES, lm_facts, make_data, make_store, table_facts

from cluster.files import Folder
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.table import sample_id
from distill_jobs.errors import StoreError
from distill_jobs.spec import Distill
from distill_jobs.store.codecs import Codec
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.ensemble import EnsembleStore, by_label
from distill_jobs.store.reader import LogitStore
from distill_jobs.training.source import store_source


def spec(*teachers: dict[str, Any], **more: Any) -> Distill:
    return Distill.model_validate_json(json.dumps({"teachers": teachers, **more}))


def make(
    tmp_path: Path, facts: DataFacts, codecs: list[Codec], without: list[list[int]] | None = None
) -> tuple[list[LogitStore], list[torch.Tensor]]:
    """Stores of several random teachers over one data set, and their logits [rows · positions, targets]."""
    data = Folder(str(tmp_path / "data"))
    make_data(data, facts)
    stores, logits = [], []
    for i, codec in enumerate(codecs):
        folder = Folder(str(tmp_path / f"store-{i}"))
        made = make_store(folder, facts, data, codec, seed=i, without=without[i] if without else ())
        stores.append(LogitStore.open(folder, data))
        logits.append(torch.cat([made[part] for part in sorted(made)]))
    return stores, logits


def test_a_classifier_s_teachers_are_mixed_by_weight(tmp_path: Path) -> None:
    facts = table_facts("image", rows=8)
    stores, logits = make(tmp_path, facts, [DenseCodec(), DenseCodec(), DenseCodec()])
    wanted = spec({"weight": 1}, {"store": "b", "weight": 2.0}, {"store": "c", "weight": 5})
    ensemble = EnsembleStore(stores, wanted.teachers)
    rows = np.array([7, 0, 3])
    columns = ensemble.take(rows)
    signal = ensemble.signal(columns, "cpu")
    true = sum(w * torch.softmax(z[rows].double(), -1) for w, z in zip((1 / 8, 2 / 8, 5 / 8), logits, strict=True))
    assert isinstance(true, torch.Tensor)
    torch.testing.assert_close(signal.at(1.0)[0].exp().double(), true, atol=2e-3, rtol=2e-3)
    softened = true.sqrt() / true.sqrt().sum(-1, keepdim=True)
    torch.testing.assert_close(signal.at(2.0)[0].exp().double(), softened, atol=2e-3, rtol=2e-3)
    gold = true[torch.arange(3), torch.from_numpy(columns["label"])]
    torch.testing.assert_close(signal.gold_logprob.exp().double(), gold, atol=2e-3, rtol=2e-3)
    assert columns["pixels"].shape == (3, 4) and set(ensemble.take(rows, soft=False)) == {
        "sample_id",
        "pixels",
        "label",
    }


def test_slices_weigh_rows_and_labels_weigh_positions(tmp_path: Path) -> None:
    stores, _ = make(tmp_path, lm_facts(), [HybridCodec(8, 4), HybridCodec(6, 4)])
    none, only = {"style": {"verse": 0.0}}, {"style": {"verse": 1.0, "prose": 0.0}}
    ensemble = EnsembleStore(stores, spec({"slices": none}, {"store": "b", "slices": only}).teachers)
    columns = ensemble.take(np.array([1, 4]))
    keep = torch.zeros(2, 8, dtype=torch.bool)
    keep[0, :2] = keep[1, 3] = True
    signal, own = ensemble.signal(columns, "cpu", keep), stores[1].signal(stores[1].take(np.array([1, 4])), "cpu", keep)
    torch.testing.assert_close(signal.expand(1.0), own.expand(1.0), atol=2e-2, rtol=2e-2)
    nobody = EnsembleStore(stores, spec({"slices": none}, {"store": "b", "slices": none}).teachers)
    with pytest.raises(StoreError, match="no teacher any weight for rows of style 'verse'"):
        nobody.signal(nobody.take(np.array([0])), "cpu")
    with pytest.raises(StoreError, match="by the slice 'age', but the data have style"):
        EnsembleStore(stores, spec({"slices": {"age": {"old": 2}}}, {"store": "b"}).teachers)


def test_whoever_is_right_on_the_label(tmp_path: Path) -> None:
    stores, logits = make(tmp_path, table_facts(rows=400), [DenseCodec(), DenseCodec()])
    columns = EnsembleStore(stores, spec({}, {"store": "b"}).teachers).take(np.arange(400))
    gold = torch.from_numpy(columns["label"].astype(np.int64))
    signals = [store.signal(store.take(np.arange(400)), "cpu") for store in stores]
    base = torch.tensor([0.25, 0.75])[:, None].expand(2, 400)
    probability = torch.stack([torch.softmax(z, -1)[torch.arange(400), gold] for z in logits])
    right = torch.stack([z.argmax(-1) == gold for z in logits])
    expected = torch.where(right, base, torch.zeros(()))
    for i in range(400):
        if not right[:, i].any():
            expected[int(probability[:, i].argmax()), i] = 1.0
        expected[:, i] /= expected[:, i].sum()
    assert {int(n) for n in right.sum(0)} == {0, 1, 2}
    # Where two give the right class the same but for fp16, either may be taken.
    sure = (probability[0] / probability[1]).log().abs() > 0.01
    torch.testing.assert_close(by_label(base, signals, "right")[:, sure], expected[:, sure])
    soft = base * probability
    torch.testing.assert_close(by_label(base, signals, "probability"), soft / soft.sum(0), atol=2e-3, rtol=5e-3)
    assert torch.equal(by_label(base, signals, None), base)
    # A position without a right class goes by the weights.
    blind = [dataclasses.replace(signal, gold_rank=torch.full((400,), -1)) for signal in signals]
    assert torch.equal(by_label(base, blind, "right"), base)


@pytest.mark.parametrize("features", ["image", "documents"])
def test_rows_in_anyone_s_quarantine_are_left_out_of_all(tmp_path: Path, features: str) -> None:
    facts = lm_facts(rows=12, parts=3) if features == "documents" else table_facts("image", rows=12, parts=3)
    gone = [[sample_id(0, 1), sample_id(2, 0)], [sample_id(2, 3), sample_id(2, 0)]]
    codec: Codec = TopKCodec(5) if features == "documents" else DenseCodec()
    stores, logits = make(tmp_path, facts, [codec, codec], gone)
    ensemble = EnsembleStore(stores, spec({}, {"store": "b"}).teachers)
    left = [row for row in range(12) if sample_id(row // 4, row % 4) not in gone[0] + gone[1]]
    assert ensemble.rows == len(left) == 9 and ensemble.part_rows.tolist() == [3, 4, 2]
    rows = np.random.default_rng(0).permutation(9)
    columns = ensemble.take(rows)
    assert columns["sample_id"].tolist() == [sample_id(left[r] // 4, left[r] % 4) for r in rows]
    for i, store in enumerate(stores):
        own = store.signal(store.take(store.rows_of(columns["sample_id"])), "cpu")
        mine = {name.removeprefix(f"{i}:"): v for name, v in columns.items() if name.startswith(f"{i}:")}
        assert torch.equal(store.signal(mine, "cpu").gold_logprob, own.gold_logprob)
    if features == "image":
        places = [left[r] for r in rows]
        true = sum(torch.softmax(z[places].double(), -1) / 2 for z in logits)
        torch.testing.assert_close(
            ensemble.signal(columns, "cpu").at(1.0)[0].exp().double(), true, atol=2e-3, rtol=2e-3
        )


def test_what_does_not_fit_together(tmp_path: Path) -> None:
    wanted = spec({}, {"store": "b"}).teachers
    stores, _ = make(tmp_path / "a", table_facts(), [DenseCodec(), TopKCodec(3)])
    with pytest.raises(StoreError, match="one of them is dense and the other is not"):
        EnsembleStore(stores, wanted)
    other, _ = make(tmp_path / "b", dataclasses.replace(table_facts(), fingerprint="data-2"), [DenseCodec()])
    with pytest.raises(StoreError, match="is of other rows than the job's own store"):
        EnsembleStore([stores[0], other[0]], wanted)
    everything = [sample_id(part, row) for part in range(2) for row in range(3)]
    data = Folder(str(tmp_path / "a" / "data"))
    folder = Folder(str(tmp_path / "empty"))
    make_store(folder, table_facts(), data, DenseCodec(), without=everything)
    with pytest.raises(StoreError, match="no row is in the stores of all teachers"):
        EnsembleStore([stores[0], LogitStore.open(folder, data)], wanted)


def test_training_reads_them_as_one(tmp_path: Path) -> None:
    """The same rows in the same order with soft labels and without."""
    facts = table_facts(rows=8)
    make(tmp_path, facts, [DenseCodec(), DenseCodec()], [[sample_id(0, 2)], []])
    wanted = spec({}, {"store": str(tmp_path / "store-1"), "weight": 3})
    store, data = Folder(str(tmp_path / "store-0")), Folder(str(tmp_path / "data"))
    soft, hard = (store_source(store, data, on, teachers=wanted) for on in (True, False))
    assert soft.rows == hard.rows == 7
    numbers = soft.order(3).take(0, 7)
    assert np.array_equal(numbers, hard.order(3).take(0, 7))
    (batch, signal), (plain, none) = soft.load(numbers, "cpu"), hard.load(numbers, "cpu")
    assert signal is not None and none is None and torch.equal(batch.sample_ids, plain.sample_ids)
    assert signal.head_logprob.shape == (7, CLASSES)
