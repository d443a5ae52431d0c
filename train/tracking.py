"""Log experiments, and keep their numbers in git.

Knows runs, params, metrics and what is worth logging; knows nothing of how numbers come about, nor of MLflow: what is
logged goes into a journal on disk, and from there, by a thread, to the store. Its command line, `export | import |
replay`, is that of `train.runs`.
"""

import json
import logging
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import pyarrow.parquet
import yaml
from matplotlib.figure import Figure
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from copydesk.encoder import sha256_of
from train.checkpoints import write_whole
from train.config import Experiment, Trial
from train.journal import ROOT, Journal
from train.machine import Watch
from train.sender import Sender
from train.store import MAX_PARAM_LENGTH, SOURCE_COMMIT, SOURCE_DIRTY, SOURCE_NAME, SOURCE_TYPE, key
from train.wheel import build_wheel

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


def start_run(experiment: Experiment, *, watch_system: bool = True) -> "Run":
    """Start the run of an experiment; `fit/run.json` keeps its ids. While it runs, the machine may be watched."""
    if int(os.environ.get("RANK", "0")):  # torchrun: the first process speaks for all
        return Run(None)
    record = _record(experiment)
    record.parent.mkdir(parents=True, exist_ok=True)
    name = uuid.uuid4().hex
    write_whole(record, {"run_id": "", "journal": name, "settings": _settings(experiment)})
    run = _open(experiment, name)
    run.log_text(_config_of(experiment), "config.yaml")
    if watch_system:
        run.watch_system()
    return run


def resume_run(experiment: Experiment) -> "Run":
    """Continue the run of a training that was broken off: what it logged of a step is not logged again."""
    run = continue_run(experiment, watch_system=True)
    run.skip_known_metrics()
    return run


def continue_run(experiment: Experiment, *, stage: str = "fit", watch_system: bool = False) -> "Run":
    """Continue the run that `start_run` started; where there is none, say so and start one.

    Args:
        experiment: its settings.
        stage: which one continues it: changes of the settings that it does not read are none.
        watch_system: log what the machine does until the run is finished.
    """
    if int(os.environ.get("RANK", "0")):
        return Run(None)
    try:
        known = json.loads(_record(experiment).read_text("utf-8"))
        run_id, name, before = known["run_id"], known.get("journal") or known["run_id"], known.get("settings") or {}
        if not name:
            raise KeyError("journal")
    except (OSError, ValueError, KeyError, AttributeError):
        log.warning("%s names no MLflow run to continue: starting a new one", _record(experiment))
        return start_run(experiment, watch_system=watch_system)
    run = _open(experiment, name, run_id=run_id, began_with=before)
    run.log_changes(experiment, stage=stage, before=before)
    if watch_system:
        run.watch_system()
    return run


def parent_run(experiment: Experiment, name: str, *, title: str) -> "Run":
    """Start, or continue, the run under which those of trials stand.

    Args:
        experiment: what the trials have in common, and what they search.
        name: of its journal, which the trials name as their parent's.
        title: name of the run.
    """
    run = _open(experiment, name, title=title, source="train/sweep.py")
    run.log_text(_config_of(experiment), "config.yaml")
    run.log_inputs(experiment.prepared)
    return run


def _open(
    experiment: Experiment,
    name: str,
    *,
    run_id: str = "",
    title: str = "",
    source: str = "train/fit.py",
    began_with: Mapping[str, str] | None = None,
) -> "Run":
    left = _left.pop(name, None)
    try:
        journal = left.journal if left else Journal(ROOT / name)
        tags = {"kind": experiment.fit.kind, SOURCE_NAME: source, SOURCE_TYPE: "LOCAL", **git_tags()}
        record = _record(experiment).as_posix()
        about = {"run_id": run_id, "journal": name, "name": title or experiment.title, "tags": tags}
        about |= {"params": _settings(experiment) | dict(began_with or {})}
        if isinstance(experiment, Trial):
            about["parent"] = experiment.parent
        journal.add("open", **about, time=_now(), record=record)
    except OSError as error:
        log.warning("nothing is logged: %s", error)
        return Run(None)
    return Run(journal, left)


_left: dict[str, Sender] = {}
"""By journal: what was still sending when its run ended, and goes on when the run is continued."""


class Run:
    """One run. To log never fails and never waits for the store."""

    def __init__(self, journal: Journal | None, sender: Sender | None = None) -> None:
        """Use `start_run` or `continue_run`; without a journal nothing is logged."""
        self._journal = journal
        self._ended_id = ""
        self._sender: Sender | None = None
        self._watch: Watch | None = None
        self._known: set[tuple[str, int]] = set()
        self._failed = False
        if journal and sender and sender.go_on():
            self._sender = sender
            sender.wake()
        elif journal:
            self._sender = Sender(journal)
            self._sender.start()

    @property
    def run_id(self) -> str:
        """MLflow's id of the run; empty until the store has said it."""
        return self._journal.run_id if self._journal else self._ended_id

    def __enter__(self) -> Self:
        """Return the run."""
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        """Finish the run, as failed after an exception."""
        self.finish("FAILED" if kind else "FINISHED")

    def log_inputs(self, prepared: Path) -> None:
        """Log name, hash and number of rows of each prepared split."""
        files = [prepared / kind / f"{split}.parquet" for kind in ("pages", "articles") for split in SPLITS]
        if missing := [file.as_posix() for file in files if not file.is_file()]:
            log.warning("what the run reads is not logged, for there is no %s", ", ".join(missing))
            return
        self._add("inputs", datasets=[_described(file) for file in files])

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers by name, e.g. `validation/macro_f1`, of a training step or of the whole run."""
        rows = [(name, float(value), _now(), step or 0) for name, value in metrics.items()]
        if rows := [row for row in rows if (row[0], row[3]) not in self._known]:
            self._add("metrics", rows=rows)

    def log_tag(self, name: str, value: str) -> None:
        """Set a tag."""
        self._add("tag", name=name, value=value)

    def log_figure(self, figure: Figure, file: str) -> None:
        """Store a figure, e.g. as `figures/confusion.png`."""
        self._add_file(file, figure.savefig)

    def log_text(self, text: str, file: str) -> None:
        """Store a text."""
        self._add_file(file, lambda path: path.write_text(text, "utf-8"))

    def log_artifacts(self, folder: Path, name: str) -> None:
        """Store the files of a folder under a name."""
        self._add_file(name, lambda path: shutil.copytree(folder, path))

    def log_table(self, rows: Sequence[Mapping[str, Any]], file: str) -> None:
        """Store a table, e.g. as `tables/labels.json`, in place of one of that name."""
        self._add("table", rows=[dict(row) for row in rows], file=file)

    def log_model(self, folder: Path, *, example: str, register: bool) -> None:
        """Store a model folder as a model that MLflow can load and serve, with the wheel of copydesk that it needs.

        Args:
            folder: as `copydesk.saved` wrote it; its manifest names the model.
            example: a page, HTML or text.
            register: make it a version of the registered model of that name, with the alias `challenger`.
        """
        if not self._journal:
            return
        try:
            kept, wheel = self._journal.keep(folder), build_wheel(self._journal.new_file("wheel"))
        except OSError as error:
            self._fail(error)
            return
        paths = {"folder": self._within(kept), "wheel": self._within(wheel)}
        self._add("model", id=uuid.uuid4().hex, example=example, register=register, **paths)

    def log_changes(self, experiment: Experiment, *, stage: str, before: Mapping[str, str]) -> None:
        """Log what settings of a stage have changed since the run began, as a tag: params cannot change."""
        content = experiment.model_dump(mode="json", include={stage})
        settings = flatten(content)
        changed = {name: value for name, value in settings.items() if before.get(name, value) != value}
        if changed:
            log.warning("settings changed since the run of %s began: %s", experiment.name, ", ".join(changed))
            self.log_tag(f"{stage}_changed", json.dumps(changed))
            self.log_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), f"{stage}_changed.yaml")

    def skip_known_metrics(self) -> None:
        """Do not log again what the journal holds of a step."""
        logged = [entry for entry in self._journal.entries if entry["kind"] == "metrics"] if self._journal else []
        self._known = {(row[0], row[3]) for entry in logged for row in entry["rows"]}

    def watch_system(self) -> None:
        """Log processor, memory, disk and network until the run is finished."""
        self._watch = Watch(self.log_metrics)
        self._watch.start()

    def flush(self) -> bool:
        """Wait until all is in the store, or the store is away; tell which."""
        return self._sender.flush() if self._sender else False

    def finish(self, status: Literal["FINISHED", "FAILED"] = "FINISHED") -> None:
        """End the run; what is called after it does nothing."""
        if self._watch:
            self._watch.stop()
        self._add("close", status=status, time=_now())
        if self._sender and self._journal:
            self._sender.finish()
            self._ended_id = self._journal.run_id
            if self._sender.is_alive():
                _left[self._journal.folder.name] = self._sender
            else:
                self._journal.close()
        self._journal = self._sender = self._watch = None

    def _add(self, kind: str, **content: Any) -> None:
        if self._journal and self._sender:
            try:
                self._journal.add(kind, **content)
            except OSError as error:
                self._fail(error)
            self._sender.wake()

    def _add_file(self, file: str, write: Callable[[Path], Any]) -> None:
        if self._journal:
            try:
                path = self._journal.new_file(Path(file).name)
                write(path)
            except OSError as error:
                self._fail(error)
                return
            # MLflow keeps a file under its name in a folder, a folder's files in a folder.
            target = file if path.is_dir() else file.rpartition("/")[0]
            self._add("files", folder=self._within(path if path.is_dir() else path.parent), target=target)

    def _within(self, path: Path) -> str:
        return path.relative_to(self._journal.folder).as_posix() if self._journal else ""

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            log.warning("the journal takes no more, not all will be logged: %s", error)
        self._failed = True


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
        return {key(prefix): text[:MAX_PARAM_LENGTH]}
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
    return {SOURCE_COMMIT: commit, SOURCE_DIRTY: "true" if changes else "false"}


def _described(file: Path) -> dict[str, Any]:
    return {
        "name": f"{file.parent.name}-{file.stem}",  # with the split: MLflow takes equal files of one name for one
        "sha256": sha256_of(file),
        "context": file.stem,
        "source": file.as_posix(),
        "num_rows": pyarrow.parquet.read_metadata(file).num_rows,
    }


def _settings(experiment: Experiment) -> dict[str, str]:
    return flatten(experiment.model_dump(mode="json", exclude={"sweep"}))


def _config_of(experiment: Experiment) -> str:
    content = experiment.model_dump(mode="json", exclude={"trial"})
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _now() -> int:
    return int(time.time() * 1000)


def _record(experiment: Experiment) -> Path:
    return experiment.fitted / "run.json"


if __name__ == "__main__":
    from train.runs import main

    main()
