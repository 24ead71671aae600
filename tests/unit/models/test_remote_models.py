"""Models and tokenizers given by their addresses in an object store."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_cases import LLAMA, LM, config
from test_gguf import VOCABULARY, write_llama

from cluster.files import Folder, store_folder
from distill_jobs import spec
from distill_jobs.data.at_hand import at_hand
from distill_jobs.data.tokenizer import identity
from distill_jobs.errors import ModelError
from distill_jobs.models.brought import brought_digest
from distill_jobs.models.build import build_model


@pytest.fixture
def bucket(s3: Callable[[str], Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setenv("DISTILL_NODE_CACHE", str(tmp_path / "cache"))
    return s3("models")


def test_folders_and_files_are_loaded_as_local_ones_are(bucket: Folder, tmp_path: Path) -> None:
    assert LM.vocabulary == VOCABULARY
    build_model(config(LLAMA), LM, seed=1).core.save_pretrained(tmp_path / "hf")  # type: ignore[operator]
    (tmp_path / "gguf").mkdir()
    write_llama(tmp_path / "gguf" / "tiny.gguf")
    for name, where in (("hf", "hf"), ("gguf", "gguf/tiny.gguf")):
        store_folder(tmp_path / name, bucket / name)
        # Beside a single file may lie others, which nobody wants.
        (bucket / "gguf").write("other.gguf", b"not a model")
        here, there = (spec.Model.model_validate({name: f"{at}/{where}"}) for at in (tmp_path, bucket))
        for mine, theirs in zip(
            build_model(here, LM, seed=0).state_dict().items(),
            build_model(there, LM, seed=0).state_dict().items(),
            strict=True,
        ):
            assert mine[0] == theirs[0] and torch.equal(mine[1], theirs[1])
    assert not (Path(at_hand(f"{bucket}/gguf/tiny.gguf")).parent / "other.gguf").exists()


def test_what_was_written_again_is_another(bucket: Folder) -> None:
    folder = bucket / "changing"
    folder.write("model.safetensors", b"1")
    folder.write("tokenizer.json", b"{}")
    model = spec.Model(hf=folder.uri)
    digest, tokenizer, copy = brought_digest(model), identity(folder.uri), at_hand(folder.uri)
    assert brought_digest(model) == digest and at_hand(f"{folder}/") == copy
    folder.write("model.safetensors", b"12")
    # The weights are no part of the tokenizer.
    assert brought_digest(model) != digest and identity(folder.uri) == tokenizer and at_hand(folder.uri) != copy
    folder.write("tokenizer.json", b"{ }")
    assert identity(folder.uri) != tokenizer


def test_nothing_there_is_one_sentence(bucket: Folder) -> None:
    for model in ({"hf": f"{bucket}/none"}, {"gguf": f"{bucket}/none.gguf"}, {"saved": f"{bucket}/none"}):
        with pytest.raises(ModelError, match="none") as caught:
            brought_digest(spec.Model.model_validate(model))
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="there is nothing at"):
        at_hand(f"{bucket}/none")
