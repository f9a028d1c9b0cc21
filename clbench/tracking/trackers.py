"""Experiment trackers that a run's numbers are sent to: TensorBoard, MLflow, Weights & Biases.

Each is a class with three methods (`Tracker`), registered in the entry points `clbench.trackers`,
so another package can add one. The packages are extras: `pip install "clbench[track]"`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from clbench.errors import ClbenchError

End = Literal["finished", "stopped", "failed"]
"""How a run ended."""
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""How often and how many seconds a run waits for a server of MLflow; its own way, minutes pass
before it gives up on one that is down. What the environment says has precedence."""
EXTRA = 'pip install "clbench[track]"'


class Tracker(Protocol):
    """Where the numbers of one run go. A method that raises ends the tracking, never the run."""

    def __init__(self, folder: Path) -> None:
        """Make a tracker.

        Args:
            folder: for its files, where it keeps them on this machine.
        """

    def begin(self, name: str, config: Mapping[str, str]) -> None:
        """A run begins, or goes on.

        Args:
            name: course/strategy/run id; the same when the run goes on.
            config: settings, flat, as text.
        """

    def log(self, values: Mapping[str, float], at: int) -> None:
        """Take numbers.

        Args:
            values: name → number.
            at: updates of the whole course that came before.
        """

    def end(self, how: End = "finished") -> None:
        """The run has ended.

        Args:
            how: finished; stopped, which may go on; failed.
        """


def need(package: str, name: str) -> None:
    """Refuse a tracker whose package is not installed.

    Args:
        package: to import.
        name: of the tracker.

    Raises:
        ClbenchError: it is not there.
    """
    if importlib.util.find_spec(package) is None:
        raise ClbenchError(
            f"the tracker {name} needs a package that is not installed",
            where=f"--track {name}",
            expected=package,
            next_step=EXTRA,
        )


class TensorBoard:
    """Event files below the folder; look at them with `tensorboard --logdir FOLDER`."""

    def __init__(self, folder: Path) -> None:
        need("tensorboard", "tensorboard")
        self.folder = folder
        self.writer: Any = None

    def begin(self, name: str, config: Mapping[str, str]) -> None:
        """See `Tracker.begin`."""
        from torch.utils.tensorboard import SummaryWriter

        # a run that goes on sends all once more: what files of earlier attempts hold is passed over
        self.writer = SummaryWriter(str(self.folder / name), purge_step=0)
        rows = "\n".join(f"| {key} | {value} |" for key, value in config.items())
        self.writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}")

    def log(self, values: Mapping[str, float], at: int) -> None:
        """See `Tracker.log`."""
        for key, value in values.items():
            self.writer.add_scalar(key, value, at)

    def end(self, how: End = "finished") -> None:
        """See `Tracker.end`; TensorBoard knows no end."""
        self.writer.close()


class MLflow:
    """A run of MLflow, of the experiment `clbench`, at MLFLOW_TRACKING_URI or in the folder."""

    def __init__(self, folder: Path) -> None:
        need("mlflow", "mlflow")
        self.folder = folder

    def begin(self, name: str, config: Mapping[str, str]) -> None:
        """See `Tracker.begin`."""
        for setting, value in PATIENCE.items():
            os.environ.setdefault(setting, value)
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # needs no database
            mlflow.set_tracking_uri(self.folder.absolute().as_uri())
        mlflow.set_experiment("clbench")
        earlier = mlflow.search_runs(
            filter_string=f"tags.`clbench.run` = '{name}'", output_format="list"
        )
        mlflow.start_run(
            run_id=earlier[0].info.run_id if earlier else None,
            run_name=name,
            tags={"clbench.run": name},
        )
        if not earlier:
            mlflow.log_params(dict(config))

    def log(self, values: Mapping[str, float], at: int) -> None:
        """See `Tracker.log`."""
        import mlflow

        # MLflow allows no brackets or commas in names
        mlflow.log_metrics({_plain(key): value for key, value in values.items()}, step=at)

    def end(self, how: End = "finished") -> None:
        """See `Tracker.end`."""
        import mlflow

        mlflow.end_run({"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[how])


class WandB:
    """A run of Weights & Biases, of the project `clbench`; WANDB_MODE=offline keeps it here."""

    def __init__(self, folder: Path) -> None:
        need("wandb", "wandb")
        self.folder = folder
        self.run: Any = None

    def begin(self, name: str, config: Mapping[str, str]) -> None:
        """See `Tracker.begin`."""
        import wandb

        self.folder.mkdir(parents=True, exist_ok=True)
        if wandb.run is not None:  # of a tracking that broke: it would be given out once more
            wandb.finish(exit_code=1)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "clbench"), id=name.replace("/", "-"),
            name=name, config=dict(config), dir=str(self.folder), resume="allow",
        )  # fmt: skip

    def log(self, values: Mapping[str, float], at: int) -> None:
        """See `Tracker.log`."""
        self.run.log(dict(values), step=at)

    def end(self, how: End = "finished") -> None:
        """See `Tracker.end`; a run that was stopped is a failed one to W&B until it goes on."""
        self.run.finish(exit_code=0 if how == "finished" else 1)


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_-./ " else "_" for c in name)
