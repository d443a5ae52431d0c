"""Whatever becomes of the store, training goes on, and all that it logged arrives once."""

import json
import logging
import os
import resource
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, TEMPORARILY_UNAVAILABLE
from werkzeug.serving import make_server

from train import runs, sender, tracking
from train.config import Experiment
from train.journal import ROOT, Journal, JournalError, journals
from train.store import connect

NUM_STEPS = 20


def make_experiment(name: str = "tiny") -> Experiment:
    prepare = {"topics": "topics.yaml", "pages": [], "test_fraction": 0.2, "num_folds": 2}
    return Experiment.model_validate({"name": name, "prepare": prepare, "fit": {"kind": "baseline"}})


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}")  # to make the tables takes seconds: once is enough
    return file


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path, no_sender_is_left: None) -> Path:
    """Move to a working folder with an empty store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, "mlflow.db")
    return tmp_path


def serve(port: int, folder: Path) -> None:
    """Run MLflow's server on a folder's store; the body of a process."""
    os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{folder / 'mlflow.db'}"
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = (folder / "artifacts").as_uri()
    from mlflow.server import app

    make_server("127.0.0.1", port, app, threaded=True).serve_forever()


class Server:
    """MLflow's server, which comes and dies as told."""

    def __init__(self, apart: ForkServerContext, folder: Path) -> None:
        self._apart, self._folder = apart, folder
        self._process: BaseProcess | None = None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    def start(self) -> None:
        self._process = self._apart.Process(target=serve, args=(self.port, self._folder))
        self._process.start()
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
            except ConnectionRefusedError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            else:
                return

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.join()
            self._process = None


@pytest.fixture
def server(workplace: Path, monkeypatch: pytest.MonkeyPatch, apart: ForkServerContext) -> Iterator[Server]:
    server = Server(apart, workplace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.port}")
    yield server
    server.kill()


def log_step(run: tracking.Run, step: int) -> None:
    run.log_metrics({"train/loss": 1 / (step + 1), "train/learning_rate": 0.1}, step)


def logged_run() -> tracking.Run:
    """Start a run and log all its steps."""
    run = tracking.start_run(make_experiment(), watch_system=False)
    for step in range(NUM_STEPS):
        log_step(run, step)
    return run


def check_arrived() -> None:
    """Find each row of the one run once."""
    store, experiment_id = connect()
    (run,) = store.search_runs([experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["fit.kind"] == "baseline"
    for name in ("train/loss", "train/learning_rate"):
        history = store.get_metric_history(run.info.run_id, name)
        assert sorted(metric.step for metric in history) == list(range(NUM_STEPS))
    assert {entry.path for entry in store.list_artifacts(run.info.run_id)} == {"config.yaml", "note.txt"}
    assert json.loads((make_experiment().fitted / "run.json").read_text("utf-8"))["run_id"] == run.info.run_id


@contextmanager
def noted(seconds: list[float]) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds.append(time.monotonic() - began)


@pytest.mark.parametrize(("comes", "goes"), [(5, 99), (0, 5), (0, NUM_STEPS - 1), (99, 99)])
def test_training_ends_whenever_the_server_is_away_and_replay_sends_all_once(
    server: Server, caplog: pytest.LogCaptureFixture, comes: int, goes: int
):
    waited: list[float] = []
    with caplog.at_level(logging.WARNING, logger="train"):
        if comes == 0:
            server.start()
        with noted(waited):
            run = tracking.start_run(make_experiment(), watch_system=False)
        for step in range(NUM_STEPS):
            if step == comes > 0:
                server.start()
            if step == goes:
                run.flush()
                server.kill()
            with noted(waited):
                log_step(run, step)
            time.sleep(0.02)
        with noted(waited):
            run.log_text("done", "note.txt")
            run.finish()
    said = [entry.message for entry in caplog.records if "is away" in entry.message]
    assert len(said) == 1
    assert "python -m train.tracking replay" in said[0]
    assert sum(waited) < 5

    server.kill()
    server.start()
    with pytest.raises(SystemExit, match="0"):
        runs.main(["replay"])
    check_arrived()
    assert not list(journals())
    with pytest.raises(SystemExit, match="0"):
        runs.main(["replay"])
    check_arrived()


def test_replay_while_the_server_is_away_keeps_what_waits(server: Server):
    with tracking.start_run(make_experiment(), watch_system=False) as run:
        run.log_text("done", "note.txt")

    with pytest.raises(SystemExit, match="1"):
        runs.main(["replay"])
    (folder,) = journals()
    journal = Journal(folder)
    assert [entry["kind"] for entry in journal.waiting()] == ["open", "files", "files", "close"]
    journal.close()


def test_a_store_that_is_busy_at_the_very_end_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    busy = [MlflowException("database is locked", error_code=TEMPORARILY_UNAVAILABLE)] * 2
    write = sender.write

    def write_when_free(*arguments, **keywords) -> None:
        if ending and busy:
            raise busy.pop()
        write(*arguments, **keywords)

    ending: list[bool] = []
    monkeypatch.setattr(sender, "write", write_when_free)
    run = logged_run()
    run.log_text("done", "note.txt")
    run.flush()
    ending.append(True)
    run.finish()

    assert not busy
    assert not list(journals())
    check_arrived()


def test_a_run_whose_end_was_not_sent_in_time_is_continued_by_the_next_stage(monkeypatch: pytest.MonkeyPatch):
    free, write = threading.Event(), sender.write

    def write_when_free(*arguments, **keywords) -> None:
        free.wait()
        write(*arguments, **keywords)

    monkeypatch.setattr(sender, "_STUCK", 0.1)
    monkeypatch.setattr(sender, "write", write_when_free)
    run = logged_run()
    run.finish()
    assert list(journals())

    monkeypatch.setattr(sender, "_STUCK", 60)
    with tracking.continue_run(make_experiment()) as continued:
        continued.log_text("done", "note.txt")
        free.set()
    assert not list(journals())
    check_arrived()


def test_a_run_is_not_lost_where_the_store_refuses_to_open_it(monkeypatch: pytest.MonkeyPatch):
    refusals = [MlflowException("a fault of the database", error_code=BAD_REQUEST)]
    opened = sender.open_run

    def open_run_later(*arguments) -> str:
        if refusals:
            raise refusals.pop()
        return opened(*arguments)

    monkeypatch.setattr(sender, "open_run", open_run_later)
    run = logged_run()
    run.log_text("done", "note.txt")
    run.finish()
    runs.replay()

    check_arrived()


def test_what_was_sent_but_not_noted_is_not_there_twice_when_sent_again(tiny_model: Path):
    run = logged_run()
    run.log_text("done", "note.txt")
    run.log_model(tiny_model, example="news", register=True)
    assert run.flush()
    (folder,) = journals()
    half_written = shutil.ignore_patterns(".*")  # what was sent may still be being noted
    copy = Path(shutil.copytree(folder, "copy", ignore=half_written))
    run.finish()
    (copy / "sent.json").unlink(missing_ok=True)
    with (copy / "entries.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "close", "status": "FINISHED", "time": 1}) + "\n")
    copy.rename(folder)

    with pytest.raises(SystemExit, match="0"):
        runs.main(["replay"])
    check_arrived()
    store, experiment_id = connect()
    assert len(store.search_logged_models([experiment_id])) == 1
    assert [version.version for version in store.search_model_versions("name = 'tiny'")] == [1]


def test_a_run_that_was_killed_is_continued_without_the_steps_that_it_logged():
    run = tracking.start_run(make_experiment(), watch_system=False)
    for step in range(NUM_STEPS - 5):
        log_step(run, step)
    run.flush()
    run._journal._file.close()  # as the end of a process does

    with tracking.resume_run(make_experiment()) as resumed:
        for step in range(NUM_STEPS - 10, NUM_STEPS):
            log_step(resumed, step)
        resumed.log_text("done", "note.txt")
    check_arrived()


def test_the_torn_end_of_a_journal_is_left_out(tmp_path: Path):
    journal = Journal(tmp_path / "one")
    journal.add("tag", name="a", value="b")
    journal.close()
    with (tmp_path / "one/entries.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "tag", "na')

    again = Journal(tmp_path / "one")
    again.add("tag", name="c", value="d")
    again.close()
    whole = Journal(tmp_path / "one")
    assert [entry["name"] for entry in whole.waiting()] == ["a", "c"]
    whole.close()


def test_a_full_disk_leaves_whole_entries(tmp_path: Path):
    journal = Journal(tmp_path / "one")
    journal.add("tag", name="a", value="b")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))  # stands for a full disk
    try:
        with pytest.raises(OSError, match=r"No space left|File too large"):
            journal.add("tag", name="c", value="d" * 2_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    journal.add("tag", name="e", value="f")
    journal.close()

    again = Journal(tmp_path / "one")
    assert [entry["name"] for entry in again.waiting()] == ["a", "e"]
    again.close()


def test_a_journal_is_open_once(tmp_path: Path):
    journal = Journal(tmp_path / "one")

    with pytest.raises(JournalError, match="is open in another process"):
        Journal(tmp_path / "one")
    journal.close()


def log_a_run(folder: Path, name: str) -> None:
    """Log a run; the body of a process."""
    os.chdir(folder)
    with tracking.start_run(make_experiment(name), watch_system=False) as run:
        for step in range(NUM_STEPS):
            log_step(run, step)
        run.log_text(name, "note.txt")


def test_eight_runs_at_once_into_one_store_lose_nothing(workplace: Path, apart: ForkServerContext):
    names = [f"run{i}" for i in range(8)]
    processes = [apart.Process(target=log_a_run, args=(workplace, name)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8

    with pytest.raises(SystemExit, match="0"):
        runs.main(["replay"])
    store, experiment_id = connect()
    found = store.search_runs([experiment_id])
    assert sorted(run.info.run_name for run in found) == names
    for run in found:
        history = store.get_metric_history(run.info.run_id, "train/loss")
        assert sorted(metric.step for metric in history) == list(range(NUM_STEPS))
        assert run.info.status == "FINISHED"


def begin(name: str, **parent: str) -> None:
    """Write the journal of a run of which nothing was sent."""
    journal = Journal(ROOT / name)
    about = {"run_id": "", "journal": name, "name": name, "tags": {}, "params": {}, "record": "", **parent}
    journal.add("open", **about, time=1)
    journal.add("close", status="FINISHED", time=2)
    journal.close()


def test_a_run_under_another_one_is_sent_after_it_and_waits_where_that_is_not_known(caplog: pytest.LogCaptureFixture):
    begin("below", parent="above")

    assert sender.replay() == (0, 2)
    assert "the run of the journal above, under which another one stands, was not sent yet" in caplog.text

    begin("above")
    assert sender.replay() == (4, 0)
    store, experiment_id = connect()
    below, above = (store.search_runs([experiment_id], f"tags.journal = '{name}'")[0] for name in ("below", "above"))
    assert below.data.tags["mlflow.parentRunId"] == above.info.run_id
