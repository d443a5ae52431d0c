"""The study of a sweep: which trial is next, which one is finished, which one died.

Knows Optuna and its storage, which many processes may share; knows nothing of stages, folders or MLflow.
"""

import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError, TrialPruned
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from train.config import Range, Sweep
from train.fitting import SCORE

log = logging.getLogger(__name__)

HEARTBEAT, GRACE = 30, 120
"""Seconds between a running trial's signs of life, and without one until it counts as dead."""
MAX_RETRIES = 3
"""How often the values of a trial that died or failed are tried again."""
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_MADE_OF = "made_of"
Objective = Callable[[Trial], float]


class StudyError(ValueError):
    """A study cannot be had, or is about something else. The message says what to do."""


@contextmanager
def _known_to_be_experimental() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # signs of life, since Optuna 2.8
        yield


def open_study(
    name: str, *, storage: str, made_of: Mapping[str, Any], when_dead: Callable[[FrozenTrial], None]
) -> optuna.Study:
    """Open a study, made where it is missing.

    Args:
        name: of the study.
        storage: a database that SQLAlchemy knows, e.g. `sqlite:///sweeps.db`.
        made_of: settings and hashes that all trials have in common.
        when_dead: called with a trial that gave no sign of life, before its values are queued again.

    Raises:
        StudyError: there is no such storage, or its trials have something else in common.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def dead(study: optuna.Study, trial: FrozenTrial) -> None:
        log.warning("trial %d died: its values are queued again", trial.number)
        when_dead(trial)
        queue_again(study, trial)

    try:
        with _known_to_be_experimental():
            database = RDBStorage(
                storage,
                # SQLite lets one write at a time: the others wait, by default not long.
                engine_kwargs={"connect_args": {"timeout": 60}} if storage.startswith("sqlite:") else None,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=dead,
            )
        pruner = optuna.pruners.NopPruner()
        study = optuna.create_study(
            study_name=name, storage=database, load_if_exists=True, direction="maximize", pruner=pruner
        )
    except (SQLAlchemyError, OptunaError, ImportError, OSError) as error:
        raise StudyError(
            f"the storage {without_password(storage)} cannot be used: {error}. Expected the address of a database, "
            "e.g. sqlite:///sweeps.db, or postgresql+psycopg://USER:PASSWORD@HOST/NAME with `pip install "
            "'psycopg[binary]'`"
        ) from error
    before = study.user_attrs.get(_MADE_OF)
    if before is None:
        study.set_user_attr(_MADE_OF, dict(made_of))
    elif changed := sorted(key for key in before.keys() | made_of.keys() if before.get(key) != made_of.get(key)):
        raise StudyError(
            f"the study {name} in {without_password(storage)} was begun with other {', '.join(changed)}: "
            "restore them, or name another --storage"
        )
    return study


def without_password(storage: str) -> str:
    """Return the address of a database as it may be shown."""
    return re.sub(r"://([^:/@]*):[^@]*@", r"://\1:***@", storage)


def queue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue the values of a trial once more, unless they were tried often enough."""
    with _known_to_be_experimental():
        RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES)(study, trial)


def run_trials(study: optuna.Study, objective: Objective, *, total: int, sweep: Sweep | None) -> Iterator[int]:
    """Run trials until so many are finished, those of other processes and earlier calls counted.

    A trial that raises is queued again, and ends this. The last trials of other processes are waited for: one may be
    dead.

    Args:
        study: which ones there are.
        objective: from a trial to its score.
        total: trials that are to be finished.
        sweep: how values are drawn and trials pruned; without it, they are queued and never pruned.

    Yields:
        How many trials are finished, before the first one and after each one.
    """
    waiting = False
    while True:
        with _known_to_be_experimental():
            fail_stale_trials(study)
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        finished, running = sum(state in FINISHED for state in states), states.count(TrialState.RUNNING)
        if not waiting:
            yield finished
        if finished >= total:
            return
        if finished + running < total:
            waiting = False
            if sweep:
                draw_and_prune(study, sweep, count=len(states))
            _run_one(study, objective)
            continue
        if not waiting:
            log.info("waiting for %d trials that run elsewhere, or died less than %d s ago", running, GRACE)
        waiting = True
        time.sleep(min(HEARTBEAT, 5))


def draw_and_prune(study: optuna.Study, sweep: Sweep, *, count: int) -> None:
    """Set how values are drawn and trials pruned.

    Args:
        study: to set it of.
        sweep: the settings.
        count: of trials so far. It is part of the seed: else a continued study would draw its first values again.
    """
    seed = int(np.random.SeedSequence([sweep.seed, count]).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=sweep.startup_trials, seed=seed)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=sweep.startup_trials)


def _run_one(study: optuna.Study, objective: Objective) -> None:
    begun: list[int] = []

    def noted(trial: Trial) -> float:
        begun.append(trial.number)
        return objective(trial)

    try:
        study.optimize(noted, n_trials=1, gc_after_trial=True)
    except (Exception, KeyboardInterrupt):
        for trial in study.get_trials(states=(TrialState.FAIL,)):
            if trial.number in begun:
                queue_again(study, trial)
        raise


def suggest(trial: Trial, sweep: Sweep, *, whole: Callable[[str], bool]) -> dict[str, Any]:
    """Draw a value of each setting that is searched.

    Args:
        trial: the trial that they are for.
        sweep: the search space.
        whole: tells whether the setting of a name is a whole number.
    """
    values: dict[str, Any] = {}
    for name, space in sweep.settings.items():
        if not isinstance(space, Range):
            values[name] = trial.suggest_categorical(name, space.choices)
        elif whole(name):
            values[name] = trial.suggest_int(name, int(space.low), int(space.high), log=space.log)
        else:
            values[name] = trial.suggest_float(name, space.low, space.high, log=space.log)
    return values


class Pruning(TrainerCallback):
    """Tells a trial the validation score of each epoch, and ends it where that is below the others' median."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 (the Trainer's signature)
        **kwargs: Any,
    ) -> None:
        """Report.

        Raises:
            TrialPruned: the trial is not worth more epochs.
        """
        epoch, score = round(state.global_step / (args.eval_steps or 1)), kwargs["metrics"][f"eval_{SCORE}"]
        self.trial.report(score, epoch)
        if self.trial.should_prune():
            raise TrialPruned(f"macro F1 {score:.4f} after epoch {epoch}")
