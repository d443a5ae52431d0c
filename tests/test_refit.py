"""A refit learns from validation too, keeps what was chosen before it, and cannot be judged by it."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from copydesk.saved import read_description, read_manifest
from train.arguments import load_experiment
from train.config import Experiment
from train.evaluate import evaluate
from train.fit import fit
from train.fitting import Fitting
from train.prepare import prepare
from train.release import release
from train.rows import load_rows

pytestmark = pytest.mark.usefixtures("workplace")


def tiny(*overrides: str) -> Experiment:
    return load_experiment("tiny.yaml", ["fit.epochs=1", *overrides])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_it_learns_from_validation_too_and_is_calibrated_as_the_model_before_it(monkeypatch: pytest.MonkeyPatch):
    learnt, run = [], Fitting.run

    def spy(self: Fitting, train, validation, **settings):
        learnt.append(({page.id for page in train.pages}, {article.id for article in train.articles}, validation))
        return run(self, train, validation, **settings)

    monkeypatch.setattr(Fitting, "run", spy)
    before, after = tiny(), tiny("fit.refit=true")
    fit(before)
    as_before = files_of(before.fitted)
    summary = fit(after)
    release(before)
    release(after)

    rows = {kind: [load_rows(before.prepared, kind, name) for name in after.learnt] for kind in ("pages", "articles")}
    ids = {kind: {row["id"] for split in splits for row in split} for kind, splits in rows.items()}
    (pages_before, _, _), (pages, articles, validation) = learnt
    assert pages == ids["pages"] > pages_before
    assert ids["articles"] <= articles
    assert validation is None
    assert summary["best_step"] == summary["steps"]
    assert summary["validation_macro_f1"] is None

    assert after.folder == before.folder / "refit"
    assert files_of(before.fitted) == as_before
    with np.load(before.fitted / "held_out.npz") as first, np.load(after.fitted / "held_out.npz") as second:
        assert all(np.array_equal(first[name], second[name]) for name in first)
    descriptions = [read_description(experiment.released) for experiment in (before, after)]
    for name in ("thresholds", "section_temperature", "topic_temperature"):
        assert getattr(descriptions[0], name) == getattr(descriptions[1], name)
    weights = [load_file(experiment.fitted / "trained.safetensors") for experiment in (before, after)]
    assert not weights[0]["section_heads.0.weight"].equal(weights[1]["section_heads.0.weight"])
    trained_on = [read_manifest(experiment.released).run["trained_on"] for experiment in (before, after)]
    assert trained_on == ["train", "train, validation"]


def test_only_test_can_judge_it(workplace: Path):
    fit(tiny())
    refit = tiny("fit.refit=true")
    fit(refit)
    release(refit)

    with pytest.raises(
        ValueError, match=r"refit trained on validation .*: test\. What validation says .*tiny/evaluation"
    ):
        evaluate(refit)
    assert not (workplace / "bench" / "test_reads.jsonl").exists()

    evaluate(tiny("fit.refit=true", "evaluate.split=test"))
    assert json.loads((workplace / "bench" / "test_reads.jsonl").read_text("utf-8"))["experiment"] == "tiny-refit"


def test_what_validation_has_not_judged_is_not_fitted_again():
    with pytest.raises(FileNotFoundError, match=r"models/tiny/fit/fit\.json.*run the stages without fit\.refit"):
        fit(tiny("fit.refit=true"))
    fit(tiny())
    with pytest.raises(ValueError, match=r"fitted with other fit\.head_learning_rate: .*restore them"):
        fit(tiny("fit.refit=true", "fit.head_learning_rate=0.5"))
    fit(tiny("fit.refit=true", "fit.seed=1"))

    prepare(load_experiment("tiny.yaml", ["prepare.seed=1"]))
    with pytest.raises(ValueError, match=r"fitted with other data/prepared/tiny/articles/"):
        fit(tiny("fit.refit=true"))
