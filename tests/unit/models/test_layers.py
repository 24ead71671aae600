import pytest
import torch
from model_cases import BERT, GPT2, LLAMA, LM, TEXT, config

from distill_jobs import spec
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import ModelError
from distill_jobs.models.build import build_model
from distill_jobs.models.layers import cut_layers
from distill_jobs.models.scorer import Scorer, sample_inputs

QWEN3 = {
    **LLAMA,
    "model_type": "qwen3",
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "sliding_window": 3,
    "use_sliding_window": True,
    "head_dim": 8,
}
CASES = [
    (config(LLAMA), LM, "model.layers"),
    (config(LLAMA, tie_word_embeddings=True), LM, "model.layers"),
    (config(GPT2), LM, "transformer.h"),
    (config(QWEN3), LM, "model.layers"),
    (config(BERT), TEXT, "bert.encoder.layer"),
]


@pytest.mark.parametrize(("model", "facts", "stack"), CASES)
def test_the_cut_model_is_the_teacher_without_the_other_layers(model: spec.Model, facts: DataFacts, stack: str) -> None:
    teacher = build_model(model, facts, seed=1)
    inputs = sample_inputs(facts)
    student = cut_layers(teacher.core, [2, 0])
    scorer = Scorer(student, {"kind": "hf"}, facts.features, facts.packing).eval()
    assert student.config.num_hidden_layers == 2
    with torch.no_grad():
        found = scorer(**inputs)
        # The reference: the same layers put by hand into the teacher itself.
        layers = teacher.core.get_submodule(stack)
        keep = [layers[2], layers[0]]
        del layers[2:]
        layers[0], layers[1] = keep
        config_of = teacher.core.config
        config_of.num_hidden_layers = 2
        if getattr(config_of, "layer_types", None):
            config_of.layer_types = [config_of.layer_types[2], config_of.layer_types[0]]
        expected = teacher(**inputs)
    assert torch.equal(found, expected)


def test_all_layers_in_order_give_the_teacher_itself() -> None:
    teacher = build_model(config(LLAMA), LM, seed=1)
    same = Scorer(cut_layers(teacher.core, [0, 1, 2, 3]), {"kind": "hf"}, "documents", "documents").eval()
    with torch.no_grad():
        assert torch.equal(same(**sample_inputs(LM)), teacher(**sample_inputs(LM)))


def test_tied_weights_stay_tied_and_copies_are_the_students_own() -> None:
    teacher = build_model(config(LLAMA, tie_word_embeddings=True), LM, seed=1).core
    student = cut_layers(teacher, [1])
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert student.lm_head.weight.data_ptr() != teacher.lm_head.weight.data_ptr()


def test_layer_kinds_follow_their_layers() -> None:
    student = cut_layers(build_model(config(QWEN3), LM, seed=1).core, [3, 1])
    assert student.config.layer_types == ["sliding_attention", "sliding_attention"]


def test_a_layer_that_is_not_there_is_named() -> None:
    teacher = build_model(config(LLAMA), LM, seed=1).core
    with pytest.raises(ModelError, match="the teacher has 4 layers, numbered 0 to 3; there is no layer 4"):
        cut_layers(teacher, [0, 4])


def test_a_layer_whose_nature_hangs_on_its_place_is_refused() -> None:
    values = {
        **LLAMA,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    }
    teacher = build_model(config(values), LM, seed=1).core
    assert cut_layers(teacher, [0, 2]).config.num_hidden_layers == 2
    with pytest.raises(ModelError, match="layers can't be exchanged"):
        cut_layers(teacher, [2, 3])


def test_a_layer_that_would_behave_otherwise_in_its_place_is_refused() -> None:
    teacher = build_model(config(LLAMA), LM, seed=1).core
    teacher.model.layers[3].self_attn.scaling = 0.5
    with pytest.raises(ModelError, match=r"layer 3 would behave otherwise as the student's layer 0 \(self_attn"):
        cut_layers(teacher, [3])
