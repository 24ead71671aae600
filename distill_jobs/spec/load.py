"""A YAML file becomes a ``Job``, or one clear sentence about every mistake in it."""

import difflib
import json
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from distill_jobs.errors import SpecError
from distill_jobs.spec.job import Job


def load_job(path: str | Path, overrides: list[str] | None = None) -> Job:
    """Read the spec at ``path``; ``overrides`` are ``dotted.path=value`` strings, the value in YAML.

    Local paths inside it count from the folder in which the command runs, and come back absolute.

    Raises:
        SpecError: the file is missing, is not YAML, or does not fit the schema.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SpecError(f"can't read the spec {path}: {why}") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    for override in overrides or []:
        _apply(tree, override)
    return parse_job(tree, str(path))


def parse_job(tree: Any, origin: str = "the spec") -> Job:
    """Check a tree of plain values against the schema and make its local paths absolute."""
    if not isinstance(tree, dict):
        raise SpecError(f"{origin} must be a mapping with keys such as name, task, data, teacher and student")
    try:
        # By way of JSON, so that strict types still take YAML's lists for tuples.
        job = Job.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise SpecError(f"{origin}: {_sentence(error)}") from None
    return _absolute(job)


def _apply(tree: Any, override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise SpecError(f"--set takes path=value, for example distill.temperature=2, not {override!r}")
    try:
        given = yaml.safe_load(value)
    except yaml.YAMLError:
        raise SpecError(f"--set {name}: {value!r} is not valid YAML") from None
    if not place(tree, name, given):
        raise SpecError(f"--set {name}: there is no such place in the spec")


def place(tree: Any, path: str, value: Any) -> bool:
    """Put a value at the dotted ``path`` of a spec's tree; False where there can be no such place."""
    *parents, leaf = path.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node[leaf] = value
    return isinstance(node, dict)


def _sentence(error: ValidationError) -> str:
    found: dict[str, str] = {}
    for item in error.errors():
        # Inside a union pydantic adds the member's name to the location: drop what is no key of the spec.
        where = ".".join(str(step) for step in _keys(item["loc"])) or "the spec"
        if item["type"] == "extra_forbidden":
            message = f"unknown key {where}{_nearest(item['loc'])}"
        elif item["type"] == "missing":
            message = f"{where} is missing"
        else:
            message = f"{where}: {item['msg'].removeprefix('Value error, ')} (found {_short(item['input'])})"
        found.setdefault(where, message)
    return "; ".join(found.values())


def _keys(loc: tuple[str | int, ...]) -> list[str | int]:
    names = ("str", "float", "int")
    return [step for step in loc if isinstance(step, int) or (step.isidentifier() and step not in names)]


def _nearest(loc: tuple[str | int, ...]) -> str:
    model: Any = Job
    for step in _keys(loc[:-1]):
        if not isinstance(step, int):
            model = _model_in(model.model_fields[step].annotation) if step in _fields(model) else None
    names = [field.alias or name for name, field in _fields(model).items()]
    close = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known keys here: {', '.join(names)}"


def _fields(model: Any) -> dict[str, Any]:
    return dict(getattr(model, "model_fields", {}))


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _absolute(job: Job) -> Job:
    def local(path: str) -> str:
        return path if "://" in path or Path(path).is_absolute() else str(Path.cwd() / path)

    def paths(value: Any) -> Any:
        if isinstance(value, str):
            return local(value)
        return tuple(local(p) for p in value) if isinstance(value, tuple) else value

    def model(value: Any) -> Any:
        changes = {name: local(path) for name in ("gguf", "saved") if (path := getattr(value, name)) is not None}
        if value.hf is not None and Path(value.hf).exists():
            changes["hf"] = local(value.hf)
        return value.model_copy(update=changes)

    data = job.data.model_copy(
        update={name: paths(getattr(job.data, name)) for name in ("train", "validation", "test")}
    )
    teacher = job.teacher.model_copy(update={"model": model(job.teacher.model)})
    student = job.student.model_copy(update={"model": model(job.student.model)})
    costs = job.costs.model_copy(update={"prices": paths(job.costs.prices)})
    return job.model_copy(
        update={"workdir": local(job.workdir), "data": data, "teacher": teacher, "student": student, "costs": costs}
    )
