"""The whole chain, tiny: prepare → fit → release → evaluate, then read a page with what came out."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from mlflow import MlflowClient

import copydesk
from copydesk.page import Page
from copydesk.predictor import Document, Predictor
from copydesk.saved import read_manifest
from train import evaluate as evaluate_stage
from train import fit as fit_stage
from train import prepare as prepare_stage
from train import release as release_stage
from train.arguments import load_experiment
from train.baseline import BaselinePredictor
from train.checkpoints import CheckpointError
from train.config import Experiment
from train.evaluate import evaluate, load_predictor
from train.fit import fit
from train.prepare import prepare
from train.publish import RELEASED, publish
from train.release import release
from train.rows import load_rows

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "data/sample/pages/harwickcourier/hospice-finance-chief-jailed.html").read_text("utf-8")
FIGURES = {"confusion.png", "precision_recall_labels.png", "precision_recall_topics.png", "reliability.png"}
pytestmark = pytest.mark.usefixtures("workplace")


def run_chain(*overrides: str) -> tuple[Experiment, dict[str, float]]:
    experiment = load_experiment("tiny.yaml", list(overrides))
    prepare(experiment)
    fit(experiment)
    release(experiment)
    return experiment, evaluate(experiment)


def check_page(page: Page) -> None:
    assert len(page.sections) > 10
    assert all(page.text[section.start : section.end] == section.text for section in page.sections)
    assert all(sum(section.scores.model_dump().values()) == pytest.approx(1, abs=1e-3) for section in page.sections)
    assert len({section.label for section in page.sections}) > 1


def check_scores(scores: dict[str, float], experiment: Experiment) -> None:
    assert scores["pages"] == len(load_rows(experiment.prepared, "pages", "validation"))
    assert scores["articles"] == len(load_rows(experiment.prepared, "articles", "validation"))
    assert all(np.isfinite(value) for value in scores.values())
    for name in ("macro_f1", "body_f1", "paywall_f1", "body_word_f1", "body_4gram_f1", "topics_micro_f1"):
        assert 0 <= scores[f"{name}_low"] <= scores[f"{name}_high"] <= 1
        assert 0 <= scores[f"as_text_{name}"] <= 1
        assert 0 <= scores[f"english_news_{name}"] <= 1
    written = json.loads((experiment.evaluated / "scores.json").read_text("utf-8"))
    assert written["scores"] == scores
    assert written["split"] == "validation"
    assert {path.name for path in experiment.evaluated.iterdir()} == {
        "README.md",
        "report.html",
        "scores.json",
        *FIGURES,
    }
    assert {row["slice"] for row in written["tables"]["slices"]} >= {"all", "english news", "source: sample"}
    assert [row["label"] for row in written["tables"]["labels"]] == ["body", "boilerplate", "paywall", "sponsored"]
    assert len(written["tables"]["topics"]) == 28
    assert scores["pages_per_second"] == scores["pages"] / scores["seconds"] > 0
    report = (experiment.evaluated / "report.html").read_text("utf-8")
    assert "<h2>Worst pages</h2>" in report
    assert f"{scores['pages_per_second']:.1f} pages a second" in report


def check_run(experiment: Experiment, scores: dict[str, float]) -> None:
    """Find all four stages in the one MLflow run."""
    store = MlflowClient(tracking_uri=f"sqlite:///{Path('mlflow.db').absolute()}")
    run_id = json.loads((experiment.fitted / "run.json").read_text("utf-8"))["run_id"]
    run = store.get_run(run_id)

    assert run.info.status == "FINISHED"
    assert run.data.tags["kind"] == experiment.fit.kind
    assert run.data.metrics["validation/macro_f1"] == pytest.approx(scores["macro_f1"])
    assert run.data.metrics["validation/body_4gram_f1_low"] == pytest.approx(scores["body_4gram_f1_low"])
    assert run.data.metrics["release/held_out_section_ece"] >= 0
    assert {entry.dataset.name for entry in run.inputs.dataset_inputs} == {
        f"{kind}-{split}" for kind in ("pages", "articles") for split in ("train", "validation", "test")
    }
    figures = {Path(entry.path).name for entry in store.list_artifacts(run_id, "figures")}
    assert figures == {f"validation_{name}" for name in FIGURES}
    shown = {entry.path for entry in store.list_artifacts(run_id, "validation")}
    assert shown == {"validation/README.md", "validation/report.html"}


def test_a_transformer_goes_through_all_stages_and_reads_a_page():
    experiment, scores = run_chain("fit.epochs=4", "fit.tokens_per_batch=3_000")  # enough to tell two labels apart

    check_scores(scores, experiment)
    check_run(experiment, scores)
    desk = copydesk.load(experiment.released)
    assert isinstance(desk, Predictor)
    (page,) = desk.predict([PAGE])
    check_page(page)
    assert page == desk.predict_one(PAGE)
    manifest = read_manifest(experiment.released)
    assert (page.model.name, page.model.version) == ("tiny", manifest.version)
    assert set(manifest.run) == {
        "experiment",
        "git_commit",
        "fit_sha256",
        "trained_on",
        "mlflow_run_id",
        *(f"data/{kind}/{split}" for kind in ("pages", "articles") for split in ("train", "validation", "test")),
    }
    card = (experiment.released / "README.md").read_text("utf-8")
    assert "| kind | transformer |" in card
    assert not re.search(r"\bnan\b", card)


def test_the_baseline_goes_through_the_same_stages():
    experiment, scores = run_chain("fit={kind: baseline}", "name=base")

    check_scores(scores, experiment)
    check_run(experiment, scores)
    desk = load_predictor(experiment)
    assert isinstance(desk, BaselinePredictor)
    (page,) = desk.predict([Document(PAGE, source="a.html", url="https://paper.com/a")])
    check_page(page)
    assert (page.source, page.url, page.model.name) == ("a.html", "https://paper.com/a", "tiny")
    assert scores["macro_f1"] > 0.3  # words and tags of 20 pages are enough for that
    assert "| kind | baseline |" in (experiment.released / "README.md").read_text("utf-8")


def test_a_released_baseline_scores_its_validation_rows_as_the_fitted_one():
    experiment = load_experiment("tiny.yaml", ["fit={kind: baseline}"])
    fit(experiment)
    release(experiment)

    desk = load_predictor(experiment)
    rows = load_rows(experiment.prepared, "pages", "validation")
    pages = [copydesk.split.split(row["content"], kind=row["kind"]) for row in rows]
    with np.load(experiment.fitted / "held_out.npz") as held_out:
        np.testing.assert_allclose(desk.model.section_logits(pages), held_out["section_logits"])


def test_test_is_read_only_when_asked_for_and_each_read_is_counted():
    experiment = load_experiment("tiny.yaml", ["fit={kind: baseline}"])
    fit(experiment)
    release(experiment)

    assert "reads" not in evaluate(experiment)
    assert not Path("bench").exists()
    Path("bench").mkdir()
    Path("bench/test_reads.jsonl").write_text('{"experiment": "other"}\n', "utf-8")
    scores = evaluate(load_experiment("tiny.yaml", ["fit={kind: baseline}", "evaluate.split=test"]))
    assert scores["reads"] == 2
    assert scores["pages"] == len(load_rows(experiment.prepared, "pages", "test"))
    reads = [json.loads(line) for line in Path("bench/test_reads.jsonl").read_text("utf-8").splitlines()]
    assert [read["experiment"] for read in reads] == ["other", "tiny"]


@pytest.mark.parametrize("split_name", ["validation", "test"])
def test_publishing_copies_the_released_folder_and_adds_its_scores(split_name):
    experiment = load_experiment("tiny.yaml", ["fit.epochs=1", f"evaluate.split={split_name}"])
    fit(experiment)
    release(experiment)

    assert publish(experiment) == RELEASED
    assert read_manifest(RELEASED) == read_manifest(experiment.released)
    assert copydesk.load(RELEASED).predict_one(PAGE).sections
    card = (RELEASED / "README.md").read_text("utf-8")
    assert ModelCard((experiment.released / "README.md").read_text("utf-8")).text in card
    assert f"of the {split_name} split" in card
    assert {result.dataset_split for result in ModelCard(card).data.eval_results} == {split_name}
    assert not (RELEASED / "report.html").exists()
    assert Path("bench/test_reads.jsonl").exists() == (split_name == "test")


def test_a_copy_that_fails_leaves_the_published_model(monkeypatch):
    experiment = load_experiment("tiny.yaml", ["fit.epochs=1"])
    fit(experiment)
    release(experiment)
    RELEASED.mkdir(parents=True)
    (RELEASED / "model.json").write_text("published")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(CheckpointError, match=r"cannot write models/released: .*No space left .*: make room"):
        publish(experiment)
    assert [path.name for path in RELEASED.iterdir()] == ["model.json"]


def test_evaluating_before_releasing_says_what_to_run():
    with pytest.raises(FileNotFoundError, match=r"run `python -m train\.release`"):
        evaluate(load_experiment("tiny.yaml"))


@pytest.mark.parametrize("stage", [fit_stage, release_stage, evaluate_stage], ids=lambda module: module.__name__)
def test_a_stage_out_of_turn_ends_with_one_line_that_says_what_is_missing(stage, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage", "--config", "tiny.yaml", "--set", "name=other"])

    with pytest.raises(SystemExit, match=rf"^{stage.__name__.removeprefix('train.')}: there is no .*run `python -m "):
        stage.main()


def test_preparing_from_the_command_line_reports_counts(monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["prepare", "--config", "tiny.yaml"])
    with caplog.at_level("INFO"):
        prepare_stage.main()

    assert "train: " in caplog.text
    assert "0 quarantined, 0 duplicates dropped" in caplog.text
