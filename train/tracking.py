"""Log experiments to MLflow, and keep their numbers in git.

Knows runs, params, metrics and the model registry; knows nothing of how numbers come about. Where the store is away it
says so once, and training goes on. Its command line, `export | import`, is that of `train.runs`.
"""

import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import pyarrow.parquet
import yaml
from matplotlib.figure import Figure
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from copydesk.encoder import sha256_of
from copydesk.registry import publish, tracking_uri
from train.config import Experiment

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # mlflow reads it while it is imported

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.utils import mlflow_tags, validation

log = logging.getLogger(__name__)

EXPERIMENT = "copydesk"
"""The one MLflow experiment."""
SPLITS = ("train", "validation", "test")
_PATIENCE = {  # a server that is gone costs seconds, not the minutes of MLflow's own defaults
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
_T = TypeVar("_T")


def start_run(experiment: Experiment, *, watch_system: bool = True) -> "Run":
    """Start the MLflow run of an experiment; `fit/run.json` keeps its id. While it runs, the machine may be watched."""
    if int(os.environ.get("RANK", "0")):  # torchrun: the first process speaks for all
        return Run(None, "")
    record = _record(experiment)
    record.unlink(missing_ok=True)  # if the store is away, later stages must not continue the run before
    try:
        store, experiment_id = connect()
        source = {mlflow_tags.MLFLOW_SOURCE_NAME: "train/fit.py", mlflow_tags.MLFLOW_SOURCE_TYPE: "LOCAL"}
        tags = {"kind": experiment.fit.kind, **source, **git_tags()}
        run_id = store.create_run(experiment_id, run_name=experiment.name, tags=tags).info.run_id
    except Exception as error:  # noqa: BLE001 (hours of training are worth more than their log)
        return _without_store(error)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"run_id": run_id}) + "\n", "utf-8")
    run = Run(store, run_id)
    run.log_settings(experiment)
    if watch_system:
        run.watch_system()
    return run


def continue_run(experiment: Experiment) -> "Run":
    """Continue the run that `start_run` started; where the store does not know it, say so and start one."""
    if int(os.environ.get("RANK", "0")):
        return Run(None, "")
    try:
        run_id = json.loads(_record(experiment).read_text("utf-8"))["run_id"]
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("%s names no MLflow run to continue: starting a new one", _record(experiment))
        return start_run(experiment, watch_system=False)
    try:
        store, _ = connect()
        stored = store.get_run(run_id)
        store.update_run(run_id, status="RUNNING")
    except Exception as error:  # noqa: BLE001 (as above)
        # The second code is that of a deleted run.
        if getattr(error, "error_code", None) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            log.warning("the MLflow store %s has no run %s: starting a new one", tracking_uri(), run_id)
            return start_run(experiment, watch_system=False)
        return _without_store(error)
    run = Run(store, run_id)
    run.log_settings(experiment, before=stored.data.params)
    return run


def resume_run(experiment: Experiment) -> "Run":
    """Continue the run of a training that was broken off."""
    return continue_run(experiment)


def _without_store(error: Exception) -> "Run":
    log.warning("the MLflow store %s is away, going on without it: %s", tracking_uri(), error)
    return Run(None, "")


class Run:
    """One MLflow run, or silence where the store is away: no failure to log reaches the caller."""

    def __init__(self, store: MlflowClient | None, run_id: str) -> None:
        """Use `start_run` or `continue_run`."""
        self.run_id = run_id
        """Empty where the store was away from the start."""
        self._store = store
        self._monitor: SystemMetricsMonitor | None = None
        self._refused: set[str] = set()

    def __enter__(self) -> Self:
        """Return the run."""
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        """Finish the run, as failed after an exception."""
        self.finish("FAILED" if kind else "FINISHED")

    def log_inputs(self, prepared: Path) -> None:
        """Log name, hash and number of rows of each prepared split."""
        files = [prepared / kind / f"{split}.parquet" for kind in ("pages", "articles") for split in SPLITS]
        self._try("log_inputs", lambda store: store.log_inputs(self.run_id, [_dataset_of(file) for file in files]))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers by name, e.g. `validation/macro_f1`, of a training step or of the whole run."""
        self._try("log_metrics", lambda store: write_metrics(store, self.run_id, metrics, step=step or 0))

    def log_figure(self, figure: Figure, file: str) -> None:
        """Store a figure, e.g. as `figures/confusion.png`."""
        self._try("log_figure", lambda store: store.log_figure(self.run_id, figure, file))

    def log_text(self, text: str, file: str) -> None:
        """Store a text."""
        self._try("log_text", lambda store: store.log_text(self.run_id, text, file))

    def log_artifacts(self, folder: Path, name: str) -> None:
        """Store the files of a folder under a name."""
        self._try("log_artifacts", lambda store: store.log_artifacts(self.run_id, str(folder), name))

    def log_table(self, rows: Sequence[Mapping[str, Any]], file: str) -> None:
        """Store a table, e.g. as `tables/labels.json`, in place of one of that name."""
        self._try("log_table", lambda store: _write_table(store, self.run_id, rows, file))

    def log_model(self, folder: Path, *, example: str, register: bool) -> str | None:
        """Store a model folder as a model that MLflow can load and serve.

        Args:
            folder: as `copydesk.saved` wrote it; its manifest names the model.
            example: a page, HTML or text.
            register: make it a version of the registered model of that name, with the alias `challenger`.

        Returns:
            Its address, `models:/MODEL_ID`; None where the store did not take it.
        """
        return self._try(
            "log_model",
            lambda store: publish(folder, example=example, store=store, run_id=self.run_id, register=register),
        )

    def log_settings(self, experiment: Experiment, *, before: Mapping[str, str] | None = None) -> None:
        """Log all settings as params; what differs from params that stand already as a tag, for they cannot change."""
        settings = flatten(experiment.model_dump(mode="json"))
        changed = {name: value for name, value in settings.items() if before and before.get(name, value) != value}
        if changed:
            log.warning("settings changed since MLflow run %s began: %s", self.run_id, ", ".join(changed))
            self._try("log_settings", lambda store: store.set_tag(self.run_id, "changed", json.dumps(changed)))
        if before is None:
            self._try("log_settings", lambda store: write_params(store, self.run_id, settings))
        config = yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        self.log_text(config, "config_changed.yaml" if changed else "config.yaml")

    def watch_system(self) -> None:
        """Log processor, memory, disk and network until the run is finished."""
        self._monitor = self._try(
            "watch_system", lambda store: SystemMetricsMonitor(self.run_id, tracking_uri=store.tracking_uri)
        )
        if self._monitor is not None:
            self._monitor.start()

    def finish(self, status: Literal["FINISHED", "FAILED"] = "FINISHED") -> None:
        """End the run; what is called after it does nothing."""
        if self._monitor is not None:
            self._monitor.finish()
        self._try("finish", lambda store: store.set_terminated(self.run_id, status))
        self._store = self._monitor = None

    def _try(self, what: str, call: Callable[[MlflowClient], _T]) -> _T | None:
        if self._store is None:
            return None
        try:
            return call(self._store)
        except Exception as error:  # noqa: BLE001 (as above)
            if not _has(self._store, self.run_id):
                self._store = None
                _without_store(error)
            elif what not in self._refused:
                self._refused.add(what)
                log.warning("MLflow did not take %s, further such failures are not reported: %s", what, error)
            return None


class _Callback(TrainerCallback):
    def __init__(self, run: Run) -> None:
        self.run = run

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002 (the Trainer's signature)
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            numbers = {name: value for name, value in kwargs["logs"].items() if isinstance(value, int | float)}
            self.run.log_metrics({metric_name(name): numbers[name] for name in numbers}, state.global_step)


def trainer_callback(run: Run) -> TrainerCallback:
    """Return a callback that logs what the Trainer logs, under `metric_name`s."""
    return _Callback(run)


def metric_name(name: str) -> str:
    """Translate the Trainer's names: `loss` is `train/loss`, `eval_loss` is `validation/loss`."""
    if name == "train_loss":
        return "train/mean_loss"  # of all steps: as train/loss it would be the curve's last point
    prefix, _, rest = name.partition("_")
    split = {"train": "train", "eval": "validation", "test": "test"}.get(prefix)
    return f"{split}/{rest}" if split else f"train/{name}"


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Return settings by dotted name, e.g. `prepare.pages.0.name`, cut to MLflow's limits.

    A list of plain values is one setting.
    """
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        children = list(enumerate(value))
    if not children:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        return {_key(prefix): text[: validation.MAX_PARAM_VAL_LENGTH]}
    flat: dict[str, str] = {}
    for name, child in children:
        flat |= flatten(child, f"{prefix}.{name}" if prefix else str(name))
    return flat


def git_tags() -> dict[str, str]:
    """Return the commit of the working folder and whether it was changed since; nothing outside a repository."""
    try:
        commit, changes = (
            subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {mlflow_tags.MLFLOW_GIT_COMMIT: commit, mlflow_tags.MLFLOW_GIT_DIRTY: "true" if changes else "false"}


def connect() -> tuple[MlflowClient, str]:
    """Return the store and the id of our experiment in it, made where it is missing."""
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    uri = tracking_uri()
    store = MlflowClient(tracking_uri=uri)
    if found := store.get_experiment_by_name(EXPERIMENT):
        return store, found.experiment_id
    # A server decides by itself where artifacts go.
    location = Path("mlartifacts").absolute().as_uri() if uri.startswith("sqlite:") else None
    return store, store.create_experiment(EXPERIMENT, artifact_location=location)


def write_params(store: MlflowClient, run_id: str, params: Mapping[str, str]) -> None:
    """Write params in as many calls as MLflow wants."""
    entities = [Param(name, value) for name, value in params.items()]
    for start in range(0, len(entities), validation.MAX_PARAMS_TAGS_PER_BATCH):
        store.log_batch(run_id, params=entities[start : start + validation.MAX_PARAMS_TAGS_PER_BATCH])


def write_metrics(store: MlflowClient, run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
    """Write metrics of one step."""
    now = int(time.time() * 1000)
    store.log_batch(run_id, [Metric(_key(name), float(value), now, step) for name, value in metrics.items()])


def dataset_input(name: str, *, sha256: str, context: str, source: str, num_rows: int | None = None) -> DatasetInput:
    """Describe a file that a run read."""
    dataset = Dataset(
        name=name,
        digest=sha256[: validation.MAX_DATASET_DIGEST_SIZE],
        source_type="local",
        source=json.dumps({"uri": source}),
        profile=json.dumps({"num_rows": num_rows}),
    )
    return DatasetInput(dataset, [InputTag(mlflow_tags.MLFLOW_DATASET_CONTEXT, context), InputTag("sha256", sha256)])


def _dataset_of(file: Path) -> DatasetInput:
    num_rows = pyarrow.parquet.read_metadata(file).num_rows
    name = f"{file.parent.name}-{file.stem}"  # with the split: MLflow takes equal files of one name for one
    return dataset_input(name, sha256=sha256_of(file), context=file.stem, source=file.as_posix(), num_rows=num_rows)


def _write_table(store: MlflowClient, run_id: str, rows: Sequence[Mapping[str, Any]], file: str) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    # MLflow's own log_table appends to a table of that name, so that scoring twice would double it.
    table = {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}
    store.log_text(run_id, json.dumps(table, ensure_ascii=False), file)
    listed = json.loads(store.get_run(run_id).data.tags.get(mlflow_tags.MLFLOW_LOGGED_ARTIFACTS, "[]"))
    if (entry := {"path": file, "type": "table"}) not in listed:
        store.set_tag(run_id, mlflow_tags.MLFLOW_LOGGED_ARTIFACTS, json.dumps([*listed, entry]))


def _has(store: MlflowClient, run_id: str) -> bool:
    try:
        return store.get_run(run_id) is not None
    except Exception:  # noqa: BLE001 (whatever it is, the store is of no use)
        return False


def _key(name: str) -> str:
    return re.sub(r"[^\w./: -]", "_", name)[: validation.MAX_ENTITY_KEY_LENGTH]


def _record(experiment: Experiment) -> Path:
    return experiment.fitted / "run.json"


if __name__ == "__main__":
    from train.runs import main

    main()
