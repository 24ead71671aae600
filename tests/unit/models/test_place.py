"""A model where it will score: in the precision asked for, loaded straight in it, under autocast, compiled."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import GPT2, LLAMA, LM, TABULAR, VIT, config

from cluster.files import Folder
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import ModelError
from distill_jobs.models.build import build_model
from distill_jobs.models.files import load_model, save_model
from distill_jobs.models.head import split_head
from distill_jobs.models.place import load_placed, place, weights_dtype
from distill_jobs.models.scorer import sample_inputs
from distill_jobs.spec import Model

GEMMA: dict[str, Any] = {**LLAMA, "model_type": "gemma2", "head_dim": 8, "num_hidden_layers": 2}
MLP = Model.model_validate({"mlp": {"hidden": (8,)}})


def test_rotary_frequencies_are_not_rounded() -> None:
    scorer = build_model(config(LLAMA), LM, seed=0)
    exact = {name: value.clone() for name, value in scorer.named_buffers()}
    place(scorer, "cpu", "bf16")
    assert exact and all(torch.equal(value, exact[name]) for name, value in scorer.named_buffers())
    assert all(parameter.dtype == torch.bfloat16 for parameter in scorer.parameters())


@pytest.mark.parametrize(
    ("model", "facts"), [(config(LLAMA), LM), (config(GPT2), LM), (config(GEMMA), LM), (MLP, TABULAR)]
)
def test_loading_in_a_precision_is_loading_and_then_converting(model: Model, facts: DataFacts, tmp_path: Path) -> None:
    folder, inputs = Folder(str(tmp_path / "model")), sample_inputs(facts)
    save_model(build_model(model, facts, seed=1), folder, facts, Folder(str(tmp_path / "no data")))
    converted, direct = place(load_model(folder), "cpu", "bf16"), load_placed(folder, "cpu", "bf16")
    there = dict(converted.named_parameters())
    for name, value in direct.named_parameters():
        assert value.dtype == there[name].dtype and torch.equal(value, there[name]), name
    assert torch.equal(converted(**inputs), direct(**inputs))
    assert load_model(folder).training is False


def test_weights_are_read_in_the_precision_asked_for(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "model"))
    save_model(build_model(config(LLAMA), LM, seed=1), folder, LM, Folder(str(tmp_path / "no data")))
    half = load_model(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.float32}
    assert weights_dtype("cpu", "bf16") == torch.bfloat16
    assert weights_dtype("cpu", "bf16", autocast=True) == torch.float32


def test_what_is_held_in_fp32_stays_so_when_it_was_loaded_so() -> None:
    scorer = build_model(config(LLAMA), LM, seed=1).to(torch.bfloat16)
    core: Any = scorer.core
    core.model.norm.float()
    place(scorer, "cpu", "bf16")
    assert core.model.norm.weight.dtype == torch.float32 and core.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("model", "facts"), [(config(LLAMA), LM), (config(GEMMA), LM), (MLP, TABULAR)])
def test_autocast_keeps_the_weights_and_rounds_the_products(model: Model, facts: DataFacts) -> None:
    exact, inputs = build_model(model, facts, seed=2), sample_inputs(facts)
    half = place(copy.deepcopy(exact), "cpu", "bf16")
    cast = place(copy.deepcopy(exact), "cpu", "bf16", autocast=True)
    assert {p.dtype for p in cast.parameters()} == {torch.float32}
    with torch.no_grad():
        truth, rounded, found = exact(**inputs), half(**inputs).float(), cast(**inputs)
        assert found.dtype == torch.bfloat16
        spread = truth.std()
        assert 0 < (found.float() - truth).abs().max() < 0.05 * spread
        if facts.features == "documents":
            # Not what weights in bf16 give: sums between the products are exact.
            assert not torch.equal(found.float(), rounded)
        split = split_head(cast, facts)
        if split is not None:
            ours = split.logits(split.hidden(inputs).flatten(0, 1))
            assert ours.dtype == torch.bfloat16
            assert (ours - found.flatten(0, 1)).abs().max() <= 0.02 * spread
    assert place(cast, "cpu", "fp32", autocast=True).autocast is None


def test_all_but_the_output_head_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: asked.append((type(self).__name__, how)))
    place(build_model(config(LLAMA), LM, seed=0), "cpu", "fp32", compile=True)
    place(build_model(MLP, TABULAR, seed=0), "cpu", "fp32", compile=True)
    assert asked == [("LlamaModel", {"dynamic": True}), ("Mlp", {"dynamic": True})]


@pytest.mark.slow
@pytest.mark.parametrize("model", [config(LLAMA, num_hidden_layers=1), config(GPT2, n_layer=1)])
def test_a_compiled_model_gives_the_same_for_batches_of_any_size(model: Model) -> None:
    scorer = build_model(model, LM, seed=0)
    sizes = [(2, 24), (3, 20), (4, 9), (6, 5), (2, 7), (5, 23), (3, 3), (7, 4), (8, 11), (9, 2)]
    batches = [sample_inputs(LM, rows, length) for rows, length in sizes]
    batches[2]["segments"][:, 5:] = 2
    graphs: list[int] = []
    with torch.inference_mode():
        expected = [scorer(**inputs) for inputs in batches]
        place(scorer, "cpu", "fp32", compile=True)
        for inputs, logits in zip(batches, expected, strict=True):
            torch.testing.assert_close(scorer(**inputs), logits)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # The sizes are symbols: nothing is compiled anew after the first few batches.
    assert graphs[-1] == graphs[3] > 0
    split = split_head(scorer, LM, batches[0])
    assert split is not None
    with torch.inference_mode():
        torch.testing.assert_close(split.logits(split.hidden(batches[1]).flatten(0, 1)), expected[1].flatten(0, 1))


def test_a_machine_that_cannot_compile_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    scorer = place(build_model(MLP, TABULAR, seed=0), "cpu", "fp32", compile=True)
    with pytest.raises(ModelError) as caught, torch.inference_mode():
        scorer(**sample_inputs(TABULAR, rows=3))
    said = str(caught.value)
    assert said.startswith("torch.compile can't compile the mlp model on this machine: InvalidCxxCompiler: No working")
    assert said.endswith("; set capture.compile to false") and "\n" not in said


def test_other_errors_of_a_compiled_model_stay_what_they_are() -> None:
    scorer = build_model(
        config(VIT), DataFacts("classification", "image", "f", image_shape=(1, 8, 8), classes=("a",)), seed=0
    )
    scorer.compiled = True
    with pytest.raises(ValueError, match="pixel"):
        scorer(pixels=torch.zeros(2, 3, 8, 8))
