"""Rows that would break a model or poison a device are told by the rows alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import BERT, GPT2, IMAGE, LLAMA, LM, NAIVE, TABULAR, TEXT, config, factory

from distill_jobs.data.batch import make_batch
from distill_jobs.data.facts import DataFacts
from distill_jobs.models.build import build_model
from distill_jobs.models.unscorable import longest_row, unscorable
from distill_jobs.spec import Model

Columns = dict[str, np.ndarray]


def documents(rows: int = 4, length: int = 24) -> Columns:
    rng = np.random.default_rng(0)
    segments = np.ones((rows, length), dtype=np.int64)
    segments[:, length // 2 :] = 2
    ids = rng.integers(0, 40, (rows, length)).astype(np.int32)
    return {"sample_id": np.arange(rows), "input_ids": ids, "segments": segments}


def test_ids_without_an_embedding() -> None:
    scorer, columns = build_model(config(LLAMA), LM, seed=0), documents()
    assert unscorable(columns, scorer, LM) == {}
    columns["input_ids"][1, 3], columns["input_ids"][3, 0], columns["input_ids"][3, 5] = 40, -1, 99
    assert unscorable(columns, scorer, LM) == {
        1: "token id 40 is not one of the 40 that there are",
        3: "token id -1 is not one of the 40 that there are",
    }
    with pytest.raises(IndexError):
        scorer(**make_batch(columns, LM).inputs)
    kept = {name: np.delete(value, [1, 3], axis=0) for name, value in columns.items()}
    assert scorer(**make_batch(kept, LM).inputs).isfinite().all()


def test_ids_that_only_a_padded_vocabulary_has() -> None:
    scorer, columns = build_model(config(LLAMA, vocab_size=64), LM, seed=0), documents()
    columns["input_ids"][2, 1] = 50
    assert list(unscorable(columns, scorer, LM)) == [2]
    assert list(unscorable(columns, build_model(factory("leaky_lm"), LM, seed=0), LM)) == [2]


@pytest.mark.parametrize(("facts", "wrong"), [(LM, {2: 13, 3: 20}), (NAIVE, {0: 24, 1: 24, 2: 15, 3: 20})])
def test_documents_longer_than_the_model_takes(facts: DataFacts, wrong: dict[int, int]) -> None:
    short = replace(facts, sequence_length=12)
    scorer, columns = build_model(config(GPT2, n_positions=12), short, seed=0), documents()
    columns["segments"][2] = [1] * 13 + [2] * 2 + [0] * 9
    columns["segments"][3] = [1] * 20 + [0] * 4
    said = "it has {} tokens in a row, and the model takes at most 12"
    assert unscorable(columns, scorer, facts) == {row: said.format(length) for row, length in wrong.items()}


def test_texts_longer_than_the_model_takes() -> None:
    roberta: dict[str, Any] = {**BERT, "model_type": "roberta", "max_position_embeddings": 14}
    scorer = build_model(config(roberta), TEXT, seed=0)
    # Positions begin at 1 behind the padding's id 0.
    assert longest_row(scorer.core) == 13
    longer = replace(TEXT, sequence_length=20)
    columns = {
        "sample_id": np.arange(3),
        "input_ids": np.full((3, 20), 5),
        "tokens": np.array([13, 14, 2]),
        "label": np.array([0, 1, 1]),
    }
    assert unscorable(columns, scorer, longer) == {1: "it has 14 tokens in a row, and the model takes at most 13"}
    with pytest.raises((IndexError, RuntimeError)):
        scorer(input_ids=torch.full((1, 14), 5), attention_mask=torch.ones(1, 14, dtype=torch.long))
    assert scorer(input_ids=torch.full((1, 13), 5)).isfinite().all()
    assert longest_row(torch.nn.Linear(1, 1)) is None


@pytest.mark.parametrize("facts", [TABULAR, IMAGE])
def test_numbers_that_are_not_finite(facts: DataFacts) -> None:
    name = "features" if facts.features == "tabular" else "pixels"
    model: Any = {"mlp": {"hidden": (4,)}} if name == "features" else {"cnn": {"channels": (4,)}}
    scorer = build_model(Model.model_validate(model), facts, seed=0)
    width = facts.feature_width or 0
    columns = {
        "sample_id": np.arange(3),
        name: np.zeros((3, width), dtype=np.float32),
        "label": np.array([0, 1, len(facts.classes)]),
    }
    columns[name][0, 4] = np.nan
    columns[name][1, 2] = -np.inf
    assert unscorable(columns, scorer, facts) == {
        0: f"{name} hold nan at place 4; numbers must be finite",
        1: f"{name} hold -inf at place 2; numbers must be finite",
        2: f"label {len(facts.classes)} is not one of the {len(facts.classes)} that there are",
    }
    columns[name][:] = 1
    columns["label"] = np.array([0, -100, 1])
    assert unscorable(columns, scorer, facts) == {}
