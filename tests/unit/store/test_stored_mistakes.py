"""The teacher's confident mistakes counted in real stores, against its own logits in float64."""

from pathlib import Path

import pytest
import torch
from store_cases import lm_facts, make_data, make_store, table_facts

from cluster.files import Folder
from distill_jobs.audit.stored_mistakes import NEGATIVE, stored_mistakes
from distill_jobs.data.batch import make_batch
from distill_jobs.data.reader import TableReader
from distill_jobs.spec.audit import Audit
from distill_jobs.store.codecs import CODECS
from distill_jobs.store.verify import verify

ALL_CODECS = {
    "dense": {},
    "topk": {"k": 4},
    "sampled": {"draws": 8},
    "hybrid": {"head": 3, "draws": 4},
}


def truth(data: Folder, facts: object, logits: dict[int, torch.Tensor], spec: Audit) -> tuple[int, int, int]:
    """Scored positions, mistakes and confident ones, by brute force."""
    table = TableReader(data / "train")
    said = torch.log_softmax(torch.cat([logits[part] for part in sorted(logits)]).double(), dim=-1)
    labels = make_batch(table.take(range(table.rows)), facts).labels.flatten()  # type: ignore[arg-type]
    keep = labels >= 0
    said, labels = said[keep], labels[keep]
    wrong = said.argmax(-1) != labels
    if getattr(facts, "task", "") == "causal_lm":
        entropy = -(said.exp() * said).sum(-1)
        sure = (entropy <= spec.low_entropy) & (said.gather(1, labels[:, None])[:, 0].exp() <= spec.tiny_gold)
    else:
        sure = said.max(-1).values.exp() >= spec.confident
    return int(keep.sum()), int(wrong.sum()), int((wrong & sure).sum())


@pytest.mark.parametrize("codec", sorted(ALL_CODECS))
@pytest.mark.parametrize("task", ["causal_lm", "classification"])
def test_counts_are_the_teachers(tmp_path: Path, task: str, codec: str) -> None:
    facts = lm_facts(rows=20) if task == "causal_lm" else table_facts(rows=60)
    data, store = Folder(str(tmp_path / "data")), Folder(str(tmp_path / "store"))
    make_data(data, facts)
    logits = make_store(store, facts, data, CODECS[codec](**ALL_CODECS[codec]))
    spec = Audit(confident=0.8, low_entropy=1.2, tiny_gold=0.02)
    found = stored_mistakes(store, data, spec)
    assert (found["positions"], found["wrong"], found["mistakes"]) == truth(data, facts, logits, spec)
    assert 0 < found["mistakes"] < found["wrong"] and found["rate"] == found["mistakes"] / found["positions"]
    assert store.read_json(NEGATIVE) == found and verify(store, data) == []
    if task == "causal_lm":
        [group] = found["slices"]["style"].values()
        assert group["small"] and group["mistakes"] == found["mistakes"]


def test_known_counts_are_kept_and_other_thresholds_counted_anew(tmp_path: Path) -> None:
    facts = table_facts(rows=40)
    data, store = Folder(str(tmp_path / "data")), Folder(str(tmp_path / "store"))
    make_data(data, facts)
    make_store(store, facts, data, CODECS["dense"]())
    first = stored_mistakes(store, data, Audit(confident=0.6))
    store.write_json(NEGATIVE, {**first, "mistakes": -1})
    assert stored_mistakes(store, data, Audit(confident=0.6))["mistakes"] == -1
    assert stored_mistakes(store, data, Audit(confident=0.99))["mistakes"] < first["mistakes"]
    store.write(NEGATIVE, b"{")
    assert stored_mistakes(store, data, Audit(confident=0.6)) == first
