"""The parts of a job spec, in the order in which a job meets them. Imports neither torch nor ray."""

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from distill_jobs.errors import SpecError
from distill_jobs.spec.base import OneOf, Part, Positive, Share
from distill_jobs.spec.costs import TeacherCost
from distill_jobs.spec.model import Lora, Model
from distill_jobs.spec.train import Train

_LOGIN = re.compile(r"://[^/@\s]+@|[?&](password|passwd|token|user(name)?)=", re.I)
Paths = str | tuple[str, ...]


class Documents(Part):
    """Text for a causal language model, packed into sequences of fixed length."""

    column: str = "text"
    sequence_length: Annotated[int, Field(ge=8)] = 512
    packing: Literal["documents", "naive"] = "documents"
    tokenizer: str | None = None


class Tabular(Part):
    """Columns of a table, encoded by an encoder fitted on the training split."""

    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    max_categories: Positive = 256

    @model_validator(mode="after")
    def _some_columns(self) -> Self:
        if not self.numeric and not self.categorical:
            raise ValueError("name at least one numeric or categorical column")
        both = set(self.numeric) & set(self.categorical)
        if both:
            raise ValueError(f"a column is either numeric or categorical, not both: {', '.join(sorted(both))}")
        return self


class Text(Part):
    """One text column to classify, tokenised and cut at ``max_length`` tokens."""

    column: str = "text"
    max_length: Positive = 128
    tokenizer: str | None = None


class Image(Part):
    """One image column: encoded bytes (PNG, JPEG), or numbers in ``shape`` (channels, height, width)."""

    column: str = "image"
    shape: tuple[Positive, Positive, Positive]
    scale: Annotated[float, Field(gt=0)] = 255.0


class Features(OneOf):
    """What a row holds: documents (causal_lm), or tabular, text or image features (classification)."""

    what: ClassVar[str] = "kind of features"
    documents: Documents | None = None
    tabular: Tabular | None = None
    text: Text | None = None
    image: Image | None = None


class Data(Part):
    """Where the rows come from and how they are split.

    ``validation`` and ``test`` are either paths of their own or the share of the training rows that a hash of the
    row's id sets aside.
    """

    train: Paths
    validation: Paths | Share = 0.1
    test: Paths | Share = 0.1
    format: Literal["auto", "jsonl", "parquet", "csv", "text"] = "auto"
    features: Features
    label: str | None = None
    classes: tuple[str | int, ...] | None = None
    slices: tuple[str, ...] = ()
    rows_per_part: Positive = 4096
    actors: Positive = 1
    cpus_per_actor: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _splits_leave_rows(self) -> Self:
        shares = [s for s in (self.validation, self.test) if isinstance(s, float)]
        if sum(shares) >= 0.9:
            raise ValueError("validation and test together take 0.9 or more of the rows; leave some to train on")
        return self


class Teacher(Part):
    """The teacher: its model, and how to train it (leave ``train`` out for a teacher that is brought).

    ``cost`` declares what one that is brought has cost.
    """

    model: Model
    train: Train | None = None
    seed: int = 0
    cost: TeacherCost | None = None

    @model_validator(mode="after")
    def _can_teach(self) -> Self:
        if self.model.from_teacher:
            raise ValueError("a teacher can't be cut from a teacher; name its own model")
        if self.train is None and self.model.kind in ("config", "mlp", "cnn"):
            raise ValueError(f"a {self.model.kind} teacher starts untrained: give teacher.train")
        if self.train is not None and self.cost is not None:
            raise ValueError("cost is for a teacher that is brought; what training this one costs is measured")
        return self


class Student(Part):
    """The student, and how both it and the no-teacher baseline of equal budget are trained.

    With ``lora`` the model stays as it starts, and adapters are trained on it.
    """

    model: Model
    lora: Lora | None = None
    train: Train

    @model_validator(mode="after")
    def _lora_has_a_start(self) -> Self:
        kind = self.model.kind
        if self.lora is not None and not (kind in ("hf", "gguf") or self.model.from_teacher):
            raise ValueError(
                f"lora adapts a Hugging Face model that is trained already (hf, gguf, init_from_teacher, "
                f"prune_teacher), not {kind}: remove student.lora, or train a model of these kinds"
            )
        return self


class Evaluate(Part):
    """Teacher, student and baseline on the held-out split, on the devices of the capture actors."""

    batch_tokens: Positive = 2048
    latency_repeats: Positive = 20


class Tracking(Part):
    """The MLflow server; without ``uri`` the one of ``MLFLOW_TRACKING_URI``, else a database beside the workdir."""

    uri: str | None = None
    experiment: str | None = None
    log_models: bool = True

    @field_validator("uri")
    @classmethod
    def _without_login(cls, uri: str | None) -> str | None:
        if uri is not None and _LOGIN.search(uri):
            # An error of our own: the usual one would show what it has found.
            raise SpecError(
                "tracking.uri holds a login, and specs are stored: leave it out, and set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, or all of the address as MLFLOW_TRACKING_URI"
            )
        return uri


class Cluster(Part):
    """The Ray cluster to join; without ``address`` an embedded one on this machine."""

    address: str | None = None
    cpus: Positive | None = None
    gpus: Annotated[int, Field(ge=0)] | None = None
