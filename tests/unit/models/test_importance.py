import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from model_cases import GPT2, LLAMA, LM, config
from torch import Tensor, nn

from cluster.files import Folder
from distill_jobs import spec
from distill_jobs.data.commits import Commits
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.table import commit_part, sample_id
from distill_jobs.errors import ModelError
from distill_jobs.models.build import build_model
from distill_jobs.models.files import save_model
from distill_jobs.models.importance import Importance, known_importance, measure
from distill_jobs.models.scorer import Scorer
from distill_jobs.models.width import prune

ROWS = 7


class Rows:
    """As many rows as a table would give: of documents, and padding at the end of some."""

    def __init__(self, ids_RL: np.ndarray, segments_RL: np.ndarray) -> None:
        self.columns = {"input_ids": ids_RL, "segments": segments_RL, "sample_id": np.arange(len(ids_RL))}
        self.rows = len(ids_RL)
        self.part_rows = np.array([4, 0, self.rows - 4])
        self.taken: list[int] = []

    def part_range(self, part: int) -> range:
        end = int(self.part_rows[: part + 1].sum())
        return range(end - int(self.part_rows[part]), end)

    def take(self, numbers: np.ndarray, columns: list[str]) -> dict[str, np.ndarray]:
        self.taken += numbers.tolist()
        return {name: self.columns[name][numbers] for name in columns}


def some_rows(rows: int = ROWS, length: int = 24) -> Any:
    rng = np.random.default_rng(0)
    lengths = rng.integers(length // 2, length + 1, rows)[:, None]
    segments = 1 + (np.arange(length) >= length // 3).astype(np.int64)
    return Rows(rng.integers(1, 40, (rows, length)), np.where(np.arange(length) < lengths, segments, 0))


def lively(values: dict[str, Any]) -> Scorer:
    scorer = build_model(config(values), LM, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in scorer.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return scorer


def reference(core: Any, ids_RL: Tensor, segments_RL: Tensor) -> dict[str, list[Any]]:
    """Llama by hand, one document at a time in float64; per row the mean over its tokens, over rows the L2 norm."""
    core = core.double()
    layers, width = core.model.layers, core.config.head_dim
    means: dict[str, list[list[Tensor]]] = {"norms": [], "neurons": [], "heads": [], "turned": []}
    for ids_L, segments_L in zip(ids_RL, segments_RL, strict=True):
        seen: dict[str, list[list[Tensor]]] = {name: [] for name in means}
        for number in range(1, int(segments_L.max()) + 1):
            x = core.model.embed_tokens(ids_L[segments_L == number])
            found: dict[str, list[Tensor]] = {name: [] for name in means}
            for layer in layers:
                came, attention = x, layer.self_attn
                h = layer.input_layernorm(x)
                found["norms"].append(h.abs())
                q, k, v = (p(h).view(len(h), -1, width) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
                q, k = turned(q), turned(k)
                heads = []
                for i in range(q.shape[1]):
                    shared = i // (q.shape[1] // k.shape[1])
                    weights = q[:, i] @ k[:, shared].T / math.sqrt(width)
                    hidden_later = torch.full_like(weights, -math.inf).triu(1)
                    heads.append((weights + hidden_later).softmax(dim=-1) @ v[:, shared])
                found["heads"].append(torch.stack([head.norm(dim=-1) for head in heads], dim=1))
                x = x + attention.o_proj(torch.cat(heads, dim=1))
                h = layer.post_attention_layernorm(x)
                found["norms"].append(h.abs())
                inner = nn.functional.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h)
                found["neurons"].append(inner.abs())
                x = x + layer.mlp.down_proj(inner)
                found["turned"].append(1 - nn.functional.cosine_similarity(came, x, dim=-1))
            found["norms"].append(core.model.norm(x).abs())
            for name, values in found.items():
                seen[name].append(values)
        for name, of_documents in seen.items():
            means[name].append([torch.cat(values).mean(dim=0) for values in zip(*of_documents, strict=True)])
    return {name: [torch.stack(values) for values in zip(*rows, strict=True)] for name, rows in means.items()}


def turned(x_LAD: Tensor) -> Tensor:
    half = x_LAD.shape[-1] // 2
    rate = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (torch.arange(len(x_LAD), dtype=torch.float64)[:, None] * rate)[:, None]
    first, second = x_LAD[..., :half], x_LAD[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def test_the_scores_are_those_of_a_reference_in_float64() -> None:
    scorer, rows = lively(LLAMA), some_rows()
    found = measure(scorer, rows, LM, rows=ROWS)
    with torch.no_grad():
        ids, segments = (torch.from_numpy(rows.columns[name]) for name in ("input_ids", "segments"))
        exact = reference(scorer.core, ids, segments)
    norms = [values.norm(dim=0) for values in exact["norms"]]
    hidden = [norms[2 * i] + norms[2 * i + 1] for i in range(4)] + [norms[-1]]
    expected = Importance(
        torch.stack(hidden),
        torch.stack([values.norm(dim=0) for values in exact["neurons"]]),
        torch.stack([values.norm(dim=0) for values in exact["heads"]]),
        torch.stack([values.mean() for values in exact["turned"]]),
    )
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(getattr(found, name).argsort(-1), value.argsort(-1)), name


@pytest.mark.parametrize("values", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_batches_padding_and_hooks_leave_no_trace(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, rows = lively(values), some_rows()
    whole = measure(scorer, rows, LM, rows=ROWS)
    rows.columns["input_ids"][rows.columns["segments"] == 0] = 3  # other padding
    monkeypatch.setattr("distill_jobs.models.importance._TOKENS_AT_ONCE", 48)
    apart = measure(scorer, rows, LM, rows=ROWS)
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(apart, name), value, rtol=1e-5, atol=1e-7)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in scorer.modules())


def test_rows_are_spread_over_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some_rows(9)
    measure(lively(GPT2), rows, LM, rows=3)
    assert rows.taken == [0, 4, 8]
    monkeypatch.setattr("distill_jobs.models.importance._PARTS", 1)
    rows.taken.clear()
    measure(lively(GPT2), rows, LM, rows=2)
    assert rows.taken == [0, 3]


def test_activations_that_are_not_finite_are_refused() -> None:
    scorer: Any = lively(LLAMA)
    with torch.no_grad():
        scorer.core.model.layers[2].mlp.up_proj.weight[3] = math.nan
    with pytest.raises(ModelError, match="activations are not finite"):
        measure(scorer, some_rows(), LM, rows=ROWS)


def write_data(folder: Folder, rows: Any) -> DataFacts:
    facts = DataFacts(**{**vars(LM), "splits": {"train": {"rows": ROWS, "tokens": 1, "parts": 1}}})
    commits = Commits.open(folder / "train", 1, "x")
    columns = {
        "sample_id": pa.array([sample_id(0, row) for row in range(ROWS)], pa.int64()),
        "source": pa.array([str(row) for row in range(ROWS)]),
    }
    for name in ("input_ids", "segments"):
        flat = pa.array(rows.columns[name].ravel(), pa.int32())
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, 24)
    whole = pa.RecordBatch.from_pydict(columns)
    commits.add(commit_part(folder / "train", 0, whole.schema, [whole.slice(i, 1) for i in range(ROWS)], inputs="x"))
    commits.manifest(rows_per_batch=1)
    facts.save(folder)
    return facts


def test_it_is_measured_once_and_kept(tmp_path: Path) -> None:
    root = Folder(str(tmp_path))
    data, teacher = root / "data", root / "teacher"
    facts, scorer = write_data(data, some_rows()), lively(LLAMA)
    save_model(scorer, teacher, facts, data)
    model = spec.Model.model_validate({"prune_teacher": {"intermediate_size": 20, "calibration_rows": 5}})
    student: Any = build_model(model, facts, seed=0, teacher=teacher, data=data)
    [name] = os.listdir(tmp_path / "teacher" / "importance")
    notes = tmp_path / "teacher" / "importance" / name
    found = measure(scorer, some_rows(), LM, rows=5)
    assert torch.equal(
        student.core.model.layers[1].mlp.up_proj.weight,
        prune(scorer.core, model.chosen, found).model.layers[1].mlp.up_proj.weight,  # type: ignore[union-attr, index]
    )
    # Whoever comes later prunes by what is kept, not by what its own machine would find.
    written = notes.read_text()
    other = known_importance(lively(LLAMA), "x", teacher / "importance", data, 5, "cpu")
    assert torch.equal(other.neurons, found.neurons)
    backwards = Importance(found.hidden, -found.neurons, found.heads, found.layers)
    (teacher / "importance").write_json(name, backwards.as_dict())
    again: Any = build_model(model, facts, seed=0, teacher=teacher, data=data)
    kept = student.core.model.layers[1].mlp.up_proj.weight, again.core.model.layers[1].mlp.up_proj.weight
    assert not torch.equal(*kept)
    notes.write_text(written[:100])  # damaged: measured anew
    again = build_model(model, facts, seed=0, teacher=teacher, data=data)
    assert notes.read_text() == written


def test_pruned_by_importance_it_reads_better_than_by_chance() -> None:
    text = Path(__file__).parents[3].joinpath("LICENSE").read_bytes()
    ids_L = torch.tensor([min(byte, 127) for byte in text])
    facts = DataFacts(**{**vars(LM), "sequence_length": 64, "vocabulary": 128})
    values = {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        teacher = build_model(config(values), facts, seed=0)
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(teacher.parameters(), lr=4e-3, fused=True)
        train, held = ids_L[:-2048], ids_L[-2048:].view(-1, 64)
        for _ in range(300):
            starts = torch.randint(0, len(train) - 64, (8,), generator=generator)
            loss = cross_entropy(teacher, torch.stack([train[s : s + 64] for s in starts.tolist()]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ids = train[: 32 * 64].view(-1, 64).numpy()
        rows: Any = Rows(ids, np.ones_like(ids))
        found = measure(teacher, rows, facts, rows=32)
        before = perplexity(teacher.core, held)
        assert before < 15, "the teacher has learnt nothing that pruning could lose"
        for sizes in ({"hidden_size": 32}, {"intermediate_size": 64}, {"attention_heads": 4}):
            wanted = spec.PrunedTeacher.model_validate(sizes)
            best = perplexity(prune(teacher.core, wanted, found), held)
            chance = [perplexity(prune(teacher.core, wanted, random(found, seed)), held) for seed in range(5)]
            print(f"{sizes}: {before:.2f} before, {best:.2f} by importance, by chance {sorted(chance)}")
            assert best < np.median(chance), (sizes, best, chance)
    finally:
        torch.set_num_threads(threads)


def cross_entropy(model: Scorer, ids_BL: Tensor) -> Any:
    logits = model(input_ids=ids_BL[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids_BL[:, 1:].flatten())


def perplexity(core: nn.Module, held: Tensor) -> float:
    with torch.no_grad():
        return math.exp(cross_entropy(Scorer(core, {"kind": "hf"}, "documents", "documents"), held))


def random(like: Importance, seed: int) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    return Importance(**{k: torch.rand(v.shape, generator=generator, dtype=v.dtype) for k, v in vars(like).items()})
