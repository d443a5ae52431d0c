"""Stage 3: calibrate, choose thresholds, write the model folder and its card.

Knows temperatures, thresholds and the folder; knows nothing of training. All choices are made on rows that the
scoring model did not train on: validation, and the other folds where the fit stage scored them.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar

from copydesk.decode import class_probabilities, label_scores, topic_probabilities
from copydesk.encoder import encoder_folder, sha256_of
from copydesk.labels import CLASSES, TopicList
from copydesk.network import CopydeskConfig, CopydeskModel
from copydesk.saved import MANIFEST, TOKENIZER, Base, Description, read_manifest, save_folder
from train import baseline, checkpoints, tracking
from train.arguments import experiment_from_arguments
from train.card import card_of
from train.config import Experiment, TransformerFit
from train.fit import HELD_OUT, SUMMARY, WEIGHTS, check_fitted, fitted_weights
from train.metrics import expected_calibration_error, labels_of
from train.rows import load_rows
from train.sources.articles import read_topics

log = logging.getLogger(__name__)

_HEADLINE, _BODY = map(CLASSES.index, ("headline", "body"))
NUM_FOLDS = 5
GRID = np.arange(0.05, 0.951, 0.01)
TRAINED_ON = "trained_on"
"""Key of the splits that a model trained on, in its manifest."""
FITTED = "fit_sha256"
"""Key of the hash of the fitted weights, in the same place."""
ORIGIN = "origin.json"
"""What a baseline, whose folder has no manifest, keeps of that in."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is chosen on held-out rows."""

    section_temperature: float
    topic_temperature: float
    thresholds: np.ndarray
    """(topics,)."""
    shared: np.ndarray
    """(topics,) of bool: topics too rare for a threshold of their own."""
    positives: np.ndarray
    """(topics,): held-out articles in which each topic holds."""
    section_ece: float
    num_sections: int
    num_articles: int


def release(experiment: Experiment) -> Calibration:
    """Run the stage.

    Raises:
        FileNotFoundError: the fit stage has not run.
        ValueError: it ran with other settings, rows or topics.
        CheckpointError: the folder could not be written; the one before is there still.
        EncoderError: the encoder that was tuned cannot be had any more, or has changed.
    """
    made_of = check_fitted(experiment)
    summary = json.loads((experiment.fitted / SUMMARY).read_text("utf-8"))
    topics = read_topics(experiment.prepare.topics)
    with np.load(experiment.fitted / HELD_OUT) as held_out:
        calibration = calibrate(dict(held_out), topics=topics, min_positives=experiment.release.min_topic_positives)
    with tracking.continue_run(experiment, stage="release") as run:
        origin = provenance(experiment, made_of)
        report = json.loads((experiment.prepared / "report.json").read_text("utf-8"))
        card = card_of(experiment, topics=topics, calibration=calibration, summary=summary, report=report)
        if isinstance(experiment.fit, TransformerFit):
            _write_folder(experiment, experiment.fit, summary, calibration, topics=topics, origin=origin, card=card)
            run.log_model(experiment.released, example=EXAMPLE, register=experiment.release.register_model)
        else:
            with checkpoints.replacing(experiment.released) as folder:
                baseline.save(
                    folder,
                    fitted=experiment.fitted,
                    topics=topics,
                    thresholds=calibration.thresholds.tolist(),
                    temperatures=(calibration.section_temperature, calibration.topic_temperature),
                    name=experiment.release.name,
                    card=card,
                )
                (folder / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", "utf-8")
        size = sum(file.stat().st_size for file in experiment.released.iterdir())
        run.log_metrics(
            {
                "release/section_temperature": calibration.section_temperature,
                "release/topic_temperature": calibration.topic_temperature,
                "release/held_out_section_ece": calibration.section_ece,
                "release/megabytes": size / 1e6,
            }
        )
    log.info("%s: %.1f MB, held-out section ECE %.4f", experiment.released, size / 1e6, calibration.section_ece)
    return calibration


EXAMPLE = (
    "<html><body><nav><a href='/'>Home</a> <a href='/join'>Subscribe</a></nav><h1>Ferry to Port Ansel runs again</h1>"
    "<p>The night ferry to Port Ansel sailed on Monday for the first time since the storm.</p>"
    "<p>You have 1 free article left this month. Subscribe for $2 a week.</p></body></html>"
)


def calibrate(held_out: dict[str, np.ndarray], *, topics: TopicList, min_positives: int) -> Calibration:
    """Choose temperatures and thresholds.

    Args:
        held_out: logits and targets as the fit stage wrote them.
        topics: with their hierarchy.
        min_positives: a topic with fewer shares one threshold with the others like it.
    """
    logits, classes = held_out["section_logits"], held_out["classes"]
    section_temperature = _temperature(
        lambda t: -np.log(class_probabilities(logits, temperature=t)[np.arange(len(classes)), classes] + 1e-12).mean()
    )
    holds, decided = held_out["holds"] > 0, held_out["decided"] > 0
    raw = held_out["topic_logits"].astype(np.float64)
    topic_temperature = _temperature(lambda t: (_binary_loss(raw / t, holds) * decided).sum())
    probabilities = topic_probabilities(raw, temperature=topic_temperature, topics=topics)
    thresholds, shared = choose_thresholds(
        probabilities, holds, decided, sites=held_out["article_sites"], min_positives=min_positives
    )
    scores = label_scores(class_probabilities(logits, temperature=section_temperature))
    return Calibration(
        section_temperature=section_temperature,
        topic_temperature=topic_temperature,
        thresholds=thresholds,
        shared=shared,
        positives=(holds & decided).sum(axis=0),
        section_ece=expected_calibration_error(scores.max(axis=1), scores.argmax(axis=1) == labels_of(classes)),
        num_sections=len(classes),
        num_articles=len(holds),
    )


def _temperature(loss: Any) -> float:
    found = minimize_scalar(lambda power: loss(np.exp(power)), bounds=(-2.0, 2.0), method="bounded")
    return float(np.exp(found.x))


def _binary_loss(logits: np.ndarray, holds: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, logits) - logits * holds


def choose_thresholds(
    probabilities: np.ndarray, holds: np.ndarray, decided: np.ndarray, *, sites: np.ndarray, min_positives: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose for each topic the threshold with the best F1; the mean over folds of sites, each left out in turn.

    Args:
        probabilities: (articles, topics), calibrated.
        holds: (articles, topics) of bool.
        decided: (articles, topics) of bool.
        sites: (articles,): articles of one site are left out together.
        min_positives: topics with fewer share the threshold that is best for them all.

    Returns:
        (topics,) thresholds, and (topics,) of bool: which ones share.
    """
    # (articles, topics, grid) would be large: one topic at a time.
    names, site_index = np.unique(sites, return_inverse=True)
    folds = np.random.default_rng(0).permutation(len(names))[site_index] % NUM_FOLDS
    counts = np.zeros((holds.shape[1], NUM_FOLDS, len(GRID), 3))
    for topic in range(holds.shape[1]):
        known = decided[:, topic]
        marked = probabilities[known, topic, None] >= GRID
        true = holds[known, topic, None]
        for fold in range(NUM_FOLDS):
            chosen = folds[known] == fold
            counts[topic, fold] = np.stack(
                [
                    (marked & true)[chosen].sum(axis=0),
                    marked[chosen].sum(axis=0),
                    np.broadcast_to(true[chosen].sum(axis=0), GRID.shape),
                ],
                axis=-1,
            )
    shared = (holds & decided).sum(axis=0) < min_positives
    thresholds = np.array([_best_threshold(topic) for topic in counts])
    if shared.any():
        thresholds[shared] = _best_threshold(counts[shared].sum(axis=0))
    return thresholds.round(3), shared


def _best_threshold(counts: np.ndarray) -> float:
    """Return the mean over folds of the best threshold on the others, from counts (folds, grid, 3)."""
    best = []
    for fold in range(len(counts)):
        hits, marked, true = (counts.sum(axis=0) - counts[fold]).T
        f1 = 2 * hits / np.maximum(marked + true, 1)
        best.append(GRID[f1 >= f1.max() - 1e-9].mean() if f1.max() > 0 else 0.5)
    return float(np.mean(best))


def _write_folder(
    experiment: Experiment,
    settings: TransformerFit,
    summary: dict[str, Any],
    calibration: Calibration,
    *,
    topics: TopicList,
    origin: dict[str, str],
    card: str,
) -> None:
    if "ranges" not in summary:
        raise ValueError(f"{experiment.fitted} was fitted by an earlier version: run `python -m train.fit` again")
    trained = load_file(experiment.fitted / WEIGHTS)
    network = CopydeskConfig(**summary["network"])
    with torch.device("meta"):
        names = CopydeskModel(network).state_dict()
    base = encoder_folder(settings.encoder, sha256=summary["encoder_sha256"])
    dtype = torch.bfloat16 if experiment.release.weights == "bfloat16" else torch.float32
    learnt = chain.from_iterable(
        load_rows(experiment.prepared, "pages", split)["classes"] for split in experiment.learnt
    )
    description = Description(
        network=network,
        encoding=settings.encoding,
        hints=summary["hints"],
        classes=list(CLASSES),
        topics=list(topics.topics),
        thresholds=calibration.thresholds.tolist(),
        section_temperature=calibration.section_temperature,
        topic_temperature=calibration.topic_temperature,
        headline_share=headline_share(learnt),
        base=Base(
            name=settings.encoder,
            sha256=summary["encoder_sha256"],
            borrowed=[name.removeprefix("encoder.") for name in names if name not in trained],
            lora_scale=summary["lora_scale"],
        ),
        ranges=summary["ranges"],
    )
    tokenizer = (base / TOKENIZER).read_text("utf-8")
    with checkpoints.replacing(experiment.released) as folder:
        save_folder(
            folder,
            tensors={name: tensor.to(dtype) for name, tensor in trained.items()},
            tokenizer=tokenizer,
            name=experiment.release.name,
            created=datetime.now(UTC).date().isoformat(),
            run=origin,
            card=card,
            description=description,
        )


def headline_share(pages: Iterable[Sequence[int]]) -> float:
    """Return how many of the pages with body text have a headline, by Laplace's rule of succession.

    Args:
        pages: the classes of the sections of each.
    """
    articles = [classes for classes in pages if _BODY in classes]
    return (sum(_HEADLINE in classes for classes in articles) + 1) / (len(articles) + 2)


def provenance(experiment: Experiment, made_of: Mapping[str, Any]) -> dict[str, str]:
    """Return what made a model: experiment, git commit, prepared data and fit by hash, what trained, MLflow run.

    Args:
        experiment: that was fitted.
        made_of: what the fit stage noted.
    """
    found = {"experiment": experiment.name, "git_commit": git_commit(), TRAINED_ON: ", ".join(experiment.learnt)}
    found |= named_rows(made_of) | {FITTED: sha256_of(fitted_weights(experiment))}
    run = experiment.fitted / "run.json"
    if run.is_file():
        found["mlflow_run_id"] = str(json.loads(run.read_text("utf-8")).get("run_id", ""))
    return found


def named_rows(hashes: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes of prepared rows as a manifest names them, e.g. `data/pages/train`."""
    files = {Path(name): sha256 for name, sha256 in hashes.items() if name.endswith(".parquet")}
    return {f"data/{file.parent.name}/{file.stem}": sha256 for file, sha256 in files.items()}


def read_origin(released: Path) -> dict[str, str]:
    """Return what a released folder says of what made it; nothing where it was written by an earlier version.

    Raises:
        ModelError: the folder cannot be trusted or understood.
    """
    if (released / MANIFEST).is_file():
        return read_manifest(released).run
    file = released / ORIGIN
    origin: dict[str, str] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return origin


def git_commit() -> str:
    """Return the commit of the checkout, with `-dirty` where files differ from it; `unknown` outside of git."""
    found = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return found.stdout.strip() or "unknown"


def main() -> None:
    """Run the stage from the command line."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    experiment = experiment_from_arguments("Stage 3: calibrate, choose thresholds, write the model folder.")
    try:
        release(experiment)
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"release: {error}")


if __name__ == "__main__":
    main()
