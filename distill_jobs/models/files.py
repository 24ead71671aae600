"""Models on disk.

A model of transformers is an ordinary Hugging Face folder (configuration, safetensors, tokenizer); any other is
``model.json`` (how to build it) and ``model.safetensors``. Beside them ``encoder.json`` and ``serving.json``, with
which the folder alone can serve. ``serving.json`` is written last: without it there is no model here.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from cluster.errors import FileError
from cluster.files import Folder, sha256
from cluster.node_cache import node_copy
from distill_jobs.data.encoder import ENCODER
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.tokenizer import TokenizerFacts
from distill_jobs.errors import DataError, ModelError
from distill_jobs.models import builtin, factory, huggingface
from distill_jobs.models.lora import merged
from distill_jobs.models.scorer import Scorer, flat
from distill_jobs.models.spread import gpus, layer_map

SERVING, SPEC, WEIGHTS = "serving.json", "model.json", "model.safetensors"
_VERSION = 1
_SAME_FACTS = {
    "task": "task",
    "features": "kind of features",
    "classes": "list of classes",
    "feature_width": "number of features",
    "image_shape": "image shape",
    "tokenizer_sha": "tokenizer",
    "packing": "packing",
}


def save_model(
    scorer: Scorer, folder: Folder, facts: DataFacts, data: Folder, state: dict[str, Tensor] | None = None
) -> None:
    """Write a model so that it can be loaded, served and shared from ``folder`` alone; adapters are merged into it.

    Args:
        data: the prepared data, whose encoder and tokenizer are copied along.
        state: the full state dict of the scorer (keys ``core.…``) where its own parameters are elsewhere, as with
            weights that an engine has spread over ranks; None saves the scorer's own.
    """
    folder.remove(SERVING)
    own = scorer.state_dict() if state is None else state
    weights = merged(scorer.core, {name.removeprefix("core."): value for name, value in own.items()})
    for name in [*folder.names(".safetensors"), *folder.names(".safetensors.index.json")]:
        folder.remove(name)
    with tempfile.TemporaryDirectory(prefix="model-") as scratch:
        if scorer.origin["kind"] == "hf":
            _write_hugging_face(scorer.core, weights, Path(scratch))
        else:
            _write_plain(scorer, weights, Path(scratch))
        sums = {file.name: _copy(file, folder) for file in sorted(Path(scratch).iterdir())}
    if data.exists(ENCODER):
        folder.write(ENCODER, data.read(ENCODER))
    for name in (data / "tokenizer").names():
        folder.write(name, (data / "tokenizer").read(name))
    files = {name: entry for name, entry in sums.items() if name.endswith(".safetensors")}
    tokenizer = TokenizerFacts.load(data)
    known = {"origin": scorer.origin, "weights": files}
    serving = {
        "schema_version": _VERSION,
        "facts": facts.as_dict(),
        "outputs": scorer.outputs,
        "end_id": tokenizer.end_id if tokenizer else None,
        "digest": hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest(),
        **known,
    }
    folder.write_json(SERVING, serving)


def load_model(folder: Folder, *, dtype: torch.dtype | None = None, device: str = "cpu", spread: int = 1) -> Scorer:
    """Load a saved model, in eval mode.

    A factory model's folder names the code to call: load such folders only from where you would run code.

    Args:
        dtype: the precision of a Hugging Face model's weights, converted one by one while they are read; fp32 by
            default. Other models are loaded in fp32.
        device: where a Hugging Face model's weights go straight from the file; on the CPU those that need no
            conversion stay mapped, and a node's processes share them. Other models are loaded on the CPU.
        spread: from 2 on, the layers of a Hugging Face model go straight to so many GPUs of this process.

    Raises:
        ModelError: it is not there or not whole, can't be spread, or there is no room for it.
    """
    serving, facts = read_serving(folder)
    origin = serving["origin"]
    if spread > 1 and origin["kind"] != "hf":
        raise ModelError(
            f"only Hugging Face models can be spread over several GPUs, and the one in {folder} is a {origin['kind']} "
            f"model: set gpus_per_actor to 1"
        )
    # A remote folder is fetched once for all processes of a node, and stays as long as one of them uses it.
    path = node_copy(folder, serving["digest"])
    read_serving(Folder(str(path)))
    if origin["kind"] == "hf":
        with huggingface.said(f"can't load the model in {folder}"):
            core = _read_hugging_face(path, facts, dtype or torch.float32, device, spread)
    else:
        core = factory.revive(origin) if origin["kind"] == "factory" else builtin.revive(origin)
        _read_plain(core, path / WEIGHTS, folder)
    scorer = Scorer(core, origin, facts.features, facts.packing).eval()
    scorer.outputs = serving["outputs"]
    return scorer


def model_digest(folder: Folder) -> str:
    """A digest of the weights and of how the model is built (worked out when it was saved)."""
    return str(read_serving(folder)[0]["digest"])


def read_serving(folder: Folder) -> tuple[dict[str, Any], DataFacts]:
    """``serving.json`` and the data facts in it, after a look whether the weights are as long as it says."""
    if not folder.exists(SERVING):
        raise ModelError(f"there is no complete model in {folder}")
    try:
        serving = folder.read_json(SERVING)
        facts = DataFacts.of(serving["facts"], f"{folder}/{SERVING}")
        whole = all(folder.size(name) == entry["bytes"] for name, entry in serving["weights"].items())
        if serving["schema_version"] != _VERSION or serving["origin"]["kind"] not in ("hf", "mlp", "cnn", "factory"):
            raise KeyError
        if not isinstance(serving["outputs"], int) or not isinstance(serving["digest"], str):
            raise KeyError
    except (FileError, DataError) as error:
        raise ModelError(f"the model in {folder} is damaged: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise ModelError(f"the model in {folder} is damaged or from another version: {SERVING} is not valid") from None
    if not whole:
        raise ModelError(f"the model in {folder} is damaged: its weights don't have the length that {SERVING} says")
    return serving, facts


def check_reads_alike(folder: Folder, facts: DataFacts, data: Folder | None) -> None:
    """Refuse a saved model that was made for data of another form: what it takes for one thing would be another.

    Args:
        data: the prepared data, whose encoder must be the model's own.

    Raises:
        ModelError: saying what differs.
    """
    _, known = read_serving(folder)
    pairs = {name: (getattr(known, fact), getattr(facts, fact)) for fact, name in _SAME_FACTS.items()}
    if facts.features in ("tabular", "image"):
        pairs["form of features"] = (known.reads, facts.reads)
    if data is not None and data.exists(ENCODER):
        own = folder.read(ENCODER) if folder.exists(ENCODER) else b""
        pairs["encoder (fitted on the training rows)"] = (own, data.read(ENCODER))
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ModelError(
                f"the model in {folder} was made for data with another {name} than this job's: bring a model "
                f"that was trained on rows prepared in the same way"
            )


def _read_hugging_face(path: Path, facts: DataFacts, dtype: torch.dtype, device: str, spread: int) -> nn.Module:
    auto = huggingface.auto_class(facts.features)
    where = layer_map(auto, path, dtype, gpus(spread)) if spread > 1 else {"": device}
    core: nn.Module = auto.from_pretrained(
        path, dtype=dtype, device_map=where, use_safetensors=True, trust_remote_code=False, local_files_only=True
    )
    return core


def _write_hugging_face(core: Any, weights: dict[str, Tensor], path: Path) -> None:
    # A gathered state dict may hold tied weights twice, as copies: the config ties them, so each goes in once.
    tied = set(core.all_tied_weights_keys)
    kept = {name: value for name, value in weights.items() if name not in tied}
    with huggingface.said("can't save the model"):
        core.save_pretrained(path, state_dict=kept)


def _write_plain(scorer: Scorer, weights: dict[str, Tensor], path: Path) -> None:
    kept = {name: value.contiguous() for name, value in weights.items() if name not in _aliases(scorer.core)}
    safetensors.torch.save_file(kept, path / WEIGHTS)
    (path / SPEC).write_text(json.dumps(scorer.origin, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _read_plain(core: nn.Module, path: Path, folder: Folder) -> None:
    try:
        missing, unexpected = core.load_state_dict(safetensors.torch.load_file(path), strict=False)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelError(f"can't load the weights in {folder}: {flat(error)}") from None
    wrong = [*unexpected, *(name for name in missing if name not in _aliases(core))]
    if wrong:
        raise ModelError(f"the weights in {folder} don't fit the model: {wrong[0]} is on one side only")


def _aliases(core: nn.Module) -> set[str]:
    """Names under which a tensor appears a second time."""
    seen: set[int] = set()
    again: set[str] = set()
    for tensors in (core.named_parameters(remove_duplicate=False), core.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            if id(tensor) in seen:
                again.add(name)
            seen.add(id(tensor))
    return again


def _copy(file: Path, folder: Folder) -> dict[str, Any]:
    """Copy a file into ``folder`` in one commit; its length and SHA-256."""
    folder.put(file, file.name)
    return {"bytes": file.stat().st_size, "sha256": sha256(Folder(str(file.parent)), file.name)}
