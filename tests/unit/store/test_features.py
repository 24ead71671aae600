"""Features of layers in a store: how far off they come back, and that nothing that is wrong with them goes unseen."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import CLASSES, LENGTH, lm_facts, make_data, make_store, table_facts

from cluster.files import Folder, digest
from distill_jobs.data.batch import make_batch
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import record_name
from distill_jobs.errors import SpecError, StoreError
from distill_jobs.store.archive import archive, restore
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.exchange.tables import batch_of_rows
from distill_jobs.store.features import FeatureCoding, matrix
from distill_jobs.store.inspect import describe, render
from distill_jobs.store.mixture import MixedStore
from distill_jobs.store.plan import StorePlan
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.verify import verify
from distill_jobs.store.writer import finish, start, write_part

CODING = FeatureCoding(("layers.0", "layers.1"), width=4, bits=8)
HIDDEN = {"layers.0": 6, "layers.1": 4}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    bits=st.sampled_from([8, 16]),
    magnitude=st.floats(-18, 18).map(lambda power: 10.0**power),
)
def test_a_number_is_off_by_half_a_step_at_most(seed: int, bits: int, magnitude: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, 6, generator=draw) * magnitude * 10.0 ** torch.arange(-2.0, 3.0)[:, None]
    coding = FeatureCoding(("a",), 4, bits, seed)
    columns = coding.encode("a", rows)
    coding.check(columns)
    exact = rows @ matrix(6, 4, f"{seed} a")
    largest = exact.abs().amax(dim=1, keepdim=True)
    off = (coding.decode(columns)["a"] - exact).abs()
    assert bool((off <= largest * (0.5 / coding.top + 1e-6)).all())
    assert {name: (field.dtype, field.width) for name, field in coding.fields().items()} == {
        name: (str(values.numpy().dtype), values.shape[1]) for name, values in columns.items()
    }


def test_nothing_stays_nothing_and_what_is_not_finite_is_told() -> None:
    rows = torch.randn(5, 6)
    rows[1], rows[2] = 0.0, 1e-38
    rows[3, 0], rows[4, 2] = float("inf"), float("nan")
    coding = FeatureCoding(("a",), 6, 8)
    columns = coding.encode("a", rows)
    assert coding.broken("a", columns).tolist() == [False, False, False, True, True]
    assert columns["feature_0"][1:].eq(0).all()
    assert columns["feature_0_scale"][1:3].eq(0).all()


def test_the_projection_keeps_scalar_products_and_is_the_same_everywhere() -> None:
    whole = matrix(64, 64, "0 a").double()
    assert torch.allclose(whole @ whole.T, torch.eye(64, dtype=torch.float64), atol=1e-6)
    assert torch.equal(matrix(64, 8, "3 a"), matrix.__wrapped__(64, 8, "3 a"))
    assert not torch.equal(matrix(64, 8, "3 a"), matrix(64, 8, "3 b"))
    draw = torch.Generator().manual_seed(0)
    both = torch.randn(2, 16, generator=draw)
    found = torch.stack([torch.prod(both @ matrix(16, 4, f"{seed} a"), dim=0).sum() for seed in range(300)])
    spread = float(found.std()) / len(found) ** 0.5
    assert float(found.mean()) == pytest.approx(float(both[0] @ both[1]), abs=4 * spread)


def test_rounding_is_measured_from_what_is_stored() -> None:
    rows = torch.randn(4000, 128, generator=torch.Generator().manual_seed(0))
    for bits, most in ((8, 0.01), (16, 4e-5)):
        coding = FeatureCoding(("a",), 64, bits)
        columns = coding.encode("a", rows)
        exact = rows @ matrix(128, 64, "0 a")
        off = float((coding.decode(columns)["a"] - exact).norm() / exact.norm())
        assert coding.rounding(columns)["a"] == pytest.approx(off, rel=0.02) and off < most


def test_a_layer_narrower_than_what_is_stored_is_refused() -> None:
    with pytest.raises(SpecError, match=r"width is 4, but the teacher's layer layers\.0 gives only 3 numbers"):
        CODING.encode("layers.0", torch.zeros(2, 3))


# Stores.


def make(folder: Folder, data: Folder, facts: DataFacts, coding: FeatureCoding | None = CODING) -> dict[str, Any]:
    """A store with features of made-up layers; returns them, [rows · positions, H] a layer."""
    codec = DenseCodec() if facts.features == "tabular" else TopKCodec(4)
    plan = StorePlan.make(facts, codec, "teacher-1", facts.targets, features=coding)
    table = TableReader(data / "train")
    shas, hidden = table.facts["part_sha256"], {name: [] for name in HIDDEN}
    commits = start(folder, plan, shas)
    draw = torch.Generator().manual_seed(0)
    for part in range(plan.parts):
        batches, targets = list(table.batches(part)), []
        for batch in batches:
            columns = {name: np.stack(batch.column(name).to_numpy(zero_copy_only=False)) for name in _inputs(facts)}
            made = make_batch(columns, facts)
            count = batch.num_rows * facts.positions_per_row
            logits = torch.randn(count, facts.targets, generator=draw)
            chances = uniforms(0, made.sample_ids, facts.positions_per_row)
            encoded = codec.encode(logits, made.labels.flatten(), chances)
            for name, width in HIDDEN.items():
                rows = torch.randn(count, width, generator=draw)
                hidden[name].append(rows)
                encoded |= coding.encode(name, rows) if coding else {}
            targets.append(encoded)
        commits.add(write_part(folder, plan, part, batches, targets, data_sha256=shas[part]))
    finish(folder, plan, commits)
    return {name: torch.cat(rows) for name, rows in hidden.items()}


def _inputs(facts: DataFacts) -> list[str]:
    return ["sample_id", *(("features", "label") if facts.features == "tabular" else ("input_ids", "segments"))]


@pytest.fixture(scope="module", params=["documents", "tabular"])
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, Folder, dict[str, Any]]:
    root = tmp_path_factory.mktemp(request.param)
    facts = lm_facts() if request.param == "documents" else table_facts()
    folder, data = Folder(str(root / "store")), Folder(str(root / "data"))
    make_data(data, facts)
    return folder, data, make(folder, data, facts)


def test_features_come_back_beside_the_signal(case: Any) -> None:
    folder, data, hidden = case
    assert verify(folder, data) == []
    store = LogitStore.open(folder, data)
    keep = torch.zeros(store.rows, store.plan.positions_per_row, dtype=torch.bool)
    keep[1], keep[4, 0] = True, True
    columns = store.take(np.arange(store.rows), layers=("layers.1",))
    assert "t.feature_0" not in columns
    signal = store.signal(columns, "cpu", keep)
    assert signal.features is not None and list(signal.features) == ["layers.1"]
    exact = (hidden["layers.1"] @ matrix(4, 4, "0 layers.1"))[keep.flatten()]
    assert torch.allclose(signal.features["layers.1"], exact, atol=float(exact.abs().max()) / 254 + 1e-5)
    assert torch.equal(signal.to("cpu").features["layers.1"], signal.features["layers.1"])  # type: ignore[index]
    plain = store.signal(store.take(np.arange(store.rows)), "cpu", keep)
    assert plain.features is None and torch.equal(plain.head_logprob, signal.head_logprob)
    with pytest.raises(StoreError, match=r"no features of the teacher's layer layers\.9 \(it holds: layers\.0, "):
        store.check_layers(("layers.9",))


def test_they_are_told_and_exported(case: Any) -> None:
    folder, _, hidden = case
    page = describe(folder)
    assert page["bytes_per_position"] == page["codec_bytes"] + 2 * (4 + 4)
    assert page["disk"]["target"] == 6 * StorePlan.load(folder).positions_per_row * page["bytes_per_position"]
    told = render(page)
    assert "features      layers.0: 4 numbers of 8 bits, off by 0." in told and "8 bytes a position" in told
    store = LogitStore.open(folder)
    rows = batch_of_rows(store, np.arange(2))
    found = np.array(rows.column("feature.layers.0").to_pylist(), dtype=np.float32).reshape(-1, 4)
    exact = (hidden["layers.0"] @ matrix(6, 4, "0 layers.0"))[: len(found)].numpy()
    assert np.abs(found - exact).max() <= np.abs(exact).max() / 254 + 1e-5


def test_archived_and_restored_they_are_the_same_bytes(case: Any) -> None:
    folder, data, _ = case
    before = {path.name: path.read_bytes() for path in folder.path("parts").glob("*.arrow")}
    archive(folder)
    restore(folder)
    assert {path.name: path.read_bytes() for path in folder.path("parts").glob("*.arrow")} == before
    assert verify(folder, data) == []


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("feature_0_scale", float("nan"), "feature_0_scale holds values that are no scales"),
        ("feature_0_scale", -1.0, "feature_0_scale holds values that are no scales"),
        ("feature_1_scale", float("inf"), "feature_1_scale holds values that are no scales"),
        ("feature_1_scale", 1e-40, "feature_1_scale holds values that are no scales"),
        ("feature_1_scale", 0.0, "feature_1 holds numbers that don't fit"),
        ("feature_0", -128, "feature_0 holds numbers that don't fit"),
        ("feature_0", 0, "feature_0 holds numbers that don't fit"),
    ],
)
def test_wrong_values_with_right_checksums_are_named(tmp_path: Path, column: str, value: float, said: str) -> None:
    folder, data = Folder(str(tmp_path / "store")), Folder(str(tmp_path / "data"))
    make_data(data, table_facts())
    make(folder, data, table_facts())
    plan, shas = StorePlan.load(folder), TableReader(data / "train").facts["part_sha256"]
    [batch] = TableReader(folder / "parts", error=StoreError).batches(0)
    targets = {
        name: torch.from_numpy(np.array(batch.column(f"t.{name}").flatten()).reshape(-1, field.width))
        for name, field in plan.fields().items()
    }
    targets[column][1] = value
    (folder / "parts").remove(record_name(0))
    commits = start(folder, plan, shas)
    commits.add(write_part(folder, plan, 0, TableReader(data / "train").batches(0), [targets], data_sha256=shas[0]))
    finish(folder, plan, commits)
    assert any(said in sentence for sentence in verify(folder, data))
    with pytest.raises(StoreError, match=said):
        LogitStore.open(folder, data).take(np.arange(2))


def test_a_store_without_features_is_what_it_was(tmp_path: Path) -> None:
    folder, data = Folder(str(tmp_path / "store")), Folder(str(tmp_path / "data"))
    make_data(data, lm_facts())
    make_store(folder, lm_facts(), data, TopKCodec(4))
    plan, facts = StorePlan.load(folder), lm_facts()
    assert "features" not in folder.read_json("plan.json")
    # As it was before there were features, key by key.
    older = {
        "schema_version": 3,
        "teacher": "teacher-1",
        "tokenizer_sha": facts.tokenizer_sha,
        "vocabulary": {"real": facts.targets, "padded": facts.targets + 3},
        "codec": {"name": "topk", "k": 4},
        "positions_per_row": LENGTH,
        "seed": 0,
        "precision": "auto",
    }
    assert plan.contract == digest(older)
    other = dataclasses.replace(plan, features=CODING.as_plan())
    assert other.contract == digest({**older, "features": CODING.as_plan()})


def test_other_features_make_all_parts_anew(tmp_path: Path) -> None:
    folder, data = Folder(str(tmp_path / "store")), Folder(str(tmp_path / "data"))
    make_data(data, table_facts())
    make(folder, data, table_facts())
    shas = TableReader(data / "train").facts["part_sha256"]
    plan = StorePlan.load(folder)
    assert len(start(folder, plan, shas)) == plan.parts
    wider = FeatureCoding(CODING.layers, 3, 8)
    assert len(start(folder, dataclasses.replace(plan, features=wider.as_plan()), shas)) == 0


def test_stores_are_mixed_where_their_features_are_alike(tmp_path: Path) -> None:
    data = Folder(str(tmp_path / "data"))
    make_data(data, table_facts())
    opened = []
    for name, coding in (("a", CODING), ("b", CODING), ("c", FeatureCoding(CODING.layers, 4, 8, seed=1))):
        make(Folder(str(tmp_path / name)), data, table_facts(), coding)
        opened.append(LogitStore.open(Folder(str(tmp_path / name)), data))
    MixedStore([opened[0], opened[2]]).check_layers(())
    with pytest.raises(StoreError, match="their features differ"):
        MixedStore([opened[0], opened[2]]).check_layers(("layers.0",))
    mixed = MixedStore(opened[:2])
    mixed.check_layers(("layers.0",))
    signal = mixed.signal(mixed.take(np.array([7, 0]), layers=("layers.0",)), "cpu")
    assert signal.features is not None and signal.features["layers.0"].shape == (2, 4)


@pytest.mark.parametrize(
    "features",
    [
        {"layers": [], "width": 4, "bits": 8, "seed": 0},
        {"layers": "ab", "width": 4, "bits": 8, "seed": 0},
        {"layers": ["a"], "width": 0, "bits": 8, "seed": 0},
        {"layers": ["a"], "width": 4, "bits": 7, "seed": 0},
        {"layers": ["a"], "width": True, "bits": 8, "seed": 0},
        {"layers": ["a"], "width": 4, "bits": 8},
        {"layers": ["a"], "width": 4, "bits": 8, "seed": 0, "more": 1},
        {"layers": ["a"], "width": 1 << 40, "bits": 8, "seed": 0},
        ["a"],
        3,
    ],
)
def test_a_plan_with_other_features_is_refused(tmp_path: Path, features: Any) -> None:
    folder = Folder(str(tmp_path / "store"))
    plan = StorePlan.make(table_facts(), DenseCodec(), "teacher-1", CLASSES)
    folder.write_json("plan.json", {**plan.as_dict(), "features": features})
    with pytest.raises(StoreError, match=r"features that this version|not a valid plan"):
        StorePlan.load(folder)
