"""The parts of a job spec that say where a model comes from. Imports neither torch nor ray."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from distill_jobs.spec.base import OneOf, Part, Positive, Share

LayerNumbers = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class Mlp(Part):
    """Built-in multi-layer perceptron for tabular rows (or flattened images)."""

    hidden: tuple[Positive, ...] = (128, 128)
    dropout: Share = 0.0


class Cnn(Part):
    """Built-in convolutional network for images: 3×3 convolutions, one halving after each."""

    channels: tuple[Positive, ...] = (16, 32)
    dropout: Share = 0.0


class Factory(Part):
    """``module:callable`` that returns an ``nn.Module``, called with ``args`` and the data's sizes."""

    target: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    args: dict[str, Any] = {}


class TeacherLayers(Part):
    """A copy of the teacher with only these of its layers, in this order."""

    layers: LayerNumbers


class PrunedTeacher(Part):
    """A copy of the teacher made narrower, and shorter where ``layers`` says so; what isn't named stays as it is.

    What stays is what matters most to the teacher on ``calibration_rows`` of the training rows. ``layers`` are the
    numbers of those that stay, or how many.
    """

    SIZES: ClassVar[tuple[str, ...]] = ("hidden_size", "intermediate_size", "attention_heads", "key_value_heads")

    hidden_size: Positive | None = None
    intermediate_size: Positive | None = None
    attention_heads: Positive | None = None
    key_value_heads: Positive | None = None
    layers: Positive | LayerNumbers | None = None
    calibration_rows: Positive = 512

    @model_validator(mode="after")
    def _some_size(self) -> Self:
        if all(getattr(self, name) is None for name in (*self.SIZES, "layers")):
            raise ValueError(f"name at least one size to prune to: {', '.join(self.SIZES)} or layers")
        return self


class Model(OneOf):
    """Where a model comes from. ``saved`` is the folder of a model that another job made: its ``teacher/model``."""

    what: ClassVar[str] = "kind of model"
    hf: str | None = None
    gguf: str | None = None
    config: dict[str, Any] | None = None
    factory: Factory | None = None
    saved: str | None = None
    mlp: Mlp | None = None
    cnn: Cnn | None = None
    init_from_teacher: TeacherLayers | None = None
    prune_teacher: PrunedTeacher | None = None

    @property
    def from_teacher(self) -> bool:
        """Whether it starts as a part of the teacher."""
        return self.kind in ("init_from_teacher", "prune_teacher")


class Lora(Part):
    """Train low-rank adapters (LoRA) on a Hugging Face model and leave its weights as they are; merged when saved.

    ``targets`` are the ends of the names of linear layers (``q_proj``); by default all but the output head are. An
    adapter's output is weighed by ``alpha`` / ``rank``, or with ``rank_stabilised`` by ``alpha`` / √``rank``.
    """

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    rank_stabilised: bool = False
