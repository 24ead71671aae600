"""The tokenizer: converted once, told apart by content."""

import json

import pytest
from transformers import AutoTokenizer

from cluster.files import Folder
from distill_jobs.data import tokenizer
from distill_jobs.errors import DataError, ModelError


def test_bytes_are_their_own_ids(tmp_path):
    data = Folder(str(tmp_path))
    facts = tokenizer.convert("bytes", data)
    assert (facts.vocabulary, facts.pad_id, facts.end_id) == (258, 256, 257)
    opened = tokenizer.open_tokenizer(data)
    text = "naïve 文\n\t<|x|> " + "".join(map(chr, range(256)))
    assert opened.encode(text).ids == list(text.encode())
    loaded = AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    assert loaded.decode(list(text.encode())) == text
    assert len(loaded) == 258
    assert tokenizer.vocabulary_digest(loaded.get_vocab()) == facts.sha


def test_a_folder_is_converted_once_and_known_by_content(tmp_path, monkeypatch):
    first = tokenizer.convert("bytes", Folder(str(tmp_path / "a")))
    source = str(tmp_path / "a" / "tokenizer")
    again = tokenizer.convert(source, Folder(str(tmp_path / "b")))
    assert again.sha == first.sha
    monkeypatch.setattr(tokenizer, "_load", None)
    assert tokenizer.convert(source, Folder(str(tmp_path / "b"))) == again
    before = tokenizer.identity(source)
    config = tmp_path / "a" / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 5}))
    assert tokenizer.identity(source) != before


def test_what_is_no_tokenizer_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = Folder(str(tmp_path / "data"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="can't load the tokenizer from") as caught:
        tokenizer.convert(str(tmp_path / "empty"), data)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="does not exist"):
        tokenizer.convert(str(tmp_path / "none.gguf"), data)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0")
    with pytest.raises(ModelError, match="cut short"):
        tokenizer.convert(str(tmp_path / "cut.gguf"), data)
