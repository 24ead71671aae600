"""What a gang is sent to do: arms, each one model trained once. Plain data, so that it pickles small."""

from dataclasses import dataclass, field
from typing import Any

from cluster.files import Folder
from distill_jobs.spec import Lora, Model, Train
from distill_jobs.spec.capture import Capture
from distill_jobs.spec.distill import Loss, Moving, greatest
from distill_jobs.spec.features import MatchedFeatures
from distill_jobs.spec.gate import Gate
from distill_jobs.spec.reading import Mix, Reading
from distill_jobs.spec.teachers import Teachers


@dataclass(frozen=True)
class Arm:
    """One model trained once: the teacher, or with one seed the student, the no-teacher baseline, or what is as the
    student but for its gate (``gate-<name>``).

    ``alpha`` 0 trains on hard labels alone; then the soft targets aren't read. Without ``loss`` it is the forward KL,
    without ``gate`` the teacher as it is.
    """

    role: str
    seed: int
    folder: Folder
    model: Model
    train: Train
    alpha: Moving
    temperature: Moving
    digest: str
    inputs: dict[str, Any]
    loss: Loss | None = None
    standardise: bool = False
    gate: Gate | None = None
    lora: Lora | None = None
    features: MatchedFeatures | None = None

    @property
    def reads_soft(self) -> bool:
        """Whether anything that the teacher said counts at some step."""
        return greatest(self.alpha) > 0 or self.features is not None

    @property
    def teacher_layers(self) -> tuple[str, ...]:
        """Layers of the teacher whose features are read."""
        return self.features.layers if self.features else ()

    @property
    def gated(self) -> bool:
        """Whether a gate stands before the soft targets."""
        return self.gate is not None and self.gate.none is None and greatest(self.alpha) > 0

    @property
    def name(self) -> str:
        """The name of its run in MLflow: ``teacher``, or role and seed as in ``student/0``, ``gate-drop/0``."""
        return self.role if self.role == "teacher" else f"{self.role}/{self.seed}"


@dataclass(frozen=True)
class TrainTask:
    """Arms that one gang trains one after another.

    Attributes:
        data: the prepared data.
        store: the logit store to train from; None reads the prepared training split (the teacher has no teacher).
        teacher: the teacher's saved model, for students cut from it.
        cores, devices: what the whole gang holds, for the meter.
        reading: how parts are read.
        mix: further stores to train students and baselines from.
        teachers: the stores of several teachers over the same rows, where the job's own is not the only one.
        live: how the teacher runs beside the students, where it answers live and there is no ``store``.
        session: the name of the driver's run, to tell what others have used before it.
    """

    arms: tuple[Arm, ...]
    data: Folder
    store: Folder | None
    teacher: Folder | None
    cores: float
    devices: float
    reading: Reading = field(default_factory=Reading)
    mix: tuple[Mix, ...] = ()
    teachers: Teachers = field(default_factory=Teachers)
    live: Capture | None = None
    session: str = ""
