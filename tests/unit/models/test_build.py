import pytest
import torch
from model_cases import BERT, GPT2, IMAGE, LLAMA, LM, TABULAR, TEXT, VIT, config, factory

from distill_jobs import spec
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import DistillError, ModelError, VocabularyError
from distill_jobs.models import MODEL_LOADERS
from distill_jobs.models.build import build_model
from distill_jobs.models.scorer import sample_inputs

MLP = spec.Model.model_validate({"mlp": {"hidden": (7,), "dropout": 0.1}})
CNN = spec.Model.model_validate({"cnn": {"channels": (4, 6, 6, 6), "dropout": 0.1}})

CASES = [
    (MLP, TABULAR, [2, 2]),
    (MLP, IMAGE, [2, 3]),
    (CNN, IMAGE, [2, 3]),
    (config(LLAMA), LM, [2, 24, 40]),
    (config(GPT2), LM, [2, 24, 40]),
    (config(LLAMA, vocab_size=48), LM, [2, 24, 48]),
    (config(BERT), TEXT, [2, 2]),
    (config(GPT2), TEXT, [2, 2]),
    (config(VIT), IMAGE, [2, 3]),
    (factory("linear"), TABULAR, [2, 2]),
    (factory("honest_lm"), LM, [2, 24, 40]),
]


@pytest.mark.parametrize(("model", "facts", "shape"), CASES)
def test_logits_have_the_datas_shape_and_the_seed_fixes_the_weights(
    model: spec.Model, facts: DataFacts, shape: list[int]
) -> None:
    first, again, other = (build_model(model, facts, seed=seed) for seed in (3, 3, 4))
    inputs = sample_inputs(facts)
    with torch.no_grad():
        assert list(first(**inputs).shape) == shape
        assert first.outputs == shape[-1]
        assert torch.equal(first(**inputs), again(**inputs))
        assert not torch.equal(first(**inputs), other(**inputs))


def test_building_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model(MLP, TABULAR, seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("model", "facts", "kind", "message"),
    [
        (config(LLAMA, hiden_size=3), LM, ModelError, "did you mean hidden_size"),
        (config(LLAMA, model_type="lama"), LM, ModelError, "did you mean llama"),
        (config(LLAMA, vocab_size=30), LM, VocabularyError, "knows 30 tokens"),
        (config(LLAMA, max_position_embeddings=8), LM, ModelError, "at most 8 tokens"),
        (config(LLAMA, num_attention_heads=5), LM, ModelError, "can't build a llama model"),
        (config(BERT, num_labels=3), TEXT, VocabularyError, "tells 3 classes apart"),
        (config(LLAMA), TABULAR, ModelError, "use mlp"),
        (factory("linear", classes=4), TABULAR, VocabularyError, "tells 4 classes apart"),
        (factory("two_wide"), TABULAR, ModelError, "outputs"),
        (factory("no_module"), TABULAR, ModelError, "must return a torch.nn.Module"),
        (factory("breaks"), TABULAR, ModelError, "no such luck"),
        (factory("absent"), TABULAR, ModelError, "has no callable absent"),
        (factory("linear", feature_width=4), TABULAR, ModelError, "fails on a made-up batch"),
        (spec.Model(hf="/nowhere/to/be/found"), LM, ModelError, "can't load the Hugging Face model"),
        (spec.Model.model_validate({"factory": {"target": "no_such:f"}}), TABULAR, ModelError, "is not installed"),
        (spec.Model.model_validate({"init_from_teacher": {"layers": (0,)}}), LM, ModelError, "needs a teacher"),
    ],
)
def test_mistakes_get_one_sentence(model: spec.Model, facts: DataFacts, kind: type[DistillError], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        build_model(model, facts, seed=0)
    assert "\n" not in str(caught.value)


def test_inputs_take_the_models_precision() -> None:
    scorer = build_model(MLP, TABULAR, seed=0).to(torch.bfloat16)
    assert scorer(**sample_inputs(TABULAR)).dtype == torch.bfloat16


def test_every_kind_of_model_in_the_spec_has_a_loader() -> None:
    assert set(MODEL_LOADERS) == set(spec.Model.model_fields)
