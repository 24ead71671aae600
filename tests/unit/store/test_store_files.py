"""Plan, writer and reader: what is written comes back, and what doesn't fit is refused in one sentence."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from store_cases import CLASSES, LENGTH, VOCABULARY, lm_facts, make_data, make_store, table_facts

from cluster.files import Folder
from distill_jobs.data.batch import make_batch
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.errors import StoreError, VocabularyError
from distill_jobs.losses import distillation_loss
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.plan import StorePlan, check_student, check_teacher, workdir_of
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.store.verify import verify
from distill_jobs.store.writer import finish, start, write_part

CASES = [
    pytest.param(lm_facts(), TopKCodec(6), id="lm topk"),
    pytest.param(lm_facts(), DenseCodec(), id="lm dense"),
    pytest.param(table_facts(), DenseCodec(), id="tabular dense"),
    pytest.param(table_facts(parts=3, rows=6000), TopKCodec(2), id="tabular topk"),
    pytest.param(table_facts("image"), DenseCodec(), id="image dense"),
]


def same(one: TeacherSignal, other: TeacherSignal) -> bool:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize(("facts", "codec"), CASES)
def test_what_is_written_comes_back(tmp_path: Path, facts: DataFacts, codec) -> None:
    folder, data = Folder(str(tmp_path / "store")), Folder(str(tmp_path / "data"))
    make_data(data, facts)
    logits = torch.cat(list(make_store(folder, facts, data, codec).values()))
    store = LogitStore.open(folder, data)
    assert store.rows == facts.splits["train"]["rows"] and store.facts == facts
    order = np.random.default_rng(0).permutation(store.rows)[:50]
    columns = store.take(order)
    source = TableReader(data / "train").take(order)
    for name, values in source.items():
        np.testing.assert_array_equal(columns[name], values)
    batch = make_batch(columns, store.facts)
    signal = store.signal(columns, "cpu", batch.keep)
    rows = logits.reshape(store.rows, facts.positions_per_row, -1)[torch.from_numpy(order)][batch.keep]
    labels = batch.labels.reshape(len(order), -1)[batch.keep]
    assert same(signal, codec.decode(codec.encode(rows, labels), facts.targets))
    assert torch.isfinite(distillation_loss(rows, labels, signal, 0.5, 2.0).total)
    everything = store.signal(columns, "cpu")
    assert len(everything) == len(order) * facts.positions_per_row
    assert not any(name.startswith("t.") for name in store.take(order, soft=False))
    assert verify(folder, data) == []


def test_the_store_stands_alone_but_for_pixels(tmp_path: Path) -> None:
    folder, data = Folder(str(tmp_path / "store")), Folder(str(tmp_path / "data"))
    make_data(data, table_facts("image"))
    make_store(folder, table_facts("image"), data, DenseCodec())
    with pytest.raises(StoreError, match="pixels stay in data"):
        LogitStore.open(folder)
    dataclasses.replace(table_facts("image"), fingerprint="data-2").save(data)
    with pytest.raises(StoreError, match="fingerprint differs"):
        LogitStore.open(folder, data)


def test_parts_are_kept_on_resume_and_a_new_plan_starts_again(tmp_path: Path) -> None:
    folder, data, facts = Folder(str(tmp_path / "store")), Folder(str(tmp_path / "data")), lm_facts()
    make_data(data, facts)
    plan = StorePlan.make(facts, TopKCodec(4), "teacher-1", VOCABULARY)
    assert start(folder, plan).missing().tolist() == [0, 1]
    table = TableReader(data / "train")
    batches = list(table.batches(0))
    gold = make_batch(table.take(np.arange(3)), facts).labels.reshape(3, LENGTH)
    targets = [plan.make_codec().encode(torch.randn(LENGTH, VOCABULARY), labels) for labels in gold]
    record = write_part(folder, plan, 0, batches, targets)
    commits = start(folder, plan)
    assert commits.missing().tolist() == [1] and record.tokens == 18
    with pytest.raises(StoreError, match=r"1 of 2 parts .* missing \(1\)"):
        finish(folder, plan, commits)
    with pytest.raises(StoreError, match="not complete"):
        LogitStore.open(folder)
    commits.add(write_part(folder, plan, 1, [], []))
    assert finish(folder, plan, commits)["rows"] == 3
    assert LogitStore.open(folder).rows == 3
    assert verify(folder) == ["the plan is of data with 6 rows, but 3 are in the store or in the quarantine"]
    assert len(start(folder, dataclasses.replace(plan, teacher="teacher-2"))) == 0
    assert not folder.exists("manifest.json")


def test_targets_that_do_not_fit_leave_no_part(tmp_path: Path) -> None:
    folder, data, facts = Folder(str(tmp_path / "store")), Folder(str(tmp_path / "data")), lm_facts()
    make_data(data, facts)
    plan = StorePlan.make(facts, TopKCodec(4), "teacher-1", VOCABULARY)
    batches = list(TableReader(data / "train").batches(0))
    short = plan.make_codec().encode(torch.randn(2, VOCABULARY), torch.zeros(2).long())
    with pytest.raises(StoreError, match=r"take uint16 \[8, 4\]"):
        write_part(folder, plan, 0, batches, [short] * 3)
    with pytest.raises(StoreError, match="not as many soft targets"):
        write_part(folder, plan, 0, batches, [])
    assert (folder / "parts").names() == []


def test_contracts() -> None:
    facts = lm_facts()
    plan = StorePlan.make(facts, TopKCodec(4), "teacher-1", VOCABULARY + 14)
    check_student(plan, VOCABULARY + 2, "tok-1")
    check_teacher(plan, "teacher-1", facts)
    with pytest.raises(VocabularyError, match="49 logits"):
        check_student(plan, VOCABULARY - 1, "tok-1")
    with pytest.raises(VocabularyError, match="tokenizer"):
        check_student(plan, VOCABULARY, "tok-2")
    with pytest.raises(StoreError, match="another teacher"):
        check_teacher(plan, "teacher-2", facts)
    with pytest.raises(StoreError, match="other data"):
        check_teacher(plan, "teacher-1", dataclasses.replace(facts, fingerprint="data-2"))
    with pytest.raises(VocabularyError, match="the teacher gives 49"):
        StorePlan.make(facts, TopKCodec(4), "teacher-1", VOCABULARY - 1)


def test_the_workdir_of_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert workdir_of(Folder("store")) == workdir_of(Folder(f"{tmp_path}/store/")) == Folder(str(tmp_path))
    assert workdir_of(Folder("s3://bucket/run/store")) == Folder("s3://bucket/run")


def test_plans_that_are_refused(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    with pytest.raises(StoreError, match="no logit store"):
        StorePlan.load(folder)
    plan = StorePlan.make(table_facts(), DenseCodec(), "teacher-1", CLASSES)
    plan.save(folder)
    assert StorePlan.load(folder) == plan
    good = folder.read_json("plan.json")
    for change, message in [
        ({"schema_version": 1}, "reads 3: capture again"),
        ({"schema_version": 2}, "reads 3: capture again"),
        ({"schema_version": 4}, "reads 3: upgrade distill-jobs"),
        ({"schema_version": "3"}, "not a valid plan"),
        ({"seed": -1}, "not a valid plan"),
        ({"codec": {"name": "zip"}}, "does not know"),
        ({"vocabulary": {"real": 9, "padded": 9}}, "not a valid plan"),
        ({"positions_per_row": 1 << 33}, "not a valid plan"),
        ({"surprise": 1}, "not a valid plan"),
        ({"facts": []}, "not a valid plan"),
    ]:
        folder.write_json("plan.json", good | change)
        with pytest.raises(StoreError, match=message):
            StorePlan.load(folder)


def test_batches_are_cut_anew_and_never_held_whole(tmp_path: Path) -> None:
    facts, rows = table_facts("tabular", 1, 5000), 5000
    data, size = Folder(str(tmp_path / "data")), facts.rows_per_batch
    make_data(data, facts)
    table = TableReader(data / "train")
    plan = StorePlan.make(facts, DenseCodec(), "teacher", facts.targets)
    whole = pa.Table.from_batches(table.batches(0)).combine_chunks().to_batches()[0]
    encoded = plan.make_codec().encode(torch.randn(rows, facts.targets), torch.zeros(rows).long())
    shas = []
    for number, cuts in enumerate(([size] * 5, [1, 7, 2000, 0, 3, 1500, 2000], [rows])):
        folder, asked = Folder(str(tmp_path / f"store-{number}")), [0, 0]
        starts = np.minimum(np.cumsum([0, *cuts]), rows).tolist()

        def pieces(way: int, take: Callable, asked=asked, starts=starts) -> Iterator:
            for first, last in itertools.pairwise(starts):
                asked[way] += 1
                assert abs(asked[0] - asked[1]) <= 1, "read ahead of what is encoded"
                yield take(first, last)

        start(folder, plan, table.facts["part_sha256"])
        record = write_part(
            folder,
            plan,
            0,
            pieces(0, lambda first, last: whole.slice(first, last - first)),
            pieces(1, lambda first, last: {name: values[first:last] for name, values in encoded.items()}),
            data_sha256=table.facts["part_sha256"][0],
        )
        assert record.rows == record.tokens == rows
        shas.append(record.sha256)
    assert len(set(shas)) == 1, "the same bytes, however the rows came"
