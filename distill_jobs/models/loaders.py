"""The model loaders: each turns its part of the spec into a model and the ``origin`` it can be built from again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from cluster.files import Folder
from distill_jobs.data.at_hand import at_hand
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import ModelError
from distill_jobs.models import builtin, factory, files, huggingface, importance, layers, width
from distill_jobs.models.scorer import Scorer


@dataclass(frozen=True)
class Wanted:
    """What a loader may need beside its own part of the spec.

    Attributes:
        teacher: the saved teacher, for a student that is cut from it.
        data: the prepared data, whose training rows show what matters to a teacher that is pruned.
        device: where to run the teacher for that.
        trained_further: False for a model that must be able to teach as it is.
    """

    facts: DataFacts
    teacher: Folder | None = None
    trained_further: bool = True
    data: Folder | None = None
    device: str = "cpu"


Loaded = tuple[nn.Module, dict[str, Any]]
Loader = Callable[[Any, Wanted], Loaded]

_HF = {"kind": "hf"}


def load_hf(chosen: str, wanted: Wanted) -> Loaded:
    return huggingface.load_pretrained(at_hand(chosen), wanted.facts, trained_further=wanted.trained_further), {**_HF}


def load_gguf_file(chosen: str, wanted: Wanted) -> Loaded:
    return huggingface.load_gguf(at_hand(chosen), wanted.facts), {**_HF}


def load_config(chosen: dict[str, Any], wanted: Wanted) -> Loaded:
    return huggingface.from_config(chosen, wanted.facts), {**_HF}


def load_factory(chosen: Any, wanted: Wanted) -> Loaded:
    origin = factory.factory_origin(chosen.target, chosen.args, wanted.facts)
    return factory.revive(origin), origin


def load_saved(chosen: str, wanted: Wanted) -> Loaded:
    folder = Folder(chosen)
    files.check_reads_alike(folder, wanted.facts, wanted.data)
    scorer = files.load_model(folder)
    return scorer.core, scorer.origin


def load_mlp(chosen: Any, wanted: Wanted) -> Loaded:
    origin = builtin.mlp_origin(chosen, wanted.facts)
    return builtin.revive(origin), origin


def load_cnn(chosen: Any, wanted: Wanted) -> Loaded:
    origin = builtin.cnn_origin(chosen, wanted.facts)
    return builtin.revive(origin), origin


def load_layers(chosen: Any, wanted: Wanted) -> Loaded:
    teacher, _ = _teacher("init_from_teacher", wanted)
    return layers.cut_layers(teacher.core, chosen.layers), {**_HF}


def load_pruned(chosen: Any, wanted: Wanted) -> Loaded:
    teacher, folder = _teacher("prune_teacher", wanted)
    width.narrowed(teacher.core, chosen)
    if wanted.data is None:
        scores = importance.Importance.unknown(teacher.core)
    else:
        # Beside the weights that they are of, and not among the files of the model itself.
        notes, key = folder / "importance", files.model_digest(folder)
        scores = importance.known_importance(teacher, key, notes, wanted.data, chosen.calibration_rows, wanted.device)
    return width.prune(teacher.core, chosen, scores).to("cpu"), {**_HF}


def _teacher(key: str, wanted: Wanted) -> tuple[Scorer, Folder]:
    if wanted.teacher is None:
        raise ModelError(f"{key} needs a teacher that is trained or imported: run the teach stage first")
    teacher = files.load_model(wanted.teacher)
    if teacher.origin["kind"] != "hf":
        raise ModelError(
            f"{key} takes Hugging Face models only, and the teacher is a {teacher.origin['kind']} model: give the "
            f"student a model of its own"
        )
    return teacher, wanted.teacher
