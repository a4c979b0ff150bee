"""MLflow: the database ``mlflow/mlflow.db`` in the run's directory, or the server or database that
the variable ``MLFLOW_TRACKING_URI`` names. Its experiment is normlab, or the one that
``MLFLOW_EXPERIMENT_NAME`` names.
"""

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from normlab.runs import RunDir
from normlab.trackers.base import hyperparameters, key

__all__ = ["LEAVES", "start"]

LEAVES = "mlflow"

ENDS = {"done": "FINISHED", "diverged": "FAILED"}
"""What it calls a run's end; one that has not come to it is KILLED."""

TAG = "normlab.run"
"""By which a run that goes on is found again."""


def start(run: RunDir, config: dict[str, Any]) -> "_MLflow":
    """See `normlab.trackers.base`. A new database takes some seconds to make."""
    return _MLflow(run, config)


class _MLflow:
    durable = True

    def __init__(self, run: RunDir, config: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if uri is None:
            place = run.path.resolve() / LEAVES
            place.mkdir(exist_ok=True)
            uri, artifacts = f"sqlite:///{place / 'mlflow.db'}", (place / "artifacts").as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(artifacts)
        known = self._client.search_runs([experiment], f"tags.`{TAG}` = '{key(run)}'")
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        made = self._client.create_run(experiment, run_name=run.id, tags={TAG: key(run)})
        self._id = made.info.run_id
        parameters = [Param(name, str(value)) for name, value in hyperparameters(config).items()]
        self._client.log_batch(self._id, params=parameters)

    def _experiment(self, artifacts: str | None) -> str:
        """The id of the experiment, which the first run makes."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "normlab")
        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=artifacts))

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 10**6
        metrics = [Metric(tag, value, now, epoch) for tag, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def end(self, status: str) -> None:
        self._client.set_terminated(self._id, ENDS.get(status, "KILLED"))
