import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from model_cases import BERT, IMAGE, LLAMA, LM, TABULAR, TEXT, config, factory
from PIL import Image

from cluster.files import Folder
from distill_jobs import spec
from distill_jobs.data.encoder import Encoder
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.tokenizer import convert
from distill_jobs.errors import DataError, ModelError
from distill_jobs.models.build import build_model
from distill_jobs.models.files import load_model, save_model
from distill_jobs.models.serving import load

MLP = spec.Model.model_validate({"mlp": {"hidden": (7,)}})


def changed(facts: DataFacts, **changes: object) -> DataFacts:
    return DataFacts(**{**vars(facts), **changes})


def saved(tmp_path: Path, model: spec.Model, facts: DataFacts) -> Folder:
    folder = Folder(str(tmp_path / "model"))
    save_model(build_model(model, facts, seed=2), folder, facts, Folder(str(tmp_path / "data")))
    return folder


def test_tabular_rows_go_through_the_saved_encoder(tmp_path: Path) -> None:
    encoder = Encoder((("age", 40.0, 10.0),), (("sex", ("f", "m"), True), ("job", ("x",), False)))
    encoder.save(Folder(str(tmp_path / "data")))
    folder = saved(tmp_path, MLP, TABULAR)
    (tmp_path / "data" / "encoder.json").unlink()
    frame = pd.DataFrame({"job": ["x", None], "age": [50, 31], "sex": ["m", "?"], "more": [1, 2]}, index=[7, 3])
    found = load(str(folder.path()))(frame, None)
    with torch.no_grad():
        features = torch.tensor([[1.0, 0, 1, 0, 1], [-0.9, 0, 0, 1, 0]])
        expected = load_model(folder)(features=features).softmax(-1).numpy()
    assert list(found.columns) == ["prediction", "probability", "p.no", "p.yes"]
    assert list(found.index) == [7, 3]
    np.testing.assert_allclose(found[["p.no", "p.yes"]], expected, rtol=1e-6)
    assert list(found["prediction"]) == [("no", "yes")[i] for i in expected.argmax(1)]
    np.testing.assert_allclose(found["probability"], expected.max(1), rtol=1e-6)
    assert load(str(folder.path()))(frame.iloc[:0], None).empty
    with pytest.raises(DataError, match="no column 'age'"):
        load(str(folder.path()))(frame.drop(columns="age"), None)


def test_images_come_in_every_form_that_the_data_may_have(tmp_path: Path) -> None:
    facts = changed(IMAGE, reads={"column": "picture", "shape": [1, 8, 8], "scale": 255.0})
    folder = saved(tmp_path, MLP, facts)
    values = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
    png = io.BytesIO()
    Image.fromarray(values).save(png, "PNG")
    nested = np.empty(8, dtype=object)
    nested[:] = list(values)
    forms = [png.getvalue(), {"bytes": png.getvalue()}, values.tolist(), values, values.reshape(-1), nested]
    found = load(str(folder.path()))(pd.DataFrame({"picture": forms}), None)
    with torch.no_grad():
        expected = load_model(folder)(pixels=torch.from_numpy(values / 255).float()[None, None]).softmax(-1)[0]
    for i in range(len(forms)):
        np.testing.assert_allclose(found.loc[i, ["p.0", "p.1", "p.2"]].astype(float), expected, rtol=1e-4)


def test_texts_are_cut_and_padded_as_in_the_data(tmp_path: Path) -> None:
    tokenizer = convert("bytes", Folder(str(tmp_path / "data")))
    facts = changed(TEXT, vocabulary=tokenizer.vocabulary, pad_id=tokenizer.pad_id, reads={"column": "body"})
    folder = saved(tmp_path, config(BERT), facts)
    frame = pd.DataFrame({"body": ["short", "a text that is longer than twelve bytes", ""]})
    found = load(str(folder.path()))(frame, None)
    row = torch.full((1, 12), tokenizer.pad_id)
    row[0, :5] = torch.tensor(list(b"short"))
    with torch.no_grad():
        mask = torch.tensor([[1] * 5 + [0] * 7])
        expected = load_model(folder)(input_ids=row, attention_mask=mask).softmax(-1)[0]
    np.testing.assert_allclose(found.loc[0, ["p.a", "p.b"]].astype(float), expected, rtol=1e-5)
    assert len(found) == 3
    with pytest.raises(DataError, match="column body is empty"):
        load(str(folder.path()))(pd.DataFrame({"body": ["a", None]}), None)


@pytest.mark.parametrize("model", [config(LLAMA, vocab_size=300), factory("honest_lm")])
def test_completions_are_the_likeliest_tokens(tmp_path: Path, model: spec.Model) -> None:
    tokenizer = convert("bytes", Folder(str(tmp_path / "data")))
    facts = changed(LM, vocabulary=tokenizer.vocabulary, pad_id=tokenizer.pad_id)
    folder = saved(tmp_path, model, facts)
    predict = load(str(folder.path()))
    found = predict(pd.DataFrame({"prompt": ["abc", "z"]}), {"max_new_tokens": 5})
    scorer, ids = load_model(folder), list(b"abc")
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(scorer(input_ids=torch.tensor([ids]))[0, -1, : tokenizer.vocabulary].argmax()))
            if ids[-1] == tokenizer.end_id:
                break
    real = bytes(i for i in ids[3:] if i < 256)
    assert found.loc[0, "completion"] == real.decode(errors="replace")
    assert len(found) == 2
    for wrong in (0, "many", True, 10**9):
        with pytest.raises(DataError, match="max_new_tokens"):
            predict(pd.DataFrame({"prompt": ["a"]}), {"max_new_tokens": wrong})


def test_no_model_no_service(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no complete model"):
        load(str(tmp_path))
