from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import BERT, GPT2, LLAMA, LM, TEXT, config
from torch import Tensor

from cluster.files import Folder
from distill_jobs import spec
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import ModelError
from distill_jobs.models.build import build_model
from distill_jobs.models.files import load_model, save_model
from distill_jobs.models.importance import Importance
from distill_jobs.models.layers import cut_layers
from distill_jobs.models.scorer import Scorer, sample_inputs
from distill_jobs.models.width import prune

OWN = {"hidden_size": 32, "intermediate_size": 48, "attention_heads": 4, "layers": 4}
LIKE_LLAMA: list[dict[str, Any]] = [
    LLAMA,
    {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    {**LLAMA, "head_dim": 12},
    {**LLAMA, "model_type": "mistral"},
    {**LLAMA, "model_type": "qwen2"},
    {**LLAMA, "model_type": "qwen3", "head_dim": 8},
    {**LLAMA, "model_type": "granite", "logits_scaling": 3.0, "residual_multiplier": 0.5},
    {**LLAMA, "model_type": "smollm3"},
]


def teacher_of(values: dict[str, Any], facts: DataFacts = LM) -> Any:
    """A model none of whose parameters is a constant, so that a wrong one shows."""
    core: Any = build_model(config(values), facts, seed=1).core
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return core


def logits(core: Any, facts: DataFacts = LM) -> Tensor:
    with torch.no_grad():
        found: Tensor = Scorer(core, {"kind": "hf"}, facts.features, facts.packing).eval()(**sample_inputs(facts))
    return found


def scores(core: Any, seed: int = 0) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    like = Importance.unknown(core)
    return Importance(**{k: torch.rand(v.shape, generator=generator, dtype=v.dtype) for k, v in vars(like).items()})


def wanted(**sizes: Any) -> spec.PrunedTeacher:
    return spec.PrunedTeacher.model_validate(sizes)


@pytest.mark.parametrize(
    ("values", "facts"), [*((values, LM) for values in [*LIKE_LLAMA, GPT2]), (LLAMA, TEXT), (GPT2, TEXT)]
)
def test_pruned_to_its_own_sizes_it_is_the_teacher(values: dict[str, Any], facts: DataFacts) -> None:
    teacher = teacher_of(values, facts)
    sizes = {**OWN, "layers": teacher.config.num_hidden_layers}
    if values["model_type"] == "gpt2":
        sizes["intermediate_size"] = 128
    student = prune(teacher, wanted(**sizes), scores(teacher))
    assert torch.equal(logits(student, facts), logits(teacher, facts))
    assert student.get_input_embeddings().weight.data_ptr() != teacher.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("values", LIKE_LLAMA, ids=lambda values: values["model_type"])
def test_what_goes_is_as_if_its_output_were_cut(values: dict[str, Any]) -> None:
    teacher = teacher_of(values)
    found = scores(teacher)
    student = prune(teacher, wanted(intermediate_size=20, attention_heads=2, key_value_heads=1), found)
    head_dim = student.config.head_dim
    for i, layer in enumerate(teacher.model.layers):
        gone = found.neurons[i].argsort()[:28]
        # Two groups of two heads: the better group stays, with both of its heads.
        group = int(found.heads[i].view(2, 2).sum(dim=1).argmin())
        with torch.no_grad():
            layer.mlp.down_proj.weight[:, gone] = 0
            layer.self_attn.o_proj.weight[:, 2 * group * head_dim : 2 * (group + 1) * head_dim] = 0
    assert student.model.layers[0].self_attn.q_proj.weight.shape == (2 * head_dim, 32)
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-4, atol=1e-5)


def test_the_best_heads_of_each_group_stay() -> None:
    teacher = teacher_of({**LLAMA, "num_attention_heads": 8})
    found = scores(teacher)
    student = prune(teacher, wanted(attention_heads=4), found)
    kept = [int(place) for scores_4 in found.heads[3].view(2, 4) for place in sorted(scores_4.argsort()[-2:].tolist())]
    old, new = (core.model.layers[3].self_attn.q_proj.weight for core in (teacher, student))
    rows = [4 * place + i for place in (kept[0], kept[1], 4 + kept[2], 4 + kept[3]) for i in range(4)]
    assert torch.equal(new, old[rows]) and student.config.num_key_value_heads == 2


def test_gpt2_loses_heads_with_its_channels() -> None:
    teacher = teacher_of(GPT2)
    found = scores(teacher)
    student = prune(teacher, wanted(hidden_size=16, intermediate_size=40), found)
    assert (student.config.n_embd, student.config.n_head, student.config.n_inner) == (16, 2, 40)
    hidden = found.hidden.sum(dim=0).argsort()[-16:].sort().values
    heads = found.heads[1].argsort()[-2:].sort().values.tolist()
    old, new = (core.transformer.h[1].attn.c_attn for core in (teacher, student))
    columns = [32 * part + 8 * head + i for part in range(3) for head in heads for i in range(8)]
    assert torch.equal(new.weight, old.weight[hidden][:, columns]) and torch.equal(new.bias, old.bias[columns])
    assert logits(student).isfinite().all()


def test_the_same_channels_stay_everywhere_and_weights_tied_stay_tied() -> None:
    teacher = teacher_of({**LLAMA, "tie_word_embeddings": True})
    found = scores(teacher)
    student = prune(teacher, wanted(hidden_size=12), found)
    hidden = found.hidden.sum(dim=0).argsort()[-12:].sort().values
    assert student.lm_head.weight is student.model.embed_tokens.weight
    into = ("norm.weight", "o_proj.weight", "down_proj.weight", "layernorm.weight")
    for name, value in student.state_dict().items():
        old = teacher.state_dict()[name]
        assert torch.equal(value, old[hidden] if name.endswith(into) else old[:, hidden]), name


def test_depth_and_width_together(tmp_path: Path) -> None:
    teacher = teacher_of(LLAMA)
    found = replace(scores(teacher), layers=torch.tensor([0.3, 0.1, 0.4, 0.2]))
    student: Any = prune(teacher, wanted(layers=2, hidden_size=16, intermediate_size=8), found)
    kept = [0, 2]
    of_kept = Importance(found.hidden[[*kept, -1]], found.neurons[kept], found.heads[kept], found.layers[kept])
    expected = prune(cut_layers(teacher, kept), wanted(hidden_size=16, intermediate_size=8), of_kept)
    assert torch.equal(logits(student), logits(expected))
    chosen = prune(teacher, wanted(layers=(2, 0), hidden_size=16), found)
    assert chosen.config.num_hidden_layers == 2
    # Its heads are wider than its channels divided among them, and it comes back so.
    folder = Folder(str(tmp_path / "model"))
    scorer = Scorer(student, {"kind": "hf"}, LM.features, LM.packing)
    save_model(scorer, folder, LM, Folder(str(tmp_path)))
    assert torch.equal(logits(load_model(folder).core), logits(student))


@pytest.mark.parametrize(
    ("values", "sizes", "said"),
    [
        (LLAMA, {"hidden_size": 33}, "prune_teacher.hidden_size 33 is more than the teacher's 32"),
        (LLAMA, {"layers": 5}, "prune_teacher.layers 5 is more than the teacher's 4"),
        (LLAMA, {"layers": (0, 4)}, "there is no layer 4"),
        (LLAMA, {"key_value_heads": 3}, "key_value_heads 3 is more than the teacher's 2"),
        (LLAMA, {"attention_heads": 3}, "can't share 2 key-value heads among 3 attention heads"),
        (LLAMA, {"attention_heads": 4, "key_value_heads": 1}, "by 2 at most, as in the teacher"),
        (LLAMA, {"hidden_size": 30}, "won't have: .*not a multiple of the number of attention heads"),
        (GPT2, {"attention_heads": 2}, "8 channels for each head"),
        (GPT2, {"hidden_size": 20}, "don't fit: in a gpt2 model they go together"),
        (BERT, {"hidden_size": 16}, "can't narrow a bert model, only llama, mistral"),
    ],
)
def test_sizes_that_can_not_be_get_one_sentence(values: dict[str, Any], sizes: dict[str, Any], said: str) -> None:
    facts = TEXT if values is BERT else LM
    teacher = build_model(config(values), facts, seed=1).core
    with pytest.raises(ModelError, match=said) as caught:
        prune(teacher, wanted(**sizes), scores(teacher))
    assert "\n" not in str(caught.value)


def test_a_parameter_that_is_not_known_is_refused() -> None:
    teacher: Any = build_model(config(LLAMA), LM, seed=1).core
    teacher.model.layers[1].extra = torch.nn.Parameter(torch.zeros(32))
    with pytest.raises(ModelError, match=r"not known how model\.layers\.1\.extra narrows"):
        prune(teacher, wanted(hidden_size=16), scores(teacher))
