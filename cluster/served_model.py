"""The model as MLflow serves it ("models from code"): this file is copied beside the weights and run to load them.

``model_config["loader"]`` names a function ``module:function`` that takes the folder of the weights and returns a
callable ``(DataFrame, params | None) -> DataFrame``. Nothing is pickled; loading imports that module and no other.
"""

import importlib
from collections.abc import Callable
from typing import Any

import mlflow.models
import mlflow.pyfunc
import pandas

from cluster.errors import TrackingError

Predict = Callable[[Any, dict[str, Any] | None], Any]


def resolve(loader: str) -> Callable[[str], Predict]:
    """The function that ``module:function`` names; TrackingError where there is none."""
    module, colon, name = loader.partition(":")
    try:
        found = getattr(importlib.import_module(module), name) if colon else None
    except (ImportError, AttributeError, ValueError):
        found = None
    if not callable(found):
        raise TrackingError(f"the model's loader {loader!r} can't be imported; install the package that it belongs to")
    return found  # type: ignore[no-any-return]


class ServedModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """Hands every table of rows to what the loader returned."""

    def load_context(self, context: Any) -> None:
        self._predict = resolve(context.model_config["loader"])(context.artifacts["model"])

    def predict(self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> Any:  # noqa: ARG002
        return self._predict(model_input, params)


mlflow.models.set_model(ServedModel())
