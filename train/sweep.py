"""Sweeps: many trials of one experiment, or one experiment under several seeds, on the same prepared splits.

Knows that a trial is fit → release → evaluate, and what of it is kept: its MLflow run, under the sweep's own, and the
best settings as a config, `models/NAME/sweep/best.yaml`. Which trial is next, `train.study` knows.
"""

import json
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError
from transformers import TrainerCallback

from train import tracking
from train.arguments import experiment_of, stage_parser
from train.config import Experiment, Trial, value_of, with_settings
from train.evaluate import evaluate
from train.fit import fit, hashes_of_what_is_read
from train.metrics import bootstrap
from train.prepare import prepare
from train.release import release
from train.sender import replay
from train.study import FINISHED, Pruning, StudyError, open_study, run_trials, suggest

log = logging.getLogger(__name__)

STORAGE = "sqlite:///sweeps.db"
SEED = "fit.seed"
_PARENT, _SCORES, _SAMPLES = "parent", "scores", 10_000
_NOT_AVERAGED = ("_low", "_high", "pages", "sections", "articles")
"""How the names of numbers end that are counts or intervals."""


def search(experiment: Experiment, *, num_trials: int, storage: str = STORAGE) -> FrozenTrial | None:
    """Search the settings of `experiment.sweep`; return the best trial, whose config is then in `best.yaml`.

    Args:
        experiment: what the trials have in common, and the search space.
        num_trials: how many are to be finished, earlier ones counted; processes that share the storage share them.
        storage: where the study is kept.

    Raises:
        StudyError: the config has no search space, or the study cannot be had or continued.
    """
    space = experiment.sweep
    if not space:
        raise StudyError("the config has no top key `sweep`: the README says how a search space is written")
    study, parent = _open(experiment, f"{experiment.name}-sweep", storage=storage)

    def objective(trial: optuna.Trial) -> float:
        values = suggest(trial, space, whole=lambda name: isinstance(value_of(experiment, name), int))
        return _score(_trial(experiment, trial.number, values, parent=parent), trial, callbacks=[Pruning(trial)])

    with tracking.parent_run(experiment, parent, title=study.study_name) as run:
        run.flush()  # the trials' runs wait for it
        _send_what_is_left(experiment, study)
        for num_finished in run_trials(study, objective, total=num_trials, sweep=space):
            _log_best(experiment, study, run, num_finished=num_finished)
    return _best(study)


def repeat(experiment: Experiment, *, num_seeds: int, storage: str = STORAGE) -> dict[str, float]:
    """Run one experiment under several seeds, `fit.seed` and those above it; return what `spread` says of its scores.

    Raises:
        StudyError: the study cannot be had or continued.
    """
    experiment = experiment.model_copy(update={"sweep": None})
    study, parent = _open(experiment, f"{experiment.name}-seeds", storage=storage)
    for seed in range(experiment.fit.seed, experiment.fit.seed + num_seeds):
        study.enqueue_trial({SEED: seed}, skip_if_exists=True)

    def objective(trial: optuna.Trial) -> float:
        seed = trial.suggest_int(SEED, experiment.fit.seed, experiment.fit.seed + num_seeds - 1)
        return _score(_trial(experiment, trial.number, {SEED: seed}, parent=parent), trial)

    with tracking.parent_run(experiment, parent, title=study.study_name) as run:
        run.flush()
        _send_what_is_left(experiment, study)
        for num_finished in run_trials(study, objective, total=num_seeds, sweep=None):
            log.info("%d of %d seeds", num_finished, num_seeds)
        numbers = spread([trial.user_attrs[_SCORES] for trial in study.get_trials(states=(TrialState.COMPLETE,))])
        run.log_metrics({f"{experiment.evaluate.split}/{name}": value for name, value in numbers.items()})
        run.log_text(json.dumps(numbers, indent=1) + "\n", "seeds.json")
    return numbers


def spread(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Say how scores differ between runs: NAME_mean, NAME_sd, and NAME_low, NAME_high of each that is no count.

    The standard deviation is that of a sample; low and high are ends of the 95 % interval of the mean, by bootstrap
    over the runs. It tells nothing of other pages: those of each run do.

    Args:
        scores: by name, of each run.
    """
    names = [name for name in scores[0] if not name.endswith(_NOT_AVERAGED)]
    values = np.array([[run[name] for name in names] for run in scores])
    runs = [str(number) for number in range(len(scores))]
    low, high = bootstrap(runs, lambda weights: weights @ values / weights.sum(), samples=_SAMPLES, seed=0)
    columns = {"mean": values.mean(axis=0), "sd": values.std(axis=0, ddof=1), "low": low, "high": high}
    numbers = {f"{name}_{kind}": float(column[i]) for i, name in enumerate(names) for kind, column in columns.items()}
    return {"runs": float(len(scores)), **numbers}


def _open(experiment: Experiment, name: str, *, storage: str) -> tuple[optuna.Study, str]:
    """Open the study, and return the journal of its run too."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise StudyError("a sweep does not run under torchrun: start several sweeps with one --storage instead")
    if experiment.evaluate.split != "validation":
        raise StudyError("evaluate.split is test, which chooses nothing: set it to validation")
    if experiment.is_refit:
        raise StudyError("fit.refit trains on validation, by which trials are compared: set it to false")
    if not (experiment.prepared / "report.json").is_file():
        prepare(experiment)
    made_of = tracking.flatten(experiment.model_dump(mode="json")) | hashes_of_what_is_read(experiment)

    def clear(dead: FrozenTrial) -> None:
        trial = _trial(experiment, dead.number, dead.params, parent=study.user_attrs[_PARENT])
        if trial.fitted.is_dir():  # else it ran elsewhere
            tracking.continue_run(trial).finish("FAILED")
            shutil.rmtree(trial.folder)

    study = open_study(name, storage=storage, made_of=made_of, when_dead=clear)
    if _PARENT not in study.user_attrs:
        study.set_user_attr(_PARENT, uuid.uuid4().hex)
    return study, study.user_attrs[_PARENT]


def _send_what_is_left(experiment: Experiment, study: optuna.Study) -> None:
    """Send what finished trials logged in a process that died before all was sent."""
    parent = study.user_attrs[_PARENT]
    finished = study.get_trials(deepcopy=False, states=FINISHED)
    titles = {f"{experiment.name}-{_name(trial.number, trial.params)}" for trial in finished}
    replay(wanted=lambda entry: entry.get("parent") == parent and entry["name"] in titles)


def _name(number: int, values: Mapping[str, Any]) -> str:
    return f"seed-{values[SEED]}" if set(values) == {SEED} else f"trial-{number}"


def _trial(experiment: Experiment, number: int, values: Mapping[str, Any], *, parent: str) -> Trial:
    """Return what a trial runs: the experiment with other values, and no place in the registry.

    Raises:
        TrialPruned: each value is possible, but not all together.
    """
    content = with_settings(experiment, {**values, "release.register_model": False})
    try:
        return Trial.model_validate({**content, "trial": _name(number, values), "parent": parent})
    except ValidationError as error:
        faults = "; ".join(fault["msg"] for fault in error.errors())
        log.warning("trial %d is passed over, its values %s do not go together: %s", number, dict(values), faults)
        raise optuna.TrialPruned(faults) from error


def _score(experiment: Trial, trial: optuna.Trial, *, callbacks: Sequence[TrainerCallback] = ()) -> float:
    """Run the stages and return macro F1 on validation. What is worth keeping of a trial is logged: no file stays."""
    log.info("%s: %s", experiment.title, trial.params)
    try:
        fit(experiment, callbacks=callbacks)
        release(experiment)
        scores = evaluate(experiment)
    except optuna.TrialPruned as pruned:
        log.info("%s pruned: %s", experiment.title, pruned)
        with tracking.continue_run(experiment) as run:
            run.log_tag("pruned", str(pruned))
        raise
    finally:
        shutil.rmtree(experiment.folder, ignore_errors=True)
    trial.set_user_attr(_SCORES, scores)
    log.info("%s: macro F1 %.4f", experiment.title, scores["macro_f1"])
    return scores["macro_f1"]


def _best(study: optuna.Study) -> FrozenTrial | None:
    return study.best_trial if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) else None


def _log_best(experiment: Experiment, study: optuna.Study, run: tracking.Run, *, num_finished: int) -> None:
    """Write the best config so far, and log it and its scores under the sweep's run."""
    best = _best(study)
    if not best:
        return
    content = yaml.safe_dump(with_settings(experiment, best.params), sort_keys=False, allow_unicode=True)
    head = f"# Best of {num_finished} trials, {best.number}: validation macro F1 {best.value:.4f}\n"
    folder = experiment.folder / "sweep"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "best.yaml").write_text(head + content, "utf-8")
    run.log_text(head + content, "best.yaml")
    scores = {f"{experiment.evaluate.split}/{name}": value for name, value in best.user_attrs[_SCORES].items()}
    run.log_metrics({**scores, "sweep/best_trial": best.number, "sweep/finished": num_finished}, num_finished)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = stage_parser("Run many trials of one experiment, or one experiment under several seeds.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--trials", type=int, metavar="N", help="search the config's `sweep` until N trials are finished")
    what.add_argument("--seeds", type=int, metavar="K", help="run the config under K seeds")
    parser.add_argument("--storage", default=STORAGE, metavar="URL", help="database of the study; default: %(default)s")
    options = parser.parse_args(arguments)
    for name, least in (("trials", 1), ("seeds", 2)):
        if (given := getattr(options, name)) is not None and given < least:
            parser.error(f"--{name} is {given}, expected at least {least}")
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    datasets.disable_progress_bars()
    experiment = experiment_of(options, parser)
    try:
        if options.seeds:
            numbers = repeat(experiment, num_seeds=options.seeds, storage=options.storage)
            log.info("macro F1 %.4f, standard deviation %.4f", numbers["macro_f1_mean"], numbers["macro_f1_sd"])
        elif best := search(experiment, num_trials=options.trials, storage=options.storage):
            log.info("best macro F1 %.4f: %s/sweep/best.yaml", best.value, experiment.folder)
    except (ValueError, OSError) as error:
        sys.exit(f"sweep: {error}")


if __name__ == "__main__":
    main()
