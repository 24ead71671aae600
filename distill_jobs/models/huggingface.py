"""Models of the transformers library: a folder or id, a GGUF file, a configuration to start from scratch.

transformers takes seconds to import, so that is left to the functions: a job with built-in models never pays.
"""

import difflib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill_jobs.data.facts import DataFacts
from distill_jobs.data.gguf_file import check_gguf, quick_gguf_reading
from distill_jobs.errors import DistillError, ModelError, VocabularyError
from distill_jobs.models.scorer import flat
from distill_jobs.models.unscorable import longest_row

_AUTO = {
    "documents": "AutoModelForCausalLM",
    "text": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
}


def auto_class(features: str) -> Any:
    """transformers' auto class for a kind of features."""
    import transformers

    if features not in _AUTO:
        raise ModelError(f"Hugging Face models take documents, text or images, not {features} features: use mlp")
    return getattr(transformers, _AUTO[features])


def load_pretrained(where: str, facts: DataFacts, *, trained_further: bool) -> nn.Module:
    """Load a Hugging Face folder or id in fp32, from safetensors only, never running code that comes with it.

    Args:
        trained_further: whether a classifier may get a new head for this data's classes.
    """
    auto = auto_class(facts.features)
    extra: dict[str, Any] = {}
    if facts.features != "documents" and trained_further:
        extra = {**_heads(facts), "ignore_mismatched_sizes": True}
    with said(f"can't load the Hugging Face model {where}"):
        core, info = auto.from_pretrained(
            where,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=offline() or Path(where).exists(),
            output_loading_info=True,
            **extra,
        )
    missing = sorted(info["missing_keys"])
    if missing and not (trained_further and facts.features != "documents"):
        raise ModelError(
            f"{where} has no weights for {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}: "
            f"it is not a trained {facts.task} model"
        )
    return _fitted(core, facts, where)


def load_gguf(path: str, facts: DataFacts) -> nn.Module:
    """Load a GGUF file, its weights dequantised to fp32, so that it can be trained and saved like any other model."""
    from transformers import AutoModelForCausalLM, GgufConfig

    check_gguf(path)
    folder, name = str(Path(path).parent), Path(path).name
    with said(f"can't load the GGUF file {path}"), quick_gguf_reading():
        core = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            dtype=torch.float32,
            local_files_only=True,
            quantization_config=GgufConfig(gguf_file=name, dequantize=True),
        )
    # Where the file came from is no business of the saved model's configuration.
    core.config._name_or_path = core.name_or_path = name
    return _fitted(core, facts, path)


def from_config(values: dict[str, Any], facts: DataFacts) -> nn.Module:
    """A model with fresh weights from configuration values; sizes that the data fix may be left out of them."""
    auto = auto_class(facts.features)
    with said(f"can't build a {values.get('model_type')} model from its config"):
        config = _config(values, facts)
        core = auto.from_config(config, dtype=torch.float32)
    return _fitted(core, facts, f"the {values['model_type']} config")


def _config(values: dict[str, Any], facts: DataFacts) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING.keys()), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else " (gpt2, llama, bert, vit and many more)"
        raise ModelError(f"config.model_type {kind!r} is no architecture of transformers{hint}")
    usual = CONFIG_MAPPING[kind]()
    known = [*usual.to_dict(), *usual.attribute_map, "num_labels"]
    for key in values:
        if key not in known and not _is_read(key, usual, facts):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise ModelError(f"unknown key config.{key} for {kind}{f'; did you mean {near[0]}?' if near else ''}")
    given = {usual.attribute_map.get(k, k): v for k, v in values.items() if k != "model_type"}
    sizes = {usual.attribute_map.get(k, k): v for k, v in _sizes(usual, facts).items()}
    if "num_labels" in given:
        sizes = {k: v for k, v in sizes.items() if k not in ("id2label", "label2id")}
    return AutoConfig.for_model(kind, **{**sizes, **given})


def _is_read(key: str, usual: Any, facts: DataFacts) -> bool:
    """Whether the architecture's code reads a setting that its configuration doesn't list (``head_dim``, say)."""
    mapping = auto_class(facts.features)._model_mapping
    if type(usual) not in mapping:
        return False
    code = inspect.getsource(sys.modules[mapping[type(usual)].__module__])
    return re.search(rf"\b{re.escape(key)}\b", code) is not None


def _sizes(usual: Any, facts: DataFacts) -> dict[str, Any]:
    """What the data fix: vocabulary, length, padding, classes, picture size. The user's own values go before."""
    if facts.features == "image":
        channels, height, width = facts.image_shape or (3, 0, 0)
        size = {"image_size": height if height == width else [height, width], "num_channels": channels}
        return {**{k: v for k, v in size.items() if hasattr(usual, k)}, **_heads(facts)}
    sizes: dict[str, Any] = {"vocab_size": facts.vocabulary, "pad_token_id": facts.pad_id}
    for name in ("bos_token_id", "eos_token_id"):
        # A default made for another vocabulary would point beyond this one.
        sizes[name] = None
    limit = getattr(usual, "max_position_embeddings", None)
    if isinstance(limit, int) and facts.sequence_length and limit < facts.sequence_length + 2:
        sizes["max_position_embeddings"] = facts.sequence_length + 2
    return sizes if facts.features == "documents" else {**sizes, **_heads(facts)}


def _heads(facts: DataFacts) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(facts.classes)),
        "label2id": {name: number for number, name in enumerate(facts.classes)},
    }


def _fitted(core: nn.Module, facts: DataFacts, what: str) -> nn.Module:
    """Check what a dry run would only fail on obscurely, and settle what must be set for such data."""
    config: Any = core.config
    if facts.features == "image":
        return core
    embedded = core.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if facts.vocabulary and embedded < facts.vocabulary:
        raise VocabularyError(
            f"{what} knows {embedded} tokens, but the data's tokenizer has {facts.vocabulary}: "
            f"give the model the tokenizer's vocabulary, or the data the model's tokenizer"
        )
    limit = longest_row(core)
    if limit and facts.sequence_length and facts.sequence_length > limit:
        raise ModelError(f"{what} takes at most {limit} tokens, but the data's rows have {facts.sequence_length}")
    if facts.features == "text" and config.pad_token_id is None:
        config.pad_token_id = facts.pad_id
    return core


def offline() -> bool:
    """Whether the environment forbids asking the Hugging Face Hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@contextmanager
def said(what: str) -> Iterator[None]:
    """Quiet transformers, and turn whatever it raises into a ModelError that begins with ``what``."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (DistillError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise ModelError(f"{what}: {flat(error)}") from None
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
