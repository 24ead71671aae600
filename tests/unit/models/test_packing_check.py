import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import GPT2, LLAMA, LM, NAIVE, config, factory

from distill_jobs import spec
from distill_jobs.errors import ModelError
from distill_jobs.models.build import build_model
from distill_jobs.models.packing import check_packing
from distill_jobs.models.scorer import document_mask, document_positions

QWEN2_SLIDING = {**LLAMA, "model_type": "mistral", "sliding_window": 4}


@pytest.mark.parametrize("model", [config(LLAMA), config(GPT2), config(QWEN2_SLIDING), factory("honest_lm")])
def test_models_that_keep_documents_apart_pass(model: spec.Model) -> None:
    check_packing(build_model(model, LM, seed=0), LM)


def test_a_model_that_ignores_the_mask_is_refused_unless_packing_is_naive() -> None:
    with pytest.raises(ModelError, match="does not keep packed documents apart"):
        check_packing(build_model(factory("leaky_lm"), LM, seed=0), LM)
    check_packing(build_model(factory("leaky_lm"), NAIVE, seed=0), NAIVE)


def test_a_model_that_looks_ahead_is_refused() -> None:
    for facts in (LM, NAIVE):
        with pytest.raises(ModelError, match="depend on later tokens"):
            check_packing(build_model(factory("far_sighted_lm"), facts, seed=0), facts)


def test_naive_packing_lets_documents_see_each_other() -> None:
    segments = torch.tensor([[1] * 6 + [2] * 6])
    ids = torch.arange(12)[None]
    apart, naive = (build_model(config(LLAMA), facts, seed=0) for facts in (LM, NAIVE))
    with torch.no_grad():
        assert torch.equal(apart(input_ids=ids, segments=segments)[:, :6], naive(input_ids=ids)[:, :6])
        assert not torch.allclose(apart(input_ids=ids, segments=segments)[:, 6:], naive(input_ids=ids)[:, 6:])


@given(st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_positions_and_mask_against_a_plain_loop(rows: list[list[int]]) -> None:
    length = max(1, max(map(sum, rows)))
    segments = torch.zeros(len(rows), length, dtype=torch.long)
    for b, documents in enumerate(rows):
        at = 0
        for number, size in enumerate(documents, 1):
            segments[b, at : at + size] = number
            at += size
    mask, positions = document_mask(segments), document_positions(segments)
    assert mask.diagonal(dim1=2, dim2=3).all()
    for b in range(len(rows)):
        real = [i for i in range(length) if segments[b, i]]
        for i in real:
            seen = [j for j in range(length) if j <= i and segments[b, j] == segments[b, i]]
            assert mask[b, 0, i].nonzero().flatten().tolist() == seen
            assert positions[b, i] == len(seen) - 1
