"""Verify names every kind of fault in a sentence; that no damage escapes it is tried in ``test_fuzz``."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from store_cases import LENGTH, VOCABULARY, lm_facts, make_data, make_store, table_facts
from typer.testing import CliRunner

from cluster.files import Folder
from distill_jobs import spec
from distill_jobs.cli_store import store as commands
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import record_name
from distill_jobs.errors import StoreError
from distill_jobs.models.build import build_model
from distill_jobs.models.files import save_model
from distill_jobs.store.check import check_signal
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.fields import STEP
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.sampled import SampledCodec
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.draws import uniforms
from distill_jobs.store.plan import StorePlan
from distill_jobs.store.verify import verify
from distill_jobs.store.writer import finish, start, write_part


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    make_data(Folder(str(root / "data")), lm_facts())
    make_store(Folder(str(root / "store")), lm_facts(), Folder(str(root / "data")), TopKCodec(6))
    return root


def copy_of(whole: Path, tmp_path: Path) -> tuple[Path, Folder, Folder]:
    shutil.copytree(whole, tmp_path / "w")
    return tmp_path / "w", Folder(str(tmp_path / "w" / "store")), Folder(str(tmp_path / "w" / "data"))


def rewrite(folder: Folder, data: Folder, batches: list[Any], targets: list[dict[str, torch.Tensor]]) -> None:
    """Write part 0 again with these contents, as right as a part can be by its checksums."""
    plan, shas = StorePlan.load(folder), TableReader(data / "train").facts["part_sha256"]
    (folder / "parts").remove(record_name(0))
    commits = start(folder, plan, shas)
    commits.add(write_part(folder, plan, 0, batches, targets, data_sha256=shas[0]))
    finish(folder, plan, commits)


def test_each_loss_of_a_file_is_named(whole: Path, tmp_path: Path) -> None:
    root, folder, data = copy_of(whole, tmp_path)
    assert verify(folder, data) == []
    for name, message in [
        ("parts/part-00001.json", "no commit record"),
        ("parts/manifest.json", "manifest.json is missing"),
        ("manifest.json", "not complete"),
        ("plan.json", "no logit store"),
    ]:
        kept = (root / "store" / name).read_bytes()
        (root / "store" / name).unlink()
        found = verify(folder, data)
        assert any(message in sentence for sentence in found), (name, found)
        (root / "store" / name).write_bytes(kept)
    part = next((root / "store" / "parts").glob("part-00000.*.arrow"))
    part.unlink()
    assert any("missing" in sentence for sentence in verify(folder, data))


def test_other_data_are_named(whole: Path, tmp_path: Path) -> None:
    root, folder, data = copy_of(whole, tmp_path)
    shutil.rmtree(root / "data")
    make_data(data, lm_facts(parts=3))
    assert "the same number of rows in every part" in verify(folder, data)[0]
    make_data(data, table_facts())
    (root / "data" / "manifest.json").write_text((root / "data" / "manifest.json").read_text().replace("data-1", "x"))
    assert "fingerprints differ" in verify(folder, data)[0]


TOPK, HYBRID, SAMPLED = TopKCodec(6), HybridCodec(6, 4), SampledCodec(8)


@pytest.mark.parametrize(
    ("codec", "field", "index", "value", "message"),
    [
        (TOPK, "logprob", 0, 1.0, "probabilities add up to"),
        (TOPK, "logprob", 3, float("nan"), "not finite"),
        (TOPK, "ids", 0, VOCABULARY, "holds class 50"),
        (TOPK, "ids", 0, "second", "stands twice"),
        (TOPK, "gold_rank", 0, VOCABULARY, "gold ranks reach"),
        (TOPK, "gold_rank", 0, 65535, "no gold rank"),
        (TOPK, "entropy", 0, 9 * STEP, "entropy"),
        (TOPK, "tail", 2, 30 * STEP, "those of any distribution"),
        (DenseCodec(), "gold_logprob", 0, 30 * STEP, "not the one that the head gives"),
        (HYBRID, "ids", 6, VOCABULARY, "holds class 50"),
        (HYBRID, "ids", 6, "of the head", "drawn that the head holds"),
        (HYBRID, "codes", 0, 200, "probabilities add up to"),
        (SAMPLED, "draw_counts", 0, 9, "add up to the 8"),
        (SAMPLED, "draw_ids", 0, "second", "in rising order"),
        (SAMPLED, "top1_id", 0, VOCABULARY, "holds class 50"),
    ],
)
def test_wrong_values_with_right_checksums(tmp_path: Path, codec, field, index, value, message) -> None:
    folder, data = Folder(str(tmp_path / "store")), Folder(str(tmp_path / "data"))
    make_data(data, lm_facts())
    make_store(folder, lm_facts(), data, codec)
    rewritten = []
    for number, batch in enumerate(TableReader(folder / "parts", error=StoreError).batches(0)):
        targets = {
            name: np.array(batch.column(f"t.{name}").flatten().to_numpy()).reshape(LENGTH, spec.width)
            for name, spec in codec.fields(VOCABULARY).items()
        }
        if number == 1:
            source = {"second": field, "of the head": "ids"}.get(value)
            targets[field][0, index] = targets[source][0, 1] if source else value
        rewritten.append({name: torch.from_numpy(values) for name, values in targets.items()})
    rewrite(folder, data, list(TableReader(data / "train").batches(0)), rewritten)
    found = verify(folder, data)
    assert any(message in sentence and "part 0" in sentence for sentence in found), found


def test_wrong_data_with_right_checksums(tmp_path: Path) -> None:
    folder, data, facts = Folder(str(tmp_path / "store")), Folder(str(tmp_path / "data")), table_facts()
    make_data(data, facts)
    make_store(folder, facts, data, DenseCodec())
    batch = next(iter(TableReader(data / "train").batches(0)))
    features = np.array(batch.column("features").flatten())
    features[4] = np.nan
    at = batch.schema.get_field_index("features")
    batch = batch.set_column(at, batch.schema.field(at), pa.FixedSizeListArray.from_arrays(pa.array(features), 3))
    rows, labels = batch.num_rows, torch.from_numpy(np.array(batch.column("label")))
    rewrite(folder, data, [batch], [DenseCodec().encode(torch.randn(rows, facts.targets), labels)])
    found = verify(folder, data)
    assert len(found) == 1 and "part 0" in found[0] and "not finite" in found[0]


def test_another_teacher_is_named(tmp_path: Path) -> None:
    folder, data, facts = Folder(str(tmp_path / "store")), Folder(str(tmp_path / "data")), table_facts()
    make_data(data, facts)
    make_store(folder, facts, data, DenseCodec())
    teacher = Folder(str(tmp_path / "teacher" / "model"))
    model = spec.Model.model_validate({"mlp": {"hidden": (2,)}})
    save_model(build_model(model, facts, seed=0), teacher, facts, data)
    assert verify(folder, data, teacher) == [f"the store was made by another teacher than the one in {teacher}"]
    told = CliRunner().invoke(commands, ["verify", str(folder)])
    assert told.exit_code == 1 and "another teacher" in told.output and "1 violations" in told.output


@pytest.mark.parametrize("codec", [TOPK, DenseCodec(), HYBRID, SAMPLED, HybridCodec(48, 16), HybridCodec(60, 2)])
def test_what_encoders_write_is_right(codec) -> None:
    """Peaked, flat and masked teachers, heads as wide as the vocabulary: nothing of it is called wrong."""
    gold = torch.arange(4 * VOCABULARY) % VOCABULARY
    chances = uniforms(3, torch.arange(len(gold)), 1)
    for scale in (0.0, 0.1, 3.0, 12.0, 60.0):
        logits = scale * torch.randn(len(gold), VOCABULARY, generator=torch.Generator().manual_seed(1))
        logits[::5, 7:] = -torch.inf
        columns = codec.encode(logits, gold, chances)
        codec.check(columns, VOCABULARY)
        assert list(check_signal(codec.decode(columns, VOCABULARY), gold)) == [], scale


def test_rows_twice_are_named(whole: Path, tmp_path: Path) -> None:
    _, folder, data = copy_of(whole, tmp_path)
    plan, table = StorePlan.load(folder), TableReader(data / "train")
    batches = list(table.batches(0))
    targets = [plan.make_codec().encode(torch.randn(LENGTH, VOCABULARY), torch.ones(LENGTH).long()) for _ in range(3)]
    rewrite(folder, data, [batches[0], batches[0], batches[2]], targets)
    found = verify(folder, data)
    assert any("a sample id twice" in sentence for sentence in found)
    assert any("rows of the data's part 0" in sentence for sentence in found)
