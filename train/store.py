"""Write to the MLflow store what a journal holds.

Knows MLflow's entities and how each entry becomes one, so that to send it again changes nothing; knows nothing of
threads, retries or training.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from copydesk.registry import publish, register_model, tracking_uri
from train.journal import Entry

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # mlflow reads it while it is imported

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, ViewType
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.utils import mlflow_tags, validation

log = logging.getLogger(__name__)

Store: TypeAlias = MlflowClient
Version: TypeAlias = ModelVersion
StoreError: TypeAlias = MlflowException
EXPERIMENT = "copydesk"
"""The one MLflow experiment."""
JOURNAL = "journal"
"""Tag of a run that names the journal whose entries it holds."""
MAX_PARAM_LENGTH = validation.MAX_PARAM_VAL_LENGTH
SOURCE_NAME, SOURCE_TYPE = mlflow_tags.MLFLOW_SOURCE_NAME, mlflow_tags.MLFLOW_SOURCE_TYPE
SOURCE_COMMIT, SOURCE_DIRTY = mlflow_tags.MLFLOW_GIT_COMMIT, mlflow_tags.MLFLOW_GIT_DIRTY
_PATIENCE = {  # who sends tries again by itself
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def connect(uri: str = "") -> tuple[MlflowClient, str]:
    """Return a store, that of `MLFLOW_TRACKING_URI` if no other is named, and the id of our experiment in it."""
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    uri = uri or tracking_uri()
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


def write_metrics(store: MlflowClient, run_id: str, rows: Sequence[tuple[str, float, int, int]]) -> None:
    """Write metrics: name, value, time in milliseconds, step. MLflow keeps equal rows once."""
    entities = [Metric(key(name), value, time, step) for name, value, time, step in rows]
    for start in range(0, len(entities), validation.MAX_METRICS_PER_BATCH):
        store.log_batch(run_id, entities[start : start + validation.MAX_METRICS_PER_BATCH])


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


def _write_table(store: MlflowClient, run_id: str, rows: Sequence[Mapping[str, Any]], file: str) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    # MLflow's own log_table appends to a table of that name, so that scoring twice would double it.
    table = {"columns": columns, "data": [[row.get(column) for column in columns] for row in rows]}
    store.log_text(run_id, json.dumps(table, ensure_ascii=False), file)
    listed = json.loads(store.get_run(run_id).data.tags.get(mlflow_tags.MLFLOW_LOGGED_ARTIFACTS, "[]"))
    if (entry := {"path": file, "type": "table"}) not in listed:
        store.set_tag(run_id, mlflow_tags.MLFLOW_LOGGED_ARTIFACTS, json.dumps([*listed, entry]))


def open_run(store: MlflowClient, experiment_id: str, entry: Entry) -> str:
    """Start the run that an entry describes, or find the one that it continues; return its id.

    A run that the store does not know, because it was deleted there or is of another store, is started anew.
    """
    run_id: str = entry["run_id"]
    if run_id and not _has(store, run_id):
        log.warning("the MLflow store %s has no run %s: starting a new one", tracking_uri(), run_id)
        run_id = ""
    if not run_id:  # created, perhaps, by a process that ended before it could note it
        found = store.search_runs([experiment_id], f"tags.{JOURNAL} = '{entry['journal']}'")
        run_id = found[0].info.run_id if found else ""
    if run_id:
        store.update_run(run_id, status="RUNNING")
    else:
        tags = {**entry["tags"], JOURNAL: entry["journal"]}
        if entry.get("parent"):
            tags[mlflow_tags.MLFLOW_PARENT_RUN_ID] = _id_of(store, experiment_id, journal=entry["parent"])
        run = store.create_run(experiment_id, start_time=entry["time"], run_name=entry["name"], tags=tags)
        run_id = run.info.run_id
    if not store.get_run(run_id).data.params:  # they cannot change: those of the beginning stand
        write_params(store, run_id, entry["params"])
    return run_id


def _id_of(store: MlflowClient, experiment_id: str, *, journal: str) -> str:
    """Return the id of the run that holds a journal.

    Raises:
        OSError: the store has none yet: what stands under it must wait.
    """
    found = store.search_runs([experiment_id], f"tags.{JOURNAL} = '{journal}'", run_view_type=ViewType.ALL)
    if not found:
        raise OSError(f"the run of the journal {journal}, under which another one stands, was not sent yet")
    return str(found[0].info.run_id)


def _has(store: MlflowClient, run_id: str) -> bool:
    try:
        return store.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if is_refusal(error):
            return False
        raise


def write(store: MlflowClient, run_id: str, entry: Entry, *, files: Path) -> None:
    """Write an entry other than `open`; the files that it names lie below `files`."""
    match entry["kind"]:
        case "metrics":
            write_metrics(store, run_id, entry["rows"])
        case "tag":
            store.set_tag(run_id, entry["name"], entry["value"])
        case "inputs":
            store.log_inputs(run_id, [dataset_input(**described) for described in entry["datasets"]])
        case "files":
            store.log_artifacts(run_id, str(files / entry["folder"]), entry["target"] or None)
        case "table":
            _write_table(store, run_id, entry["rows"], entry["file"])
        case "model":
            _publish_once(store, run_id, entry, files=files)
        case "close":
            store.set_terminated(run_id, entry["status"], end_time=entry["time"])


def _publish_once(store: MlflowClient, run_id: str, entry: Entry, *, files: Path) -> None:
    """Publish a model, unless a process that ended before it could note it did so."""
    experiment_id = store.get_run(run_id).info.experiment_id
    known = store.search_logged_models([experiment_id], f"tags.entry = '{entry['id']}'")
    done = [model.model_id for model in known if model.status == "READY"]
    if not done:
        options = {"example": entry["example"], "wheel": files / entry["wheel"], "register": entry["register"]}
        publish(files / entry["folder"], store=store, run_id=run_id, tags={"entry": entry["id"]}, **options)
    elif entry["register"] and not store.search_model_versions(f"source_path = 'models:/{done[0]}'"):
        register_model(f"models:/{done[0]}", files / entry["folder"], store=store)


def is_refusal(error: Exception) -> bool:
    """Tell whether the store is there and will never take this, so that to try again is of no use."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return 400 <= status < 500 and status not in {401, 403, 408, 429}
    if isinstance(error, OSError | json.JSONDecodeError):  # of the connection, or of who answers in place of MLflow
        return isinstance(error, FileNotFoundError)
    return isinstance(error, ValueError | TypeError | KeyError)


def is_busy(error: Exception) -> bool:
    """Tell whether the store is there but took nothing just now, e.g. as another process writes to its SQLite."""
    return isinstance(error, MlflowException) and error.get_http_status_code() in {429, 503}


def registered(store: MlflowClient, name: str, *, alias: str) -> ModelVersion | None:
    """Return the version of a registered model that has an alias, if one has."""
    try:
        return store.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if is_refusal(error):
            return None
        raise


def read_artifact(store: MlflowClient, run_id: str, file: str) -> str | None:
    """Return the text of an artifact of a run, if it has one of that name."""
    folder = file.rpartition("/")[0] or None
    if file not in {found.path for found in store.list_artifacts(run_id, folder)}:
        return None
    with tempfile.TemporaryDirectory() as temporary:
        return Path(store.download_artifacts(run_id, file, temporary)).read_text("utf-8")


def machine_monitors() -> Sequence[Any]:
    """Return MLflow's monitors of processor and memory, disk and network."""
    return CPUMonitor(), DiskMonitor(), NetworkMonitor()


def key(name: str) -> str:
    """Return a name within MLflow's limits."""
    return re.sub(r"[^\w./: -]", "_", name)[: validation.MAX_ENTITY_KEY_LENGTH]
