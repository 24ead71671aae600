from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_cases import BERT, GPT2, IMAGE, LLAMA, LM, TABULAR, TEXT, VIT, config, factory
from safetensors.torch import load_file

from cluster.files import Folder
from distill_jobs import spec
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import ModelError
from distill_jobs.models.brought import brought_digest
from distill_jobs.models.build import build_model
from distill_jobs.models.files import load_model, model_digest, save_model
from distill_jobs.models.scorer import sample_inputs
from distill_jobs.models.teacher import import_teacher

MLP = spec.Model.model_validate({"mlp": {"hidden": (7,)}})
CNN = spec.Model.model_validate({"cnn": {"channels": (4,)}})
TIED = config(LLAMA, tie_word_embeddings=True)
CASES = [
    (MLP, TABULAR),
    (CNN, IMAGE),
    (config(LLAMA), LM),
    (TIED, LM),
    (config(GPT2), LM),
    (config(BERT), TEXT),
    (config(VIT), IMAGE),
    (factory("linear", bias=False), TABULAR),
    (factory("honest_lm"), LM),
]


def saved(tmp_path: Path, model: spec.Model, facts: DataFacts, **options: Any) -> Folder:
    folder = Folder(str(tmp_path / "model"))
    save_model(build_model(model, facts, seed=2), folder, facts, Folder(str(tmp_path / "data")), **options)
    return folder


@pytest.mark.parametrize(("model", "facts"), CASES)
def test_a_saved_model_comes_back_the_same(tmp_path: Path, model: spec.Model, facts: DataFacts) -> None:
    folder = saved(tmp_path, model, facts)
    original, loaded = build_model(model, facts, seed=2), load_model(folder)
    with torch.no_grad():
        assert torch.equal(original(**sample_inputs(facts)), loaded(**sample_inputs(facts)))
    assert (loaded.outputs, loaded.origin) == (original.outputs, original.origin)
    assert not loaded.training


@pytest.mark.parametrize(("model", "facts"), [(TIED, LM), (factory("honest_lm"), LM), (MLP, TABULAR)])
def test_a_gathered_state_is_what_is_saved(tmp_path: Path, model: spec.Model, facts: DataFacts) -> None:
    # As an engine gathers it: copies, also of tied weights, and changed from what the scorer itself holds.
    other = build_model(model, facts, seed=9)
    state = {key: value.clone() for key, value in other.state_dict().items()}
    folder = saved(tmp_path, model, facts, state=state)
    with torch.no_grad():
        assert torch.equal(load_model(folder)(**sample_inputs(facts)), other(**sample_inputs(facts)))


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path: Path) -> None:
    folder = saved(tmp_path, TIED, LM)
    assert "lm_head.weight" not in load_file(folder.path("model.safetensors"))
    core: Any = load_model(folder).core
    assert core.lm_head.weight is core.model.embed_tokens.weight


def test_a_model_of_transformers_is_an_ordinary_folder_of_its(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = saved(tmp_path, config(LLAMA), LM)
    plain = AutoModelForCausalLM.from_pretrained(folder.path())
    ids = sample_inputs(LM)["input_ids"]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, load_model(folder)(input_ids=ids))


def test_the_digest_follows_the_weights(tmp_path: Path) -> None:
    first = model_digest(saved(tmp_path / "a", MLP, TABULAR))
    assert first == model_digest(saved(tmp_path / "b", MLP, TABULAR))
    state = {k: v + 1 for k, v in build_model(MLP, TABULAR, seed=2).state_dict().items()}
    assert first != model_digest(saved(tmp_path / "c", MLP, TABULAR, state=state))


def test_a_folder_without_its_last_file_is_no_model(tmp_path: Path) -> None:
    folder = saved(tmp_path, MLP, TABULAR)
    folder.remove("serving.json")
    with pytest.raises(ModelError, match="no complete model"):
        load_model(folder)


@pytest.mark.parametrize("model", [MLP, config(LLAMA)])
@pytest.mark.parametrize("left", [0, 5, -1])
def test_damaged_weights_get_one_sentence(tmp_path: Path, model: spec.Model, left: int) -> None:
    folder = saved(tmp_path, model, TABULAR if model is MLP else LM)
    data = folder.read("model.safetensors")
    folder.write("model.safetensors", data[:left])
    with pytest.raises(ModelError, match="damaged"):
        load_model(folder)
    folder.write("model.safetensors", b"\xff" * len(data))
    with pytest.raises(ModelError, match="can't load"):
        load_model(folder)


def test_a_student_is_cut_from_a_saved_teacher(tmp_path: Path) -> None:
    folder = saved(tmp_path, TIED, LM)
    cut = spec.Model.model_validate({"init_from_teacher": {"layers": (0, 3)}})
    student: Any = build_model(cut, LM, seed=0, teacher=folder)
    assert student.core.config.num_hidden_layers == 2
    again = Folder(str(tmp_path / "again"))
    save_model(student, again, LM, Folder(str(tmp_path / "data")))
    with torch.no_grad():
        assert torch.equal(student(**sample_inputs(LM)), load_model(again)(**sample_inputs(LM)))
    with pytest.raises(ModelError, match="Hugging Face models only, and the teacher is a mlp"):
        build_model(cut, TABULAR, seed=0, teacher=saved(tmp_path / "mlp", MLP, TABULAR))


def test_a_brought_folder_becomes_the_teacher(tmp_path: Path) -> None:
    source = saved(tmp_path, config(BERT), TEXT)
    model = spec.Model(hf=str(source.path()))
    before = brought_digest(model)
    target = Folder(str(tmp_path / "teacher"))
    import_teacher(model, TEXT, Folder(str(tmp_path / "data")), target)
    with torch.no_grad():
        assert torch.equal(load_model(target)(**sample_inputs(TEXT)), load_model(source)(**sample_inputs(TEXT)))
    swapped = DataFacts(**{**vars(TEXT), "classes": ("b", "a")})
    with pytest.raises(ModelError, match=r"set data\.classes to the teacher's order"):
        import_teacher(model, swapped, Folder(str(tmp_path / "data")), target)
    source.write("config.json", source.read("config.json") + b" ")
    assert brought_digest(model) != before


def test_a_saved_model_teaches_in_another_job(tmp_path: Path) -> None:
    """Bit for bit, but not where its inputs would mean something else."""
    first, data = saved(tmp_path, MLP, TABULAR), Folder(str(tmp_path / "data"))
    other = saved(tmp_path / "b", factory("linear"), TABULAR)
    asked = spec.Model(saved=str(first))
    found = import_teacher(asked, TABULAR, data, Folder(str(tmp_path / "again")))
    with torch.no_grad():
        assert torch.equal(found(**sample_inputs(TABULAR)), load_model(first)(**sample_inputs(TABULAR)))
    assert brought_digest(asked) != brought_digest(spec.Model(saved=str(other)))
    renamed = replace(TABULAR, classes=tuple(reversed(TABULAR.classes)))
    with pytest.raises(ModelError, match="made for data with another list of classes than"):
        import_teacher(asked, renamed, data, Folder(str(tmp_path / "other")))
    data.write("encoder.json", b"{}")
    with pytest.raises(ModelError, match=r"with another encoder \(fitted on the training rows\)"):
        import_teacher(asked, TABULAR, data, Folder(str(tmp_path / "other")))
    with pytest.raises(ModelError, match="there is no complete model in"):
        brought_digest(spec.Model(saved=str(tmp_path / "nowhere")))


def test_a_brought_classifier_without_a_head_is_refused_but_may_be_trained(tmp_path: Path) -> None:
    language_model = saved(tmp_path, config(GPT2), LM)
    model = spec.Model(hf=str(language_model.path()))
    with pytest.raises(ModelError, match=r"has no weights for score.weight"):
        import_teacher(model, TEXT, Folder(str(tmp_path)), Folder(str(tmp_path / "teacher")))
    assert not (tmp_path / "teacher").exists()
    assert build_model(model, TEXT, seed=0).outputs == 2


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, config(LLAMA), LM)
    torch.save(load_file(folder.path("model.safetensors")), folder.path("pytorch_model.bin"))
    folder.remove("model.safetensors")
    with pytest.raises(ModelError, match="can't load the Hugging Face model"):
        build_model(spec.Model(hf=str(folder.path())), LM, seed=0)


def test_a_factory_teacher_counts_its_source_in_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    source = tmp_path / "a_brought_factory.py"
    model = spec.Model.model_validate({"factory": {"target": "a_brought_factory:make"}})
    digests = set()
    for text in ("x = 1", "x = 2"):
        source.write_text(text)
        digests.add(brought_digest(model))
    assert len(digests) == 2
    assert np.all([len(d) == 16 for d in digests])


def test_a_remote_model_is_fetched_once_for_all_processes_of_a_node(
    s3: Callable[[str], Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_NODE_CACHE", str(tmp_path / "cache"))
    remote, original = s3("models") / "teacher", build_model(config(LLAMA), LM, seed=2)
    save_model(original, remote, LM, Folder(str(tmp_path / "data")))
    first = load_model(remote)
    (copy,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    weights = copy / "model.safetensors"
    stamp = weights.stat()
    second = load_model(remote)
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns)
    with torch.no_grad():
        expected = original(**sample_inputs(LM))
        assert torch.equal(first(**sample_inputs(LM)), expected) and torch.equal(second(**sample_inputs(LM)), expected)
    # Other weights under the same name are another model.
    other = build_model(config(LLAMA), LM, seed=3)
    save_model(other, remote, LM, Folder(str(tmp_path / "data")))
    with torch.no_grad():
        assert torch.equal(load_model(remote)(**sample_inputs(LM)), other(**sample_inputs(LM)))
    del first, second  # whose weights are mapped
    weights.write_bytes(b"cut")
    save_model(original, remote, LM, Folder(str(tmp_path / "data")))
    with pytest.raises(ModelError, match=f"the model in {copy} is damaged"):
        load_model(remote)
