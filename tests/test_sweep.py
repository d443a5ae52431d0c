"""A sweep finishes as many trials as told, whatever ends it in between, and says which one is best."""

import json
import os
import signal
import sys
from multiprocessing.context import ForkServerContext
from pathlib import Path

import optuna
import pytest
import torch
from mlflow.entities import Run as StoredRun
from optuna.trial import TrialState

from train import study as study_module
from train import sweep, trainer
from train.config import Experiment, load_experiment
from train.store import connect

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
    """Search, and be killed in the training of the second trial; the body of a process."""
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = Path("output.txt").open("a", encoding="utf-8")
    evaluate, step = sweep.evaluate, trainer.CopydeskTrainer.training_step

    def die(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGKILL)

    def evaluate_then_die(experiment: Experiment) -> dict[str, float]:
        scores = evaluate(experiment)
        trainer.CopydeskTrainer.training_step = die
        return scores

    sweep.evaluate = evaluate_then_die
    assert step is not die
    sweep.search(load_experiment("tiny.yaml", SEARCHED), num_trials=3)


def test_a_sweep_that_is_killed_and_resumed_finishes_all_trials_once(
    workplace: Path, apart: ForkServerContext, monkeypatch: pytest.MonkeyPatch
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
    assert [run.info.status for run in below] == ["FINISHED", "FAILED", "FINISHED", "FINISHED"]
    assert parent.data.metrics["validation/macro_f1"] == best.value == max(trial.value for trial in finished)
    assert [path.name for path in Path("models/tiny/sweep").iterdir()] == ["best.yaml"]
    written = load_experiment("models/tiny/sweep/best.yaml")
    assert written.fit.head_learning_rate == best.params["fit.head_learning_rate"]
    assert written.prepared == Path("data/prepared/tiny")
