"""The gate between challenger and champion, on a real registry."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from mlflow import MlflowClient

from copydesk import registry
from copydesk.predictor import Document
from copydesk.saved import load_saved, save_folder
from train import evaluate as evaluate_stage
from train import promote
from train.arguments import load_experiment
from train.fit import fit
from train.release import release
from train.rows import load_rows, resplit
from train.scores import summarise
from train.sources.articles import read_topics
from train.store import connect, read_artifact, registered

BODY, BOILERPLATE, PAYWALL, SPONSORED = range(4)
MODEL = ["--model", "tiny", "--samples", "200"]


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{file}")  # to make the tables takes seconds: once is enough
    return file


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> MlflowClient:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, "mlflow.db")
    return connect()[0]


@pytest.fixture(scope="module")
def smaller_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Save the tiny model in half as many bytes."""
    saved = load_saved(tiny_model)
    folder = tmp_path_factory.mktemp("models") / "smaller"
    save_folder(
        folder,
        tensors={name: tensor.to(torch.bfloat16) for name, tensor in saved.model.state_dict().items()},
        description=saved.description,
        tokenizer=saved.tokenizer.to_str(),
        name="tiny",
        created="2026-01-02",
        run={},
        card="# tiny\n",
    )
    return folder


def register(store: MlflowClient, folder: Path, rows: list[dict], **test: float) -> str:
    """Register a model as challenger, with what its evaluation would have logged; return the id of its run."""
    run_id = store.create_run(connect()[1]).info.run_id
    columns = list(rows[0])
    content = {"columns": columns, "data": [[row[column] for column in columns] for row in rows]}
    store.log_text(run_id, json.dumps(content), promote.TABLE)
    for name, value in test.items():
        store.log_metric(run_id, f"test/{name}", value)
    registry.publish(folder, example="<p>news</p>", store=store, run_id=run_id, register=True)
    return run_id


def champion(store: MlflowClient) -> str:
    return str(registered(store, "tiny", alias="champion").version)


def test_the_first_model_is_champion_at_once_and_a_better_one_follows(
    store: MlflowClient, tiny_model: Path, page_table: Callable[..., list[dict]], capsys: pytest.CaptureFixture[str]
):
    register(store, tiny_model, page_table({PAYWALL: 4}), macro_f1=0.5)
    assert promote.main(MODEL) == 0
    assert "there is no champion yet" in capsys.readouterr().out
    assert champion(store) == "1"

    run_id = register(store, tiny_model, page_table({PAYWALL: 1}), macro_f1=0.75)
    assert promote.main(MODEL) == 0

    assert champion(store) == "2"
    assert "version 2 is the champion now" in capsys.readouterr().out
    report = json.loads(read_artifact(store, run_id, "promotion/report.json"))
    assert (report["promoted"], report["pages"], report["sites"]) == (True, 24, 12)
    assert report["scores"]["paywall_f1"]["gain"] > 0.05
    assert report["champion"]["counts"] == "its evaluation"
    assert "| 0.5000, 0.7500 |" in read_artifact(store, run_id, "promotion/report.md")
    metrics = store.get_run(run_id).data.metrics
    assert metrics["promotion/promoted"] == 1
    assert metrics["promotion/macro_f1_p"] < 0.05


def test_an_equal_model_is_refused_and_a_cheaper_one_is_not(
    store: MlflowClient,
    tiny_model: Path,
    page_table: Callable[..., list[dict]],
    smaller_model: Path,
    capsys: pytest.CaptureFixture[str],
):
    register(store, tiny_model, page_table({PAYWALL: 4}))
    promote.main(MODEL)
    run_id = register(store, tiny_model, page_table({PAYWALL: 4}))

    assert promote.main(MODEL) == 1
    assert champion(store) == "1"
    assert "version 2 is refused" in capsys.readouterr().out
    assert "no cheaper" in read_artifact(store, run_id, "promotion/report.md")
    assert store.get_run(run_id).data.metrics["promotion/promoted"] == 0

    run_id = register(store, smaller_model, page_table({PAYWALL: 4}))
    assert promote.main(MODEL) == 0
    assert champion(store) == "3"
    report = json.loads(read_artifact(store, run_id, "promotion/report.json"))
    assert report["champion"]["parameters"] == report["challenger"]["parameters"]
    assert report["challenger"]["bytes"] < 0.8 * report["champion"]["bytes"]


def test_a_model_that_is_worse_in_one_label_is_refused(
    store: MlflowClient, tiny_model: Path, page_table: Callable[..., list[dict]], capsys: pytest.CaptureFixture[str]
):
    register(store, tiny_model, page_table({BODY: 9}))
    promote.main(MODEL)
    register(store, tiny_model, page_table({SPONSORED: 3}))

    assert promote.main(MODEL) == 1
    assert "worse by more than 0.02: sponsored_f1 -" in capsys.readouterr().out
    assert champion(store) == "1"
    assert promote.main([*MODEL, "--label-margin", "0.5"]) == 0
    assert champion(store) == "2"


def fails(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        promote.main(MODEL)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_compared_is_said(
    store: MlflowClient, tiny_model: Path, page_table: Callable[..., list[dict]], capsys: pytest.CaptureFixture[str]
):
    assert "no version of tiny in sqlite:" in fails(capsys)

    register(store, tiny_model, page_table({}))
    promote.main(MODEL)
    assert "version 1 of tiny is champion already" in fails(capsys)

    register(store, tiny_model, [{**row, "labels": "1"} for row in page_table({})])
    assert "not scored on one same page" in fails(capsys)
    assert champion(store) == "1"


def test_a_champion_without_counts_is_scored_again(workplace: Path, capsys: pytest.CaptureFixture[str]):
    settings = ["fit.epochs=1", "release.register_model=true"]
    first = load_experiment("tiny.yaml", settings)
    fit(first)
    release(first)
    assert promote.main(MODEL) == 0
    rows = list(load_rows(first.prepared, "pages", "validation"))
    topics = read_topics(first.prepare.topics)
    predictor, raws = evaluate_stage.load_predictor(first), [resplit(row) for row in rows]
    read = predictor.predict([Document(row["content"], kind=row["kind"]) for row in rows])
    expected = summarise(evaluate_stage.score_pages(predictor, read, rows, raws, topics=topics))
    second = load_experiment("tiny.yaml", [*settings, "fit.seed=1", "fit.head_learning_rate=0.001"])
    fit(second)
    release(second)
    scores = evaluate_stage.evaluate(second)

    assert promote.main(MODEL) in {0, 1}

    store, _ = connect()
    run_id = registered(store, "tiny", alias="challenger").run_id
    report = json.loads(read_artifact(store, run_id, "promotion/report.json"))
    assert report["champion"]["counts"].startswith("scored for this comparison")
    assert report["challenger"]["counts"] == "its evaluation"
    assert report["pages"] == len(rows)
    for name in ("macro_f1", "body_f1", "paywall_f1"):
        assert report["scores"][name]["champion"] == pytest.approx(expected[name])
        assert report["scores"][name]["challenger"] == pytest.approx(scores[name])

    store.set_registered_model_alias("tiny", "champion", "1")
    file = second.prepared / "pages/validation.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).slice(1), file)
    assert "may have trained on these" in fails(capsys)


def test_a_refit_is_not_compared_on_what_it_trained_on(workplace: Path, capsys: pytest.CaptureFixture[str]):
    settings = ["fit.epochs=1", "release.register_model=true"]
    for refit in ("false", "true"):
        experiment = load_experiment("tiny.yaml", [*settings, f"fit.refit={refit}"])
        fit(experiment)
        release(experiment)
        capsys.readouterr()
        if refit == "false":
            assert promote.main(MODEL) == 0

    assert "version 2 was fitted again on validation pages" in fails(capsys)
    assert champion(connect()[0]) == "1"
