"""The parts of a job spec that say how the teacher is captured. Imports neither torch nor ray."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from distill_jobs.spec.base import OneOf, Part, Positive, Precision, Share
from distill_jobs.spec.features import StoredFeatures

Most = tuple[Annotated[int, Field(ge=0)], Positive]
Actors = Positive | Most
"""A number of actors, or the fewest and the most, between which the pool follows the cluster."""


class Dense(Part):
    """The log-probability of every class: for classifiers and small vocabularies."""


class TopK(Part):
    """The k likeliest classes, with the mass of the rest."""

    k: Positive = 64


class Sampled(Part):
    """Draws from the teacher with their counts: unbiased, of few bytes."""

    draws: Annotated[int, Field(gt=0, le=255)] = 64


class Hybrid(Part):
    """The likeliest classes exactly, then draws that stand for the rest."""

    head: Positive = 48
    draws: Positive = 16


class Codec(OneOf):
    """How the teacher's distribution is stored; by default ``hybrid``, for up to 4,096 classes ``dense``."""

    what: ClassVar[str] = "codec"
    dense: Dense | None = None
    topk: TopK | None = None
    sampled: Sampled | None = None
    hybrid: Hybrid | None = None


class ActorKind(Part):
    """Actors of one kind, where a capture runs on several (``capture.kinds``): say, 8 on H100 and 16 on L4.

    ``accelerator`` is Ray's name of its type (H100, L4, A100 …); ``resources`` are custom resources of the cluster's
    nodes; ``batch_tokens`` defaults to that of the capture.
    """

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    actors: Actors = 1
    cpus_per_actor: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    accelerator: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}
    batch_tokens: Positive | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _check_actors(self.actors, self.gpus_per_actor)
        if self.accelerator and not self.gpus_per_actor:
            raise ValueError(f"{self.name} asks for an {self.accelerator} but has no gpus_per_actor")
        return self

    @property
    def least(self) -> int:
        """Actors that must find room before the capture begins."""
        return self.actors if isinstance(self.actors, int) else self.actors[0]

    @property
    def most(self) -> int:
        return self.actors if isinstance(self.actors, int) else self.actors[1]


class Capture(Part):
    """The teacher's pass over the training rows by a pool of actors. ``seed`` fixes what codecs with draws draw.

    ``actors`` is a number or [least, most]; ``kinds`` takes the place of ``actors``, ``cpus_per_actor`` and
    ``gpus_per_actor`` where actors of several kinds work side by side. From 2 ``gpus_per_actor`` on the teacher's
    layers are spread over them. ``max_quarantined`` is how many rows that the teacher can't score the capture puts up
    with: a count, or a share of all rows. ``autocast`` keeps the weights in fp32 and computes in ``precision``;
    ``compile`` compiles the teacher; ``chunk_positions`` go through its output head at once (0: its own whole forward;
    by default as many as suit the device). ``fidelity_positions`` held-back positions show what the codec keeps of the
    teacher; 0 leaves that out. ``features`` keeps what layers of the teacher give, too.
    """

    codec: Codec | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    actors: Actors = 1
    cpus_per_actor: Annotated[float, Field(gt=0)] = 1.0
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0.0
    kinds: tuple[ActorKind, ...] = ()
    batch_tokens: Positive = 2048
    chunk_positions: Annotated[int, Field(ge=0)] | None = None
    precision: Precision = "auto"
    autocast: bool = False
    compile: bool = False
    retries: Annotated[int, Field(ge=0)] = 3
    max_quarantined: Annotated[int, Field(ge=0)] | Share = 0.01
    fidelity_positions: Annotated[int, Field(ge=0, le=1 << 20)] = 512
    features: StoredFeatures | None = None

    @model_validator(mode="after")
    def _layers_can_be_heard(self) -> Self:
        if self.features and self.compile:
            raise ValueError("features listen to single layers, which are gone once compiled: set compile to false")
        return self

    @model_validator(mode="after")
    def _kinds_stand_alone(self) -> Self:
        _check_actors(self.actors, self.gpus_per_actor)
        if not self.kinds:
            return self
        both = {"actors", "cpus_per_actor", "gpus_per_actor"} & self.model_fields_set
        if both:
            raise ValueError(f"kinds says which actors there are: remove {', '.join(sorted(both))} beside it")
        names = [kind.name for kind in self.kinds]
        if len(set(names)) != len(names):
            raise ValueError("two kinds have the same name")
        if not any(kind.least for kind in self.kinds):
            raise ValueError("no kind has a least number of actors above 0: nobody would have to be there")
        return self

    @property
    def crews(self) -> tuple[ActorKind, ...]:
        """The kinds of actors; a single one named ``actors`` where ``kinds`` is not given."""
        given = self.kinds or (
            ActorKind(
                name="actors",
                actors=self.actors,
                cpus_per_actor=self.cpus_per_actor,
                gpus_per_actor=self.gpus_per_actor,
            ),
        )
        return tuple(kind.model_copy(update={"batch_tokens": kind.batch_tokens or self.batch_tokens}) for kind in given)

    @property
    def arithmetic(self) -> str:
        """What the teacher computes in, for the store's contract."""
        return f"{self.precision}+autocast" if self.autocast else self.precision

    def quarantine_limit(self, rows: int) -> int:
        """How many of ``rows`` may be put into quarantine."""
        return self.max_quarantined if isinstance(self.max_quarantined, int) else int(self.max_quarantined * rows)


def _check_actors(actors: int | tuple[int, int], gpus: float) -> None:
    if not isinstance(actors, int) and actors[0] > actors[1]:
        raise ValueError(f"actors are [least, most], but {actors[0]} is more than {actors[1]}")
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"gpus_per_actor is a fraction of one GPU or a whole number, not {gpus:g}")
