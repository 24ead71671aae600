"""The whole job: what is distilled from what, and the rules that join the parts."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from distill_jobs.spec.audit import Audit
from distill_jobs.spec.base import Part
from distill_jobs.spec.capture import Capture
from distill_jobs.spec.costs import Costs
from distill_jobs.spec.distill import Distill
from distill_jobs.spec.features import known
from distill_jobs.spec.goal import Accuracy, Goal
from distill_jobs.spec.parts import Cluster, Data, Evaluate, Student, Teacher, Tracking
from distill_jobs.spec.reading import Reading
from distill_jobs.spec.train import Train
from distill_jobs.spec.tune import Baseline, Tune


class Job(Part):
    """A distillation job, as ``distill run SPEC`` takes it."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    task: Literal["causal_lm", "classification"]
    workdir: str
    data: Data
    teacher: Teacher
    student: Student
    distill: Distill = Distill()
    baseline: Baseline | None = None
    capture: Capture = Capture()
    reading: Reading = Reading()
    tune: Tune | None = None
    evaluate: Evaluate = Evaluate()
    audit: Audit = Audit()
    costs: Costs = Costs()
    goal: Goal = Goal(accuracy=Accuracy())
    tracking: Tracking = Tracking()
    cluster: Cluster = Cluster()
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)

    @model_validator(mode="after")
    def _task_fits_features(self) -> Self:
        kind = self.data.features.kind
        if (self.task == "causal_lm") != (kind == "documents"):
            fitting = "documents" if self.task == "causal_lm" else "tabular, text or image"
            raise ValueError(f"task {self.task} takes {fitting} features, but data.features has {kind}")
        if self.task == "classification" and self.data.label is None:
            raise ValueError("classification needs data.label, the name of the column with the right class")
        if self.task == "causal_lm" and (self.data.label or self.data.classes):
            raise ValueError("causal_lm learns from the text itself: remove data.label and data.classes")
        return self

    @model_validator(mode="after")
    def _models_fit_features(self) -> Self:
        kind = self.data.features.kind
        for role, model in (("teacher", self.teacher.model), ("student", self.student.model)):
            if model.kind == "mlp" and kind not in ("tabular", "image"):
                raise ValueError(f"{role}.model.mlp takes tabular or image features, not {kind}")
            if model.kind == "cnn" and kind != "image":
                raise ValueError(f"{role}.model.cnn takes image features, not {kind}")
            if model.kind == "gguf" and kind != "documents":
                raise ValueError(f"{role}.model.gguf is a language model and takes documents, not {kind}")
        start = self.student.model
        if start.from_teacher and self.teacher.model.kind in ("mlp", "cnn", "factory"):
            raise ValueError(
                f"student.model.{start.kind} takes Hugging Face teachers only, and the teacher is a "
                f"{self.teacher.model.kind} model: give the student a model of its own"
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds holds a seed twice")
        return self

    @model_validator(mode="after")
    def _audit_fits(self) -> Self:
        for names in self.audit.intersections:
            unknown = [name for name in names if name not in self.data.slices]
            if unknown or len(set(names)) < len(names):
                what = f"{unknown[0]}, which is not one of data.slices" if unknown else "a column twice"
                raise ValueError(f"audit.intersections names {what}")
        language = self.task == "causal_lm"
        if language and self.audit.positive is not None:
            raise ValueError("audit.positive names a class, and a causal_lm has none: remove it")
        if self.audit.max_gap is not None and not self.data.slices:
            raise ValueError(
                "audit.max_gap limits gaps between groups, and data.slices names no column to find any in: give one, "
                "or remove audit.max_gap"
            )
        limits = self.audit.max_gap if isinstance(self.audit.max_gap, dict) else {}
        for name in limits:
            if (name == "nll_difference") != language:
                raise ValueError(f"audit.max_gap limits {name}, which is not measured for {self.task}")
        return self

    @model_validator(mode="after")
    def _loss_fits(self) -> Self:
        codec = self.capture.codec
        refused = self.refusal(codec.kind, codec.chosen.model_dump()) if codec else None
        if refused:
            raise ValueError(refused)
        features = self.distill.features
        unserved = features.refusal(self.capture.features) if features else None
        if unserved:
            raise ValueError(unserved)
        if self.distill.follows_learning_rate and self.student.train.schedule == "constant":
            raise ValueError(
                "distill has a wsd schedule, which follows the learning rate down, but student.train.schedule is "
                "constant: choose another for one of them"
            )
        return self

    @model_validator(mode="after")
    def _gates_fit(self) -> Self:
        own = self.distill.gate.of(self.task)
        for gate in self.audit.gates:
            if gate.of(self.task) == own:
                raise ValueError(
                    f"audit.gates names {gate.kind}, which is distill.gate: the student is that arm already"
                )
            clash = gate.clash(self.distill.loss.kind, self.distill.standardise)
            if clash:
                raise ValueError(f"audit.gates: {clash}")
        return self

    def has(self, settings: dict[str, Any], role: str) -> bool:
        """Whether ``student`` or ``baseline`` has these settings, by dotted path, as ``tune/trials.json`` has them."""
        tree = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        if role == "baseline":
            tree["student"]["train"] = self.baseline_train.model_dump(mode="json", exclude_none=True)
        return bool(settings) and all(_at(tree, path) == value for path, value in settings.items())

    @property
    def taught(self) -> dict[str, Distill]:
        """By role, what all that learn from the teacher learn by: the student, and the arms that compare gates."""
        arms = {f"gate-{gate.kind}": self.distill.behind(gate) for gate in self.audit.gates}
        return {"student": self.distill, **arms}

    @property
    def arms(self) -> list[tuple[str, int]]:
        """Role and seed of all models that are no teacher: students and baselines, then the arms that compare gates."""
        pairs = [(role, seed) for seed in self.seeds for role in ("student", "baseline")]
        return pairs + [(role, seed) for role in self.taught if role != "student" for seed in self.seeds]

    def refusal(self, codec: str, arguments: dict[str, Any], classes: int | None = None) -> str | None:
        """Why a store of this codec, and of so many classes, can't serve one of them; None where it can."""
        found = (distill.refusal(codec, arguments, classes) for distill in self.taught.values())
        return next((refused for refused in found if refused), None)

    @model_validator(mode="after")
    def _baseline_trains(self) -> Self:
        try:
            self.baseline_train  # noqa: B018
        except ValidationError as error:
            found = error.errors()[0]
            where = ".".join(("baseline", "train", *map(str, found["loc"])))
            said = found["msg"].removeprefix("Value error, ")
            if found["type"] == "extra_forbidden" and len(found["loc"]) == 1:
                said = f"there is no such key; student.train {known(str(found['loc'][0]), Train.model_fields)}"
            raise ValueError(f"{where}: {said}") from None
        return self

    @model_validator(mode="after")
    def _metric_fits(self) -> Self:
        if self.task == "causal_lm" and self.tune is not None and self.tune.metric == "accuracy":
            raise ValueError("tune.metric accuracy is for classification; a language model is tuned by its nll")
        return self

    @property
    def baseline_train(self) -> Train:
        """How the baseline is trained."""
        return self.baseline.train_of(self.student.train) if self.baseline is not None else self.student.train


def _at(tree: Any, path: str) -> Any:
    for step in path.split("."):
        tree = tree.get(step) if isinstance(tree, dict) else None
    return tree
