"""Retrainings on record in MLflow: settings, metrics, the objective's plot, and the model version itself as a pyfunc."""

from __future__ import annotations

import importlib.util
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import mtl
from mtl import portable
from mtl.config import Settings
from mtl.errors import ConfigError
from mtl.model import Model
from mtl.schema import INPUT_ID, MODEL_VERSION, OFFSET, USER_ID
from mtl.score import PREDICTION, STD
from mtl.tables import Tables

log = logging.getLogger("mtl")

# Of this machine and not of the model; and Spark's options may hold keys of a store.
_NOT_PARAMETERS = {"spark", "tables", "mlflow"}


def is_tracked(settings: Settings) -> bool:
    """Whether retrainings are recorded.

    Raises:
        ConfigError: they should be, and mlflow is not installed.
    """
    if settings.mlflow.tracking_uri and importlib.util.find_spec("mlflow") is None:
        raise ConfigError("mlflow.tracking_uri is set but mlflow is missing: pip install 'oracle-mtl[mlflow]'")
    return bool(settings.mlflow.tracking_uri)


def record(tables: Tables, settings: Settings, model: Model, report: Mapping[str, Any]) -> str | None:
    """Record a version that has been published; the run's id, or None where MLflow failed, for the version stands.

    Args:
        report: what ``retrain`` returns: numbers by name, and the objective by half-step.
    """
    # Here, for a retraining that is not recorded waits for neither.
    import mlflow
    from mlflow.exceptions import MlflowException

    from mtl.figures import plot_objective

    try:
        mlflow.set_tracking_uri(settings.mlflow.tracking_uri)
        mlflow.set_experiment(settings.mlflow.experiment)
        with mlflow.start_run(run_name=f"version {model.version}") as run:
            mlflow.set_tags({MODEL_VERSION: model.version, "tables.root": tables.root})
            mlflow.log_params(dict(_parameters(settings)))
            with tempfile.TemporaryDirectory() as folder:
                plot_objective(Path(folder) / "objective.png", report["objective"])
                mlflow.log_artifact(str(Path(folder) / "objective.png"))
                # Before the metrics: those of step 0 that a run has by then, MLflow logs a second time for the model.
                _log_model(tables, settings, model, Path(folder) / "model")
            mlflow.log_metrics({name: value for name, value in report.items() if isinstance(value, int | float)})
            for half_step, objective in enumerate(report["objective"]):
                mlflow.log_metric("objective", objective, step=half_step)
            return run.info.run_id
    except (MlflowException, OSError) as error:
        log.warning("mlflow: version %d is not recorded (%s)", model.version, " ".join(str(error).split()))
        return None


def _parameters(settings: Settings) -> Iterator[tuple[str, str]]:
    for section, values in settings.model_dump().items():
        if section not in _NOT_PARAMETERS:
            yield from ((f"{section}.{key}", str(value)) for key, value in values.items())


def _log_model(tables: Tables, settings: Settings, model: Model, folder: Path) -> None:
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    size, limit = portable.size_mb(tables, model), settings.mlflow.model_limit_mb
    if size > limit:
        log.info("mlflow: the model is not logged: its %.0f MB are more than mlflow.model_limit_mb", size)
        return
    portable.save_portable(tables, model, folder)
    source = Path(mtl.__file__).parent
    pyfunc.log_model(
        name="model",
        loader_module=portable.__name__,
        data_path=str(folder),
        code_paths=[str(source)] if source.is_dir() else None,  # a zip cannot be copied from
        pip_requirements=_requirements(),
        signature=ModelSignature(
            Schema(
                [
                    *(ColSpec(DataType.string, name) for name in (USER_ID, INPUT_ID)),
                    ColSpec(DataType.double, OFFSET, required=False),
                    *(ColSpec(DataType.string, name, required=False) for name in model.contexts),
                ]
            ),
            Schema([ColSpec(DataType.double, name) for name in (PREDICTION, STD)]),
        ),
    )


def _requirements() -> list[str]:
    """Said and not guessed: MLflow would import everything in a process of its own to find out."""
    try:
        own = requires("oracle-mtl") or ()
        with_spark = [line.partition(";")[0].strip() for line in own if re.search(r"""extra == ['"]spark['"]""", line)]
        return [line for line in own if "extra ==" not in line] + with_spark  # imported, and never started
    except PackageNotFoundError:
        return []
