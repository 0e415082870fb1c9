"""MLflow, as a file store: ``trackers/mlflow`` of a run folder."""

import os
import shutil
import time

from PIL import Image

from vipo.config.values import flattened
from vipo.tracking.tracker import Row, TrackedRun

# MLflow's own limits: of a batch, and of a parameter's text.
_MOST_PARAMETERS, _LONGEST = 100, 6000


class MLflow:
    """One run in a store of its own, made anew by each process of a resumed run: a store cannot take rows back."""

    def __init__(self, run: TrackedRun) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        for earlier in run.folder.iterdir():
            # MLflow makes `.trash` once for each place that it has seen.
            if not earlier.name.startswith("."):
                shutil.rmtree(earlier)
        # Before the import, which reads them: no reports of use, and files, which a server is not needed for.
        os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_ALLOW_FILE_STORE="true")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._status = Metric, "FINISHED"
        self._client = MlflowClient(tracking_uri=run.folder.resolve().as_uri())
        experiment = self._client.create_experiment(run.experiment)
        self._run = self._client.create_run(experiment, run_name=run.name).info.run_id
        parameters = [Param(key, str(value)[:_LONGEST]) for key, value in flattened(run.config)]
        for start in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(self._run, params=parameters[start : start + _MOST_PARAMETERS])
        for row in run.history:
            self.log(row)

    def log(self, row: Row) -> None:
        """One step of all values and pictures."""
        moment = int(1000 * time.time())
        metrics = [self._metric(name, value, moment, row.update) for name, value in row.values.items()]
        self._client.log_batch(self._run, metrics=metrics, synchronous=True)
        for name, path in row.pictures.items():
            with Image.open(path) as picture:
                self._client.log_image(self._run, picture, key=name, step=row.update, synchronous=True)

    def ended_early(self, stopped: bool) -> None:
        """The run failed, or was stopped."""
        self._status = "KILLED" if stopped else "FAILED"

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self._run, self._status)
