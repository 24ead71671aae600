"""A saved model as something to call, from its folder alone: raw columns in, predictions out.

``load`` is what MLflow calls (``cluster/served_model.py``) when somebody loads a logged model.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer
from torch import Tensor

from cluster.files import Folder
from distill_jobs.data.encoder import Encoder
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.images import pixels
from distill_jobs.data.rows import Rows
from distill_jobs.data.values import texts
from distill_jobs.errors import DataError, ModelError
from distill_jobs.models.files import load_model, read_serving
from distill_jobs.models.huggingface import said
from distill_jobs.models.scorer import Scorer
from distill_jobs.spec.parts import Image

Inputs = Callable[[pd.DataFrame], dict[str, Tensor]]
_ROWS_AT_ONCE = 256
_MAX_NEW_TOKENS = 32


def load(folder: str) -> Callable[[pd.DataFrame, dict[str, Any] | None], pd.DataFrame]:
    """Load a saved model for prediction on the CPU.

    What is returned takes the raw columns that the job's data had:

    - classifiers (the tabular columns, or the text or image column): gives ``prediction`` (the class's name),
      ``probability`` (its), and ``p.<class>`` for each class;
    - language models (column ``prompt``): gives ``completion``, the likeliest token each time;
      the parameter ``max_new_tokens`` (32) limits its length.

    Raises:
        ModelError: there is no whole model in ``folder``. Calling raises DataError for rows that can't be read.
    """
    where = Folder(folder)
    serving, facts = read_serving(where)
    scorer = load_model(where)
    if facts.features == "documents":
        return _Completer(scorer, facts, _tokenizer(where), serving["end_id"])
    makers: dict[str, Callable[[], Inputs]] = {
        "tabular": lambda: _tabular(Encoder.load(where)),
        "text": lambda: _texts(facts, _tokenizer(where), serving["end_id"]),
        "image": lambda: _images(facts),
    }
    return _Classifier(scorer, facts, makers[facts.features]())


class _Classifier:
    def __init__(self, scorer: Scorer, facts: DataFacts, inputs: Inputs) -> None:
        self._scorer, self._classes, self._inputs = scorer, np.array(facts.classes, dtype=object), inputs

    def __call__(self, frame: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:  # noqa: ARG002
        found = [self._probabilities(rows) for rows in _slices(frame)]
        shares = np.concatenate(found) if found else np.zeros((0, len(self._classes)), dtype=np.float32)
        best = shares.argmax(axis=1)
        columns = {"prediction": self._classes[best], "probability": shares[np.arange(len(best)), best]}
        columns |= {f"p.{name}": shares[:, i] for i, name in enumerate(self._classes)}
        return pd.DataFrame(columns, index=frame.index)

    def _probabilities(self, rows: pd.DataFrame) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(self._scorer(**self._inputs(rows)).float().softmax(dim=-1))


class _Completer:
    def __init__(self, scorer: Scorer, facts: DataFacts, tokenizer: Tokenizer, end_id: int | None) -> None:
        self._scorer, self._tokenizer, self._end = scorer, tokenizer, end_id
        self._vocabulary, self._pad = int(facts.vocabulary or scorer.outputs), facts.pad_id
        core: Any = scorer.core
        config = getattr(core, "config", None)
        self._limit = int(getattr(config, "max_position_embeddings", None) or facts.sequence_length or 0)

    def __call__(self, frame: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        count = (params or {}).get("max_new_tokens", _MAX_NEW_TOKENS)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < self._limit:
            raise DataError(f"max_new_tokens is a whole number from 1 to {self._limit - 1}, not {count!r}")
        prompts = _text_column(frame, "prompt")
        return pd.DataFrame({"completion": [self._complete(p, count) for p in prompts]}, index=frame.index)

    def _complete(self, prompt: str, count: int) -> str:
        ids = self._tokenizer.encode(prompt).ids
        if len(ids) > 1 and ids[-1] == self._end:
            ids = ids[:-1]  # some tokenizers end a text by themselves; this one is to go on
        ids = ids[-(self._limit - count) :] or [self._end or 0]
        with torch.inference_mode():
            made = (self._generate if self._scorer.origin["kind"] == "hf" else self._step_by_step)(ids, count)
        return str(self._tokenizer.decode(made, skip_special_tokens=True))

    def _generate(self, ids: list[int], count: int) -> list[int]:
        core: Any = self._scorer.core
        beyond = list(range(self._vocabulary, self._scorer.outputs))
        with said("can't complete the prompt"):
            made = core.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=self._end,
                pad_token_id=self._pad,
                suppress_tokens=beyond or None,
            )
        return [int(number) for number in made[0, len(ids) :]]

    def _step_by_step(self, ids: list[int], count: int) -> list[int]:
        made: list[int] = []
        while len(made) < count and (not made or made[-1] != self._end):
            logits = self._scorer(input_ids=torch.tensor([ids + made]))
            made.append(int(logits[0, -1, : self._vocabulary].argmax()))
        return made


def _tabular(encoder: Encoder) -> Inputs:
    def inputs(frame: pd.DataFrame) -> dict[str, Tensor]:
        columns = {str(name): frame[name].tolist() for name in frame.columns}
        return {"features": torch.from_numpy(encoder.transform(columns))}

    return inputs


def _texts(facts: DataFacts, tokenizer: Tokenizer, end_id: int | None) -> Inputs:
    length, column, pad = int(facts.sequence_length or 0), facts.reads.get("column", "text"), facts.pad_id or 0
    tokenizer.enable_truncation(length)

    def inputs(frame: pd.DataFrame) -> dict[str, Tensor]:
        empty = [pad if end_id is None else end_id]
        found = [encoded.ids or empty for encoded in tokenizer.encode_batch(_text_column(frame, column))]
        ids = torch.full((len(found), length), pad)
        mask = torch.zeros_like(ids)
        for row, piece in enumerate(found):
            ids[row, : len(piece)], mask[row, : len(piece)] = torch.tensor(piece), 1
        return {"input_ids": ids, "attention_mask": mask}

    return inputs


def _images(facts: DataFacts) -> Inputs:
    wanted = Image.model_validate_json(json.dumps({"shape": facts.image_shape, **facts.reads}))

    def inputs(frame: pd.DataFrame) -> dict[str, Tensor]:
        values = [_plain(value) for value in _column(frame, wanted.column)]
        flat = pixels(Rows({wanted.column: values}, _sources(frame)), wanted)
        return {"pixels": torch.from_numpy(flat).reshape(-1, *wanted.shape)}

    return inputs


def _tokenizer(folder: Folder) -> Tokenizer:
    if not folder.exists("tokenizer.json"):
        raise ModelError(f"the model in {folder} has no tokenizer.json; it can't take text")
    tokenizer = Tokenizer.from_buffer(folder.read("tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _slices(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    for start in range(0, len(frame), _ROWS_AT_ONCE):
        yield frame.iloc[start : start + _ROWS_AT_ONCE]


def _text_column(frame: pd.DataFrame, name: str) -> list[str]:
    # pandas marks a missing text with NaN or NA, which don't equal themselves.
    values = [None if value is pd.NA or value != value else value for value in _column(frame, name)]
    found = texts(Rows({name: values}, _sources(frame)), name)
    if None in found:
        raise DataError(f"row {found.index(None) + 1} of the input: column {name} is empty")
    return [text for text in found if text is not None]


def _column(frame: pd.DataFrame, name: str) -> list[Any]:
    if name not in frame.columns:
        raise DataError(f"the input has no column {name!r}; it has {', '.join(map(str, frame.columns)) or 'none'}")
    return list(frame[name])


def _sources(frame: pd.DataFrame) -> list[str]:
    return [f"the input:{i + 1}" for i in range(len(frame))]


def _plain(value: Any) -> Any:
    """pandas gives nested lists from Parquet as arrays of arrays, which NumPy can't stack by itself."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_plain(item) for item in value]
    return bytes(value) if isinstance(value, bytearray | memoryview) else value
