"""What a model that is brought consists of, as files: for the question 'has it changed?', without loading anything."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from cluster.errors import FileError
from cluster.files import Folder, digest, sha256
from distill_jobs import spec
from distill_jobs.data.at_hand import is_remote, stamps
from distill_jobs.errors import ModelError

_CONTENT = (".safetensors", ".json", ".model", ".txt")


def brought_digest(model: spec.Model) -> str:
    """A digest of what is brought: the content of a folder or file, the commit of a cached id, a factory's source.

    Of what lies in an object store sizes and times of change stand for the content. A model that is not brought
    counts by its part of the spec. Imports no torch.

    Raises:
        ModelError: the file can't be read, or ``hf`` is neither a folder nor an id.
    """
    if model.kind in ("gguf", "hf") and is_remote(model.chosen):
        return digest({model.kind: stamps(model.chosen)})
    if model.kind == "gguf":
        return digest({"gguf": _file_sum(Path(model.chosen))})
    if model.kind == "hf":
        return digest({"hf": _hf_sums(model.chosen)})
    if model.kind == "saved":
        return digest({"saved": _saved_digest(Folder(model.chosen))})
    if model.kind == "factory":
        source = source_of(model.chosen.target)
        return digest({"factory": model.chosen.model_dump(), "source": _file_sum(source) if source else None})
    return digest(model.model_dump())


def source_of(target: str) -> Path | None:
    """The file that holds the factory ``module:callable``, found without running it; None when there is none."""
    see_working_directory()
    try:
        found = importlib.util.find_spec(target.partition(":")[0])
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found and found.origin and Path(found.origin).is_file() else None


def see_working_directory() -> None:
    """Let modules be imported from the folder in which the command runs."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
        importlib.invalidate_caches()


def _hf_sums(where: str) -> Any:
    path = Path(where)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in _CONTENT)
        return {file.name: _file_sum(file) for file in files}
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(where, "config.json")
    except ValueError:
        raise ModelError(f"there is no Hugging Face folder {where}, and it is not the id of a model") from None
    # In the cache a file lies under snapshots/<commit>/.
    return {"id": where, "commit": Path(cached).parent.name if isinstance(cached, str) else None}


def _saved_digest(folder: Folder) -> str:
    try:
        return str(folder.read_json("serving.json")["digest"])
    except (FileError, KeyError, TypeError):
        raise ModelError(f"there is no complete model in {folder}") from None


def _file_sum(path: Path) -> str:
    try:
        return sha256(Folder(str(path.parent)), path.name)
    except FileError:
        raise ModelError(f"can't read the model file {path}") from None
