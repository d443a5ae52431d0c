"""Stage 2: fine-tune, keep the best on validation; with `fit.refit`, fine-tune once more on validation pages, too.

Knows which rows train and which are held out; knows nothing of thresholds or model folders. Writes the trained tensors,
`fit.json` (what they are, and the ranges of what the encoder computes on held-out rows), `made_of.json` (settings,
hashes of what was read) and `held_out.npz` (logits of rows that the scoring model did not train on) to
`models/NAME/fit`.
"""

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import TrainerCallback

from copydesk.encode import TextEncoder
from copydesk.encoder import encoder_folder, sha256_of
from copydesk.int8 import measured
from copydesk.network import CopydeskModel
from copydesk.predictor import choose_device, tune_malloc
from train import baseline, checkpoints, tracking
from train.arguments import experiment_of, stage_parser
from train.config import BaselineFit, Experiment, TransformerFit
from train.fitting import Fitting, trained_tensors
from train.processes import join, leave
from train.rows import Rows, choose_hints, cleaned_copies, encode_rows, load_rows
from train.sources.articles import read_topics

log = logging.getLogger(__name__)

WEIGHTS, SUMMARY, HELD_OUT = "trained.safetensors", "fit.json", "held_out.npz"
MADE_OF, CHECKPOINTS = "made_of.json", "checkpoints"


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a transformer is fitted with."""

    fitting: Fitting
    hints: list[str]
    train: Rows
    validation: Rows


def fit(experiment: Experiment, *, resume: bool = False, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Run the stage and return its summary; nothing in a process that is not the first of several.

    Args:
        experiment: its settings.
        resume: go on from the last whole checkpoint, if there is one. The weights come out as of one unbroken run.
        callbacks: told of each step and each validation of a transformer.

    Raises:
        FileNotFoundError: the prepare stage has not run.
        ValueError: the prepared rows do not fit this version, or a setting does not fit them or the encoder.
        CheckpointError: no checkpoint could be written, or what is there was made of something else.
    """
    settings = experiment.fit
    processes = join(choose_device("cpu" if isinstance(settings, BaselineFit) else settings.device))
    if experiment.is_refit:
        check_refit(experiment)
    noted, made_of = experiment.fitted / MADE_OF, what_makes(experiment)
    resume = resume and not isinstance(settings, BaselineFit)  # which takes seconds
    if resume and noted.is_file():
        checkpoints.check_same(noted, made_of)
    finished = resume and (experiment.fitted / SUMMARY).is_file()
    inputs = None if finished else _read(experiment)
    if processes.is_main_process:  # only now: a fit that is refused leaves the one before
        if not resume:
            shutil.rmtree(experiment.fitted, ignore_errors=True)
        resume = checkpoints.check_same(noted, made_of)
    processes.wait_for_everyone()
    with tracking.resume_run(experiment) if resume else tracking.start_run(experiment) as run:
        run.log_inputs(experiment.prepared)
        if finished:
            summary = json.loads((experiment.fitted / SUMMARY).read_text("utf-8"))
        elif inputs:
            summary = _fit_transformer(experiment, inputs, run, callbacks=callbacks)
        else:
            summary = baseline.fit(experiment)
        run.log_metrics({name: value for name, value in summary.items() if isinstance(value, int | float)})
        if processes.is_main_process:
            checkpoints.write_whole(experiment.fitted / SUMMARY, summary)
            shutil.rmtree(experiment.fitted / CHECKPOINTS, ignore_errors=True)
    return summary


def what_makes(experiment: Experiment) -> dict[str, Any]:
    """Return the settings and the hashes on which every step depends."""
    settings = {f"fit.{name}": value for name, value in experiment.fit.model_dump(mode="json").items()}
    return settings | hashes_of_what_is_read(experiment)


def hashes_of_what_is_read(experiment: Experiment) -> dict[str, str]:
    """Return the hashes of the prepared rows, by file, and of the encoder; of the topic list the ids in their order."""
    read = hashes_of_rows(experiment)
    read["topics"] = " ".join(topic.id for topic in read_topics(experiment.prepare.topics).topics)
    if isinstance(experiment.fit, TransformerFit):
        read["the encoder"] = sha256_of(encoder_folder(experiment.fit.encoder) / "model.safetensors")
    return read


def hashes_of_rows(experiment: Experiment) -> dict[str, str]:
    """Return the hashes of the prepared rows, by file."""
    return {file.as_posix(): sha256_of(file) for file in sorted(experiment.prepared.glob("*/*.parquet"))}


def fitted_weights(experiment: Experiment) -> Path:
    """Return the file of what was learnt."""
    return experiment.fitted / (baseline.MODEL if isinstance(experiment.fit, BaselineFit) else WEIGHTS)


def _read(experiment: Experiment) -> Inputs | None:
    """Read and check all that a transformer is fitted with; of the baseline, which reads for itself, check the rows."""
    settings = experiment.fit
    pages, articles = (
        {split: load_rows(experiment.prepared, kind, split) for split in ("train", "validation")}
        for kind in ("pages", "articles")
    )
    for split, found in pages.items():
        if not len(found):
            raise ValueError(
                f"{experiment.prepared} has no {split} pages, expected some of each split: give pages of more sites"
            )
    if isinstance(settings, BaselineFit):
        return None
    tune_malloc()
    topics, folder, learnt = read_topics(experiment.prepare.topics), encoder_folder(settings.encoder), experiment.learnt
    hints = choose_hints(chain.from_iterable(pages[split] for split in learnt), min_sites=settings.min_hint_sites)
    fitting = Fitting(settings, folder, topics, num_hints=len(hints))
    fitting.new_model()  # refuses settings that do not fit the encoder
    encoder = TextEncoder(Tokenizer.from_file(str(folder / "tokenizer.json")), settings.encoding, hints)
    rows = {
        split: Rows(*encode_rows(read, articles[split], encoder=encoder, topics=topics))
        for split, read in pages.items()
    }
    train = Rows.joined([rows[split] for split in learnt])
    if settings.cleaned_share:
        random = np.random.default_rng(settings.seed)
        for split in learnt:
            train.pages.extend(cleaned_copies(pages[split], encoder=encoder, random=random))
    return Inputs(fitting, hints, train, rows["validation"])


def _fit_transformer(
    experiment: Experiment, inputs: Inputs, run: tracking.Run, *, callbacks: Sequence[TrainerCallback]
) -> dict[str, Any]:
    fitting, train, validation = inputs.fitting, inputs.train, inputs.validation
    settings = fitting.settings
    working = experiment.fitted / CHECKPOINTS
    trainer = fitting.run(
        train,
        None if settings.refit else validation,
        epochs=settings.epochs,
        output=working / "main",
        callbacks=[tracking.trainer_callback(run), *callbacks],
    )
    held_out = []
    if fitting.processes.is_main_process:
        model = trainer.network if settings.refit else trainer.best_model()
        trained = trained_tensors(model)
        save_file(trained, experiment.fitted / WEIGHTS)
        with measured(model.encoder) as ranges:
            scores = held_out_scores(fitting, model, validation)  # of a refit only the ranges are of use
        held_out.append(_held_out_before(experiment) if settings.refit else scores)
    if settings.out_of_fold_epochs and not settings.refit:
        everything = Rows.joined([train, validation])
        held_out += score_other_folds(fitting, everything, num_folds=experiment.prepare.num_folds, output=working)
    if not fitting.processes.is_main_process:
        return {}
    np.savez_compressed(experiment.fitted / HELD_OUT, allow_pickle=False, **_joined(held_out))
    return {
        "kind": "transformer",
        "encoder": settings.encoder,
        "encoder_sha256": sha256_of(fitting.encoder / "model.safetensors"),
        "network": model.shape.model_dump(),
        "hints": inputs.hints,
        "ranges": [layer.model_dump(mode="json") for layer in ranges] or None,
        "lora_scale": 1.0 if settings.tuning == "lora" else None,
        "best_step": trainer.state.best_global_step or trainer.state.global_step,
        "steps": trainer.state.global_step,
        "validation_macro_f1": trainer.state.best_metric,
        "trained_parameters": sum(tensor.numel() for tensor in trained.values()),
    }


def check_refit(experiment: Experiment) -> None:
    """See to it that these settings, the seed apart, were fitted and could be judged before validation pages train.

    Raises:
        FileNotFoundError: they were not.
        ValueError: others were.
    """
    before = experiment.before_refit
    noted = before.fitted / MADE_OF
    if not (before.fitted / SUMMARY).is_file() or not noted.is_file():
        raise FileNotFoundError(
            f"there is no {before.fitted / SUMMARY}, by which a refit is calibrated: run the stages without fit.refit "
            "first"
        )
    made_of = json.loads(noted.read_text("utf-8"))
    if changed := [name for name in changed_since(made_of, before) if name != "fit.seed"]:
        raise ValueError(
            f"{before.fitted} was fitted with other {', '.join(changed)}: a refit repeats what validation has judged, "
            "so restore them, or run the stages without fit.refit again"
        )


def check_fitted(experiment: Experiment) -> dict[str, Any]:
    """Return what was fitted, as `made_of.json` notes it.

    Raises:
        FileNotFoundError: the stage has not run.
        ValueError: it was something else than what the experiment now says.
    """
    for name in (SUMMARY, MADE_OF):
        if not (experiment.fitted / name).is_file():
            raise FileNotFoundError(
                f"there is no {experiment.fitted / name}: run `python -m train.fit` with the same config first"
            )
    made_of: dict[str, Any] = json.loads((experiment.fitted / MADE_OF).read_text("utf-8"))
    if changed := changed_since(made_of, experiment):
        raise ValueError(
            f"{experiment.fitted} was fitted with other {', '.join(changed)}: restore them, by the same --set too, or "
            "run `python -m train.fit` again"
        )
    return made_of


def changed_since(made_of: Mapping[str, Any], experiment: Experiment) -> list[str]:
    """Name what differs between what was fitted and what would be now; what an earlier version did not note is not."""
    now = what_makes(experiment)
    return sorted(name for name in made_of.keys() & now.keys() if made_of[name] != now[name])


def _held_out_before(experiment: Experiment) -> dict[str, np.ndarray]:
    with np.load(experiment.before_refit.fitted / HELD_OUT) as held_out:
        return dict(held_out)


def score_other_folds(fitting: Fitting, rows: Rows, *, num_folds: int, output: Path) -> Iterator[dict[str, np.ndarray]]:
    """Score folds 1 … by models that did not see them; fold 0 is validation, which the main model scores."""
    settings = fitting.settings
    others = list(range(1, num_folds))
    for start in range(0, len(others), settings.folds_at_once):
        held = frozenset(others[start : start + settings.folds_at_once])
        log.info("scoring the folds %s by a model that trains on the others", sorted(held))
        folder = output / f"without-{'-'.join(map(str, sorted(held)))}"
        trainer = fitting.run(rows.outside(held), None, epochs=settings.out_of_fold_epochs, output=folder)
        if fitting.processes.is_main_process:
            yield held_out_scores(fitting, trainer.network, rows.inside(held))


def held_out_scores(fitting: Fitting, model: CopydeskModel, rows: Rows) -> dict[str, np.ndarray]:
    """Return logits and targets of rows, with the site of each section and article."""
    sections, articles = fitting.logits(model, rows)
    lengths = [len(page.encoded) for page in rows.pages]
    return {
        "section_logits": sections,
        "classes": np.concatenate([page.classes for page in rows.pages]),
        "section_sites": np.repeat([page.site for page in rows.pages], lengths),
        "topic_logits": articles,
        "holds": rows.marks("holds", num_topics=len(fitting.topics)),
        "decided": rows.marks("decided", num_topics=len(fitting.topics)),
        "article_sites": np.array([article.site for article in rows.articles]),
    }


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def main() -> None:
    """Run the stage from the command line."""
    parser = stage_parser("Stage 2: fine-tune, keep the best on validation. Several processes: under torchrun.")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint, if there is one")
    options = parser.parse_args()
    first = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(level=logging.INFO if first else logging.ERROR, format="%(name)s: %(message)s")
    datasets.disable_progress_bars()
    experiment = experiment_of(options, parser)
    try:
        summary = fit(experiment, resume=options.resume)
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"fit: {error}")
    leave()
    if first:
        if experiment.is_refit:
            log.info("fitted again in %d steps; read test when it ships", summary["steps"])
        else:
            log.info("best macro F1 %.4f at step %s", summary["validation_macro_f1"], summary.get("best_step"))


if __name__ == "__main__":
    main()
