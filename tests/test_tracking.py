"""Runs reach the store, come back from it, and no trouble with it reaches the training."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import mlflow.data
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Run as StoredRun
from transformers import Trainer, TrainingArguments

from copydesk.encoder import sha256_of
from train import runs, tracking
from train.config import Experiment, PageSource, with_settings
from train.store import connect, dataset_input


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}")  # to make the tables takes seconds: once is enough
    return file


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path, no_sender_is_left: None) -> Path:
    """Make an empty store in a working folder of the test's own."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, "mlflow.db")
    return tmp_path


@pytest.fixture
def experiment() -> Experiment:
    return make_experiment()


def make_experiment(*, name: str = "tiny", seed: int = 0, num_sources: int = 1) -> Experiment:
    return Experiment.model_validate(
        {
            "name": name,
            "prepare": {
                "topics": "topics.yaml",
                "pages": [{"name": f"site{i}", "annotations": "a", "folder": "b"} for i in range(num_sources)],
                "test_fraction": 0.2,
                "num_folds": 2,
            },
            "fit": {"kind": "baseline", "seed": seed},
        }
    )


def start_quietly(experiment: Experiment) -> tracking.Run:
    run = tracking.start_run(experiment, watch_system=False)
    assert run.flush()
    return run


def continue_quietly(experiment: Experiment) -> tracking.Run:
    run = tracking.continue_run(experiment)
    assert run.flush()
    return run


def stored(run: tracking.Run) -> StoredRun:
    run.flush()
    return connect()[0].get_run(run.run_id)


def artifact(run: tracking.Run, path: str) -> str:
    run.flush()
    store, _ = connect()
    return Path(store.download_artifacts(run.run_id, path)).read_text("utf-8")


def test_a_run_carries_name_kind_and_all_settings(experiment: Experiment):
    with start_quietly(experiment) as run:
        pass

    found = stored(run)
    assert found.info.run_name == "tiny"
    assert found.info.status == "FINISHED"
    assert found.data.tags["kind"] == "baseline"
    assert found.data.params["prepare.pages.0.name"] == "site0"
    assert found.data.params["fit.inverse_regularisation"] == "1.0"
    assert found.data.params["release.register_model"] == "true"
    assert artifact(run, "config.yaml").startswith("name: tiny\n")
    assert Path("mlartifacts").is_dir()


def test_more_settings_than_one_call_takes_all_arrive():
    run = start_quietly(make_experiment(num_sources=60))

    sent = [name for name in stored(run).data.params if name.startswith("prepare.pages.")]
    assert len(sent) == 60 * len(PageSource.model_fields) > 100  # of one call


def test_settings_flatten_within_the_limits_of_mlflow():
    assert tracking.flatten({"a": {"b": [1, 2], "c": None}, "d": [{"e": "f"}], "g": {}}) == {
        "a.b": "[1, 2]",
        "a.c": "null",
        "d.0.e": "f",
        "g": "{}",
    }
    ((name, value),) = tracking.flatten({"Märkische (Oder)": "x" * 10_000}).items()
    assert name == "Märkische _Oder_"
    assert len(value) == 6_000


def test_a_run_names_the_commit_and_whether_the_tree_was_changed(experiment: Experiment, workplace: Path):
    assert tracking.git_tags() == {}
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    Path("code.py").touch()
    Path(".gitignore").write_text("mlflow.db\nmlartifacts\nmljournal\nmodels\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)

    clean = stored(start_quietly(experiment)).data.tags
    Path("code.py").write_text("changed")
    changed = stored(start_quietly(experiment)).data.tags

    assert len(clean["mlflow.source.git.commit"]) == 40
    assert clean["mlflow.source.git.commit"] == changed["mlflow.source.git.commit"]
    assert (clean["mlflow.source.git.dirty"], changed["mlflow.source.git.dirty"]) == ("false", "true")


def test_later_stages_continue_the_run(experiment: Experiment, caplog: pytest.LogCaptureFixture):
    with start_quietly(experiment) as first:
        first.log_metrics({"train/loss": 1.0}, step=3)
    with tracking.continue_run(experiment) as second:
        second.log_metrics({"validation/macro_f1": 0.5})

    assert second.run_id == first.run_id
    assert stored(first).data.metrics == {"train/loss": 1.0, "validation/macro_f1": 0.5}
    assert not caplog.records


def test_settings_that_changed_since_the_run_began_are_said_and_tagged(caplog: pytest.LogCaptureFixture):
    start_quietly(make_experiment(seed=0)).finish()

    run = continue_quietly(make_experiment(seed=1))

    assert json.loads(stored(run).data.tags["fit_changed"]) == {"fit.seed": "1"}
    assert stored(run).data.params["fit.seed"] == "0"
    assert "seed: 1" in artifact(run, "fit_changed.yaml")
    assert "fit.seed" in caplog.text


def test_a_stage_says_only_what_changed_of_its_own_settings(caplog: pytest.LogCaptureFixture):
    start_quietly(make_experiment(seed=0)).finish()
    changed = with_settings(make_experiment(seed=1), {"evaluate.seed": 3})

    with tracking.continue_run(Experiment.model_validate(changed), stage="release") as run:
        run.flush()
    assert not caplog.records
    with tracking.continue_run(Experiment.model_validate(changed), stage="evaluate") as run:
        run.flush()

    tags = {name: value for name, value in stored(run).data.tags.items() if name.endswith("changed")}
    assert tags == {"evaluate_changed": '{"evaluate.seed": "3"}'}
    assert list(yaml.safe_load(artifact(run, "evaluate_changed.yaml"))) == ["evaluate"]


def test_a_run_that_is_started_anew_keeps_the_settings_that_it_began_with():
    run = start_quietly(make_experiment(seed=0))
    run.finish()
    connect()[0].delete_run(run.run_id)

    assert stored(continue_quietly(make_experiment(seed=1))).data.params["fit.seed"] == "0"


def test_a_run_that_the_store_does_not_know_is_started_anew(experiment: Experiment, caplog: pytest.LogCaptureFixture):
    with continue_quietly(experiment) as no_record:
        pass
    connect()[0].delete_run(no_record.run_id)
    with continue_quietly(experiment) as deleted:
        pass

    assert deleted.run_id != no_record.run_id
    assert stored(deleted).data.params == stored(no_record).data.params
    assert json.loads((experiment.fitted / "run.json").read_text())["run_id"] == deleted.run_id
    assert [entry.message.partition(": ")[2] for entry in caplog.records] == ["starting a new one"] * 2


def test_an_exception_marks_the_run_as_failed(experiment: Experiment):
    with pytest.raises(RuntimeError), start_quietly(experiment) as run:
        raise RuntimeError

    assert stored(run).info.status == "FAILED"


def test_inputs_carry_the_hash_and_the_size_of_each_split(experiment: Experiment):
    for kind in ("pages", "articles"):
        (experiment.prepared / kind).mkdir(parents=True)
        for split in tracking.SPLITS:
            table = pa.table({"id": ["a", "b"] if kind == "pages" else []})  # articles of all splits are equal
            pa.parquet.write_table(table, experiment.prepared / kind / f"{split}.parquet")
    run = start_quietly(experiment)
    run.log_inputs(experiment.prepared)
    run.log_inputs(experiment.prepared)

    inputs = {entry.dataset.name: entry for entry in stored(run).inputs.dataset_inputs}
    assert sorted(inputs) == [
        f"{kind}-{split}" for kind in ("articles", "pages") for split in ("test", "train", "validation")
    ]
    entry = inputs["pages-validation"]
    file = experiment.prepared / "pages/validation.parquet"
    assert {tag.key: tag.value for tag in entry.tags} == {
        "mlflow.data.context": "validation",
        "sha256": sha256_of(file),
    }
    assert entry.dataset.digest == sha256_of(file)[:36]
    assert json.loads(entry.dataset.profile) == {"num_rows": 2}
    assert Path(mlflow.data.get_source(entry.dataset).load()).samefile(file)


def test_figures_texts_folders_and_tables_are_stored(experiment: Experiment, workplace: Path):
    (workplace / "scores").mkdir()
    (workplace / "scores/all.json").write_text("{}")
    run = start_quietly(experiment)
    run.log_figure(Figure(), "figures/confusion.png")
    run.log_text("hello", "note.txt")
    run.log_artifacts(workplace / "scores", "evaluation")
    for _ in range(2):  # scoring twice must not double a table
        run.log_table([{"label": "body", "f1": 0.5}, {"label": "paywall"}], "tables/labels.json")

    run.flush()
    store, experiment_id = connect()
    table = store.load_table(experiment_id, "tables/labels.json", [run.run_id])
    assert table["label"].to_list() == ["body", "paywall"]
    assert artifact(run, "note.txt") == "hello"
    assert artifact(run, "evaluation/all.json") == "{}"
    assert store.list_artifacts(run.run_id, "figures")[0].path == "figures/confusion.png"


def test_a_model_folder_is_registered_as_challenger(experiment: Experiment, tiny_model: Path):
    with start_quietly(experiment) as run:
        run.log_model(tiny_model, example="news", register=False)
        run.log_model(tiny_model, example="<p>news</p>", register=True)

    store, _ = connect()
    version = store.get_model_version_by_alias("tiny", "challenger")
    assert version.run_id == run.run_id
    assert store.get_logged_model(version.source.removeprefix("models:/")).status == "READY"
    assert len(stored(run).outputs.model_outputs) == 2


def test_system_metrics_are_logged_while_the_run_lasts(experiment: Experiment, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    deadline = time.monotonic() + 20

    with tracking.start_run(experiment) as run:
        assert run.flush()
        while "system/cpu_utilization_percentage" not in stored(run).data.metrics:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_under_torchrun_only_the_first_process_logs(experiment: Experiment, monkeypatch: pytest.MonkeyPatch):
    first = start_quietly(experiment)
    monkeypatch.setenv("RANK", "1")

    assert tracking.start_run(experiment).run_id == ""
    assert tracking.continue_run(experiment).run_id == ""
    assert json.loads((experiment.fitted / "run.json").read_text())["run_id"] == first.run_id


class Slope(torch.nn.Module):
    """A network of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.weight * x - labels) ** 2).mean(), "logits": self.weight * x}


def test_the_callback_logs_the_trainers_numbers_by_step(experiment: Experiment, workplace: Path):
    rows = [{"x": torch.ones(1), "labels": torch.zeros(1)}] * 2
    arguments = TrainingArguments(
        output_dir=str(workplace / "checkpoints"),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        logging_steps=1,
        eval_strategy="epoch",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    run = start_quietly(experiment)
    trainer = Trainer(
        Slope(), arguments, train_dataset=rows, eval_dataset=rows, callbacks=[tracking.trainer_callback(run)]
    )
    trainer.train()
    run.flush()

    store, _ = connect()
    assert [metric.step for metric in store.get_metric_history(run.run_id, "train/loss")] == [1, 2]
    names = set(stored(run).data.metrics)
    assert {"train/learning_rate", "train/grad_norm", "train/mean_loss", "validation/loss", "train/runtime"} <= names


def test_what_the_store_refuses_is_said_and_the_rest_goes_on(experiment: Experiment, caplog: pytest.LogCaptureFixture):
    run = start_quietly(experiment)
    for _ in range(2):
        run._add("tag", name="", value="a tag needs a name")
    run.log_metrics({"train/loss": float("nan")})
    run.log_metrics({"train/loss (odd name)": 1.0})

    assert "train/loss _odd name_" in stored(run).data.metrics
    assert [entry.message.partition(",")[0] for entry in caplog.records] == ["MLflow did not take tag"]


def test_inputs_that_are_not_there_are_named(experiment: Experiment, caplog: pytest.LogCaptureFixture):
    start_quietly(experiment).log_inputs(Path("missing"))

    assert "there is no missing/pages/train.parquet" in caplog.text


def finished_run(name: str, **metrics: float) -> tracking.Run:
    with start_quietly(make_experiment(name=name)) as run:
        run.log_metrics(metrics)
    return run


def test_finished_runs_are_exported_once_oldest_first():
    file = Path("bench/runs.jsonl")
    first = finished_run("first", f1=0.5, odd=float("nan"))
    second = finished_run("second", f1=0.25)
    unfinished = start_quietly(make_experiment(name="unfinished"))

    assert runs.export_runs(file) == 2
    content = file.read_text()
    assert runs.export_runs(file) == 0
    assert file.read_text() == content

    lines = [json.loads(line) for line in content.splitlines()]
    assert [line["run_id"] for line in lines] == [first.run_id, second.run_id]
    assert lines[0]["metrics"] == {"f1": 0.5, "odd": None}
    assert lines[0]["params"]["fit.kind"] == "baseline"
    assert lines[0]["tags"] == {"kind": "baseline"}
    unfinished.finish()
    assert runs.export_runs(file) == 1


def test_a_run_that_was_scored_after_its_export_is_renewed():
    file = Path("runs.jsonl")
    finished_run("scored", f1=0.5)
    runs.export_runs(file)
    with tracking.continue_run(make_experiment(name="scored")) as run:
        run.log_metrics({"f1": 0.75})

    assert runs.export_runs(file) == 1
    assert runs.read_runs(file)[run.run_id]["metrics"] == {"f1": 0.75}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\r\n"])
def test_a_description_of_several_lines_comes_back(separator: str):
    run = finished_run("described")
    note = f"first{separator}second"
    connect()[0].set_tag(run.run_id, "mlflow.note.content", note)

    runs.export_runs(Path("runs.jsonl"))

    assert runs.read_runs(Path("runs.jsonl"))[run.run_id]["tags"]["mlflow.note.content"] == note


def test_another_store_imports_each_run_once(workplace: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch):
    file = workplace / "runs.jsonl"
    run = finished_run("travelled", f1=0.5, odd=float("nan"))
    store, experiment_id = connect()
    child = store.create_run(experiment_id, tags={"mlflow.parentRunId": run.run_id}).info.run_id
    digest = dataset_input("pages-train", sha256="5" * 64, context="train", source="there")
    store.log_inputs(child, [digest])
    store.set_terminated(child)
    runs.main(["export", "--file", str(file)])
    content = file.read_text()
    (workplace / "other").mkdir()
    monkeypatch.chdir("other")
    shutil.copy(empty_store, "mlflow.db")

    assert (runs.import_runs(file), runs.import_runs(file)) == (2, 0)

    store, experiment_id = connect()
    trial, imported = sorted(store.search_runs([experiment_id]), key=lambda found: found.info.start_time, reverse=True)
    assert imported.info.run_name == "travelled"
    assert imported.data.metrics == {"f1": 0.5}
    assert imported.data.params["fit.kind"] == "baseline"
    assert imported.data.tags["imported"] == "true"
    assert imported.data.tags["original_run_id"] == run.run_id
    assert trial.data.tags["mlflow.parentRunId"] == imported.info.run_id
    assert trial.inputs.dataset_inputs[0].dataset.digest == "5" * 36
    assert runs.export_runs(file) == 0
    assert file.read_text() == content


def test_an_exported_run_is_not_imported_into_its_own_store():
    finished_run("home")
    runs.export_runs(Path("runs.jsonl"))

    assert runs.import_runs(Path("runs.jsonl")) == 0


def test_a_broken_line_is_named(capsys: pytest.CaptureFixture[str]):
    Path("runs.jsonl").write_text('{"run_id": "a"}\nnonsense\n')

    with pytest.raises(SystemExit):
        runs.main(["import", "--file", "runs.jsonl"])

    assert "runs.jsonl:2 is no exported run" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["export", "import"])
@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nonsense://x", "sqlite:///broken.db"])
def test_a_store_that_cannot_be_used_is_named(
    uri: str, action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Path("broken.db").write_text("this is no database")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)

    with pytest.raises(SystemExit) as end:
        runs.main([action, "--file", "runs.jsonl"])

    told = capsys.readouterr().err
    assert end.value.code == 1
    assert f"{action}: the MLflow store {uri} cannot be used: " in told
    assert "Set MLFLOW_TRACKING_URI to one that answers" in told
    assert not Path("runs.jsonl").exists()


def test_a_file_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str]):
    Path("runs.jsonl").mkdir()

    with pytest.raises(SystemExit):
        runs.main(["export", "--file", "runs.jsonl"])

    assert "export: [Errno 21] Is a directory: 'runs.jsonl'" in capsys.readouterr().err
