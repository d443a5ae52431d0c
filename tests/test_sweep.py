"""A sweep finishes as many trials as told, whatever ends it in between, and says which one is best."""

import json
import os
import signal
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from mlflow.entities import Run as StoredRun
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from train import fitting, sweep, trainer
from train import study as study_module
from train.arguments import load_experiment
from train.config import Experiment
from train.store import connect
from train.study import StudyError

SPACE = "{fit.head_learning_rate: {low: 1e-3, high: 1e-1, log: true}, fit.network.page_layers: {low: 0, high: 1}}"
SEARCHED = ["fit.epochs=1", f"sweep={{settings: {SPACE}}}"]
BASELINE = ["fit={kind: baseline}", "sweep={settings: {fit.inverse_regularisation: {low: 0.1, high: 10, log: true}}}"]


def runs_of(parent_title: str) -> tuple[StoredRun, list[StoredRun]]:
    """Return the sweep's run and those of its trials, oldest first."""
    store, experiment_id = connect()
    (parent,) = store.search_runs([experiment_id], f"attributes.run_name = '{parent_title}'")
    below = store.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return parent, sorted(below, key=lambda run: run.info.start_time)


def trials_of(name: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=name, storage=sweep.STORAGE).get_trials()


def search_and_die(folder: Path) -> None:
    """Search without a store, and be killed in the training of the second trial; the body of a process."""
    os.chdir(folder)
    os.environ["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:9"
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = Path("output.txt").open("a", encoding="utf-8")
    evaluate = sweep.evaluate

    def die(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGKILL)

    def evaluate_then_die(experiment: Experiment) -> dict[str, float]:
        scores = evaluate(experiment)
        trainer.CopydeskTrainer.training_step = die
        return scores

    sweep.evaluate = evaluate_then_die
    sweep.search(load_experiment("tiny.yaml", SEARCHED), num_trials=3)


def test_a_sweep_that_is_killed_and_resumed_finishes_all_trials_once(
    workplace: Path, apart: ForkServerContext, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    killed = apart.Process(target=search_and_die, args=(workplace,))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL, Path("output.txt").read_text()
    before = trials_of("tiny-sweep")
    assert [trial.state for trial in before] == [TrialState.COMPLETE, TrialState.RUNNING]

    monkeypatch.setattr(study_module, "HEARTBEAT", 1)
    monkeypatch.setattr(study_module, "GRACE", 2)
    best = sweep.search(load_experiment("tiny.yaml", SEARCHED), num_trials=3)

    after = trials_of("tiny-sweep")
    finished = [trial for trial in after if trial.state in study_module.FINISHED]
    assert after[1].state == TrialState.FAIL
    assert len(finished) == 3
    assert after[0] == before[0]
    assert [trial.params for trial in finished].count(before[1].params) == 1
    assert len({json.dumps(trial.params) for trial in finished}) == 3
    parent, below = runs_of("tiny-sweep")
    assert parent.info.status == "FINISHED"
    said = Path("output.txt").read_text("utf-8")
    assert [run.info.status for run in below] == ["FINISHED", "FAILED", "FINISHED", "FINISHED"], said
    assert "open in another process" not in caplog.text
    assert parent.data.metrics["validation/macro_f1"] == best.value == max(trial.value for trial in finished)
    assert [path.name for path in Path("models/tiny/sweep").iterdir()] == ["best.yaml"]
    written = load_experiment("models/tiny/sweep/best.yaml")
    assert written.fit.head_learning_rate == best.params["fit.head_learning_rate"]
    assert written.prepared == Path("data/prepared/tiny")


def test_a_trial_below_the_others_median_is_pruned(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    given, score = iter([0.5, 0.5, 0.1]), fitting.validation_scores
    monkeypatch.setattr(fitting, "validation_scores", lambda *rows: score(*rows) | {"eval_step_macro_f1": next(given)})
    space = f"sweep={{settings: {SPACE}, startup_trials: 1}}"

    best = sweep.search(load_experiment("tiny.yaml", ["fit.epochs=2", space]), num_trials=2)

    whole, pruned = trials_of("tiny-sweep")
    assert (best.number, whole.state, pruned.state) == (0, TrialState.COMPLETE, TrialState.PRUNED)
    assert (whole.intermediate_values, pruned.intermediate_values) == ({1: 0.5, 2: 0.5}, {1: 0.1})
    _, below = runs_of("tiny-sweep")
    assert [run.info.status for run in below] == ["FINISHED", "FINISHED"]
    assert [run.data.tags.get("pruned") for run in below] == [None, "macro F1 0.1000 after epoch 1"]
    assert "validation/macro_f1" not in below[1].data.metrics


def test_seeds_stand_under_one_run_with_mean_deviation_and_interval(workplace: Path):
    experiment = load_experiment("tiny.yaml", ["fit.epochs=1", "fit.seed=3"])

    numbers = sweep.repeat(experiment, num_seeds=2)

    parent, below = runs_of("tiny-seeds")
    assert [run.info.run_name for run in below] == ["tiny-seed-3", "tiny-seed-4"]
    assert [run.data.params["fit.seed"] for run in below] == ["3", "4"]
    for name in ("macro_f1", "body_word_f1", "as_text_paywall_f1"):
        seen = [run.data.metrics[f"validation/{name}"] for run in below]
        mean, deviation, low, high = (parent.data.metrics[f"validation/{name}_{kind}"] for kind in KINDS)
        assert mean == pytest.approx(np.mean(seen))
        assert deviation == pytest.approx(np.std(seen, ddof=1))
        assert (low, high) == pytest.approx((min(seen), max(seen)))  # of two runs
    assert sweep.repeat(experiment, num_seeds=2) == numbers
    assert len(runs_of("tiny-seeds")[1]) == 2


KINDS = ("mean", "sd", "low", "high")


def test_the_interval_of_seeds_is_that_of_resampled_means():
    random = np.random.default_rng(1)
    values = random.normal(0.7, 0.05, size=5)
    runs = [{"macro_f1": value, "macro_f1_low": 0.0, "pages": 9.0} for value in values.tolist()]

    found = sweep.spread(runs)

    assert set(found) == {"runs", *(f"macro_f1_{kind}" for kind in KINDS)}
    means = values[random.integers(5, size=(50_000, 5))].mean(axis=1)
    expected = [values.mean(), values.std(ddof=1), *np.quantile(means, [0.025, 0.975])]
    assert [found[f"macro_f1_{kind}"] for kind in KINDS] == pytest.approx(expected, abs=0.002)


def test_what_is_finished_is_not_done_again_and_other_settings_are_refused(workplace: Path):
    experiment = load_experiment("tiny.yaml", BASELINE)
    first = sweep.search(experiment, num_trials=1)

    assert sweep.search(experiment, num_trials=1) == first
    assert len(trials_of("tiny-sweep")) == 1
    with pytest.raises(
        StudyError, match=r"begun with other evaluate\.bootstrap_samples: restore them, or name another"
    ):
        sweep.search(load_experiment("tiny.yaml", [*BASELINE, "evaluate.bootstrap_samples=21"]), num_trials=2)
    with (workplace / "data/prepared/tiny/pages/train.parquet").open("ab") as file:
        file.write(b"0")
    with pytest.raises(StudyError, match=r"begun with other data/prepared/tiny/pages/train\.parquet"):
        sweep.search(experiment, num_trials=2)


def test_a_trial_that_fails_ends_the_sweep_and_is_tried_again(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    experiment = load_experiment("tiny.yaml", BASELINE)
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "evaluate", lambda _: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OSError, match="the disk is full"):
            sweep.search(experiment, num_trials=1)

    sweep.search(experiment, num_trials=1)

    failed, again = trials_of("tiny-sweep")
    assert (failed.state, again.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert failed.params == again.params


def test_values_that_do_not_go_together_are_passed_over(workplace: Path, caplog: pytest.LogCaptureFixture):
    values = {"fit.network.window_sections": 100, "fit.network.window_overlap": 100}

    with pytest.raises(optuna.TrialPruned, match="window_overlap must be smaller"):
        sweep._trial(load_experiment("tiny.yaml"), 7, values, parent="")
    assert "trial 7 is passed over" in caplog.text


def test_a_sweep_that_passed_values_over_is_resumed(workplace: Path):
    settings = (
        "{fit.network.window_sections: {choices: [300, 1024]}, fit.network.window_overlap: {choices: [256, 900]}}"
    )
    experiment = load_experiment("tiny.yaml", [f"sweep={{settings: {settings}}}"])
    study, _ = sweep._open(experiment, "tiny-sweep", storage=sweep.STORAGE)
    values = {"fit.network.window_sections": 300, "fit.network.window_overlap": 900}
    spaces = {name: CategoricalDistribution(experiment.sweep.settings[name].choices) for name in values}
    study.add_trial(optuna.trial.create_trial(state=TrialState.PRUNED, params=values, distributions=spaces))

    assert sweep.search(experiment, num_trials=1) is None
    assert len(trials_of("tiny-sweep")) == 1


def test_a_sweep_that_cannot_be_is_refused_with_what_to_do(workplace: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(StudyError, match="no top key `sweep`"):
        sweep.search(load_experiment("tiny.yaml"), num_trials=1)
    with pytest.raises(StudyError, match=r"evaluate\.split is test"):
        sweep.search(load_experiment("tiny.yaml", [*BASELINE, "evaluate.split=test"]), num_trials=1)
    with pytest.raises(StudyError, match=r"fit\.refit trains on validation"):
        sweep.repeat(load_experiment("tiny.yaml", ["fit.refit=true"]), num_seeds=2)
    for storage in ("nonsense", "sqlite:////nowhere/sweeps.db"):
        with pytest.raises(SystemExit, match=f"^sweep: the storage {storage} cannot be used"):
            sweep.main(["--config", "tiny.yaml", "--seeds", "2", "--storage", storage])
    with pytest.raises(SystemExit, match="2"):
        sweep.main(["--config", "tiny.yaml", "--trials", "0"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StudyError, match="torchrun"):
        sweep.repeat(load_experiment("tiny.yaml"), num_seeds=2)


def test_what_is_wrong_with_a_storage_is_said_without_its_password():
    shown = study_module.without_password("postgresql+psycopg://me:se:cret@host/db")

    assert shown == "postgresql+psycopg://me:***@host/db"
    assert study_module.without_password(sweep.STORAGE) == sweep.STORAGE
