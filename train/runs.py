"""Keep the numbers of all runs in git: the MLflow store → `bench/runs.jsonl` → another MLflow store.

Knows the file and what of a run is worth keeping; leaves MLflow itself to `train.store`. This is the command line of
`train.tracking`: `python -m train.tracking export | import | replay`.
"""

import argparse
import json
import logging
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from copydesk.registry import tracking_uri
from train import store as mlflow_store
from train.sender import replay

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

log = logging.getLogger(__name__)

RUNS_FILE = Path("bench/runs.jsonl")
IMPORTED, ORIGINAL = "imported", "original_run_id"
HELP = "store → file; file → store; or send to the store what waits since it was away"
_COMMIT, _PARENT = "mlflow.source.git.commit", "mlflow.parentRunId"
_KEPT_TAGS = (_PARENT, "mlflow.source.git.dirty", "mlflow.note.content")
"""Of MLflow's own; all of ours are kept."""


def export_runs(file: Path) -> int:
    """Merge the store's finished runs into the file, oldest first; return how many lines are new or changed.

    Lines of runs that the store does not know stay, and imported runs are left where they came from.
    """
    before = read_runs(file)
    store, experiment_id = mlflow_store.connect()
    own = {
        run.info.run_id: describe(run)
        for run in _stored_runs(store, experiment_id)
        if run.info.status == "FINISHED" and IMPORTED not in run.data.tags
    }
    runs = sorted((before | own).values(), key=lambda run: (run["started"], run["run_id"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(run, ensure_ascii=False, allow_nan=False) + "\n" for run in runs), "utf-8")
    return sum(before.get(run_id) != run for run_id, run in own.items())


def import_runs(file: Path) -> int:
    """Put the runs of the file that the store lacks into it; return how many."""
    store, experiment_id = mlflow_store.connect()
    known = {
        run.data.tags.get(ORIGINAL, run.info.run_id): run.info.run_id for run in _stored_runs(store, experiment_id)
    }
    lacking = [run for run in read_runs(file).values() if run["run_id"] not in known]
    for run in lacking:  # oldest first: a sweep's parent before its trials
        known[run["run_id"]] = _add(store, experiment_id, run, parent=known.get(run["tags"].get(_PARENT, "")))
    return len(lacking)


def read_runs(file: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of the file by run id; none where there is no file yet.

    Raises:
        ValueError: a line is no JSON, or names no run.
    """
    if not file.is_file():
        return {}
    runs: dict[str, dict[str, Any]] = {}
    with file.open(encoding="utf-8") as lines:  # which end at line feeds alone: a description may hold U+2028
        for number, line in enumerate(lines, 1):
            try:
                run = json.loads(line)
                runs[run["run_id"]] = run
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}:{number} is no exported run ({error!r}): restore the line from git, or delete it"
                ) from error
    return runs


def describe(run: "StoredRun") -> dict[str, Any]:
    """Return what is kept of a run; metrics that are no number are null, system metrics are not kept."""
    tags, metrics = run.data.tags, sorted(run.data.metrics.items())
    inputs = run.inputs.dataset_inputs if run.inputs else []
    data = sorted((entry.dataset.name, {tag.key: tag.value for tag in entry.tags}) for entry in inputs)
    return {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "started": datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="milliseconds"),
        "seconds": round((run.info.end_time - run.info.start_time) / 1000, 3),
        "status": run.info.status,
        "commit": tags.get(_COMMIT),
        "params": dict(sorted(run.data.params.items())),
        "metrics": {
            name: value if math.isfinite(value) else None for name, value in metrics if not name.startswith("system/")
        },
        "tags": {
            name: value
            for name, value in sorted(tags.items())
            if name in _KEPT_TAGS or not name.startswith(("mlflow.", mlflow_store.JOURNAL))
        },
        "data": {name: found["sha256"] for name, found in data if "sha256" in found},
    }


def _stored_runs(store: "MlflowClient", experiment_id: str) -> Iterator["StoredRun"]:
    token: str | None = None
    while token != "":
        page = store.search_runs([experiment_id], page_token=token)
        yield from page
        token = page.token or ""


def _add(store: "MlflowClient", experiment_id: str, run: dict[str, Any], *, parent: str | None) -> str:
    started = datetime.fromisoformat(run["started"])
    tags = {**run["tags"], IMPORTED: "true", ORIGINAL: run["run_id"]}
    if run["commit"]:
        tags[_COMMIT] = run["commit"]
    tags.pop(_PARENT, None)
    if parent:
        tags[_PARENT] = parent
    milliseconds = round(started.timestamp() * 1000)
    run_id: str = store.create_run(experiment_id, start_time=milliseconds, tags=tags, run_name=run["name"]).info.run_id
    mlflow_store.write_params(store, run_id, run["params"])
    numbers = [(name, value, milliseconds, 0) for name, value in run["metrics"].items() if value is not None]
    mlflow_store.write_metrics(store, run_id, numbers)
    store.log_inputs(
        run_id,
        [
            mlflow_store.dataset_input(name, sha256=sha256, context=name.rpartition("-")[2], source=name)
            for name, sha256 in run["data"].items()
        ],
    )
    store.set_terminated(run_id, run["status"], end_time=milliseconds + round(run["seconds"] * 1000))
    return run_id


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.tracking", description="Keep the numbers of all runs in git."
    )
    parser.add_argument("action", choices=("export", "import", "replay"), help=HELP)
    parser.add_argument("--file", type=Path, default=RUNS_FILE, metavar="FILE", help="default: %(default)s")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        if options.action == "export":
            log.info("%d runs new or changed in %s", export_runs(options.file), options.file)
        elif options.action == "replay":
            num_sent, num_waiting = replay()
            log.info("%d entries sent, %d wait", num_sent, num_waiting)
            parser.exit(1 if num_waiting else 0)
        else:
            log.info("%d runs of %s imported", import_runs(options.file), options.file)
    except (mlflow_store.StoreError, SQLAlchemyError, ImportError) as error:  # the last for want of a database's driver
        parser.exit(
            1,
            f"{options.action}: the MLflow store {tracking_uri()} cannot be used: {error}\n"
            "Set MLFLOW_TRACKING_URI to one that answers, e.g. http://127.0.0.1:5000, or unset it for mlflow.db\n",
        )
    except (ValueError, OSError) as error:
        parser.exit(1, f"{options.action}: {error}\n")
