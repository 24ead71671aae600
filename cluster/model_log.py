"""One model into MLflow, weights copied once, so that ``mlflow.pyfunc.load_model`` loads it and nothing is pickled."""

import importlib.metadata
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KEY_TAG = "tracking.key"
SERVED_MODEL = Path(__file__).with_name("served_model.py")


def log_model(
    client: Any,
    experiment_id: str,
    run_id: str | None,
    folder: Path,
    name: str,
    *,
    loader: str,
    packages: Sequence[str],
    parameters: Mapping[str, Any],
    registered: str | None,
    key: str,
    again: bool,
) -> None:
    """Log the model in ``folder`` as an output of ``run_id``; see ``Run.model`` for the arguments.

    It carries ``key`` as a tag. ``again``: an earlier try may have made it, and is gone on with.

    Its code is ``served_model.py``, which reads ``loader`` from the model's config. No signature is inferred by
    running the model; ``parameters`` alone are declared, since MLflow drops those it doesn't know.
    """
    import mlflow.entities
    import mlflow.models
    import mlflow.pyfunc

    logged = _begun(client, experiment_id, key) if again else None
    if logged is None:
        logged = client.create_logged_model(experiment_id, name=name, source_run_id=run_id, tags={KEY_TAG: key})
    if not again or logged.model_id not in _outputs(client, run_id):  # a second time would be refused
        client.log_outputs(run_id, [mlflow.entities.LoggedModelOutput(logged.model_id, step=0)])
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it would like an input example
        staged, empty = Path(scratch) / "staged", Path(scratch) / "model"
        empty.mkdir()
        mlflow.pyfunc.save_model(
            path=staged,
            python_model=str(SERVED_MODEL),
            artifacts={"model": str(empty)},
            model_config={"loader": loader},
            pip_requirements=_pins(["mlflow", *packages]),
            signature=mlflow.models.infer_signature(params=dict(parameters)) if parameters else None,
            mlflow_model=mlflow.models.Model(
                artifact_path=logged.artifact_location,
                run_id=run_id,
                model_id=logged.model_id,
                model_uuid=logged.model_id,
            ),
        )
        client.log_model_artifacts(logged.model_id, str(staged))
    # The weights go straight to their place: by way of save_model they would be copied twice.
    client.log_model_artifacts(logged.model_id, str(folder), "artifacts/model")
    client.finalize_logged_model(logged.model_id, "READY")
    if registered:
        _register(client, registered, logged, run_id)


def _begun(client: Any, experiment_id: str, key: str) -> Any:
    """The model that was made with this key, if there is one."""
    found = client.search_logged_models([experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    return next(iter(found), None)


def _outputs(client: Any, run_id: str | None) -> list[str]:
    outputs = client.get_run(run_id).outputs
    return [each.model_id for each in outputs.model_outputs] if outputs is not None else []


def tag_versions(client: Any, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of all versions in the registry that a run's models are."""
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        for key, value in tags.items():
            client.set_model_version_tag(version.name, version.version, key, value)


def _register(client: Any, name: str, logged: Any, run_id: str | None) -> None:
    try:
        client.create_registered_model(name)
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise
    # By its place: a server doesn't tell which model a version is.
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    if any(each.name == name and each.source == logged.artifact_location for each in versions):
        return
    client.create_model_version(name, logged.artifact_location, run_id=run_id, model_id=logged.model_id)


def _pins(packages: Sequence[str]) -> list[str]:
    """Requirements pinned to what is installed; a local build's mark (``+cpu``) is dropped, since no index has it."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in packages]
