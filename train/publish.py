"""Publish a released model: `models/NAME/release` → `models/released`, with its scores in the card.

Knows folders and cards; knows nothing of training. `--set evaluate.split=test` puts test scores there: read test when a
model is final, not to choose one.
"""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets

from copydesk.saved import CARD, MANIFEST, read_manifest
from train.config import Experiment, experiment_from_arguments
from train.evaluate import evaluate

log = logging.getLogger(__name__)

RELEASED = Path("models/released")
CHOSEN_HERE = (
    " Checkpoint, temperatures and thresholds were chosen on these same pages, so the scores lean high, those of "
    "topics and calibration most."
)
SHOWN = {
    "macro_f1": "macro F1, four labels, by section",
    "characters_macro_f1": "the same by character",
    "body_f1": "body F1",
    "boilerplate_f1": "boilerplate F1",
    "paywall_f1": "paywall F1",
    "sponsored_f1": "sponsored F1",
    "body_word_f1": "article body, word F1",
    "body_4gram_f1": "article body, 4-gram F1",
    "topics_micro_f1": "topics, micro F1",
    "topics_macro_f1": "topics, macro F1",
}


def publish(experiment: Experiment) -> Path:
    """Score the released folder on test, copy it, and complete its card.

    Raises:
        ModelError: the folder cannot be trusted or understood.
    """
    manifest = read_manifest(experiment.released)
    evaluate(experiment)
    result = json.loads((experiment.evaluated / "scores.json").read_text("utf-8"))
    shutil.rmtree(RELEASED, ignore_errors=True)
    RELEASED.mkdir(parents=True)
    for name in (*manifest.files, MANIFEST):
        shutil.copyfile(experiment.released / name, RELEASED / name)
    card = (experiment.released / CARD).read_text("utf-8")
    (RELEASED / CARD).write_text(card + "\n" + "\n".join(scores_of(result)) + "\n", "utf-8")
    read_manifest(RELEASED)
    return RELEASED


def scores_of(result: dict[str, Any]) -> list[str]:
    """Return the scores of an evaluation as Markdown lines."""
    scores = result["scores"]
    slices = {row["slice"]: row for row in result["tables"]["slices"]}
    lines = [
        "## Scores",
        "",
        (
            f"On {scores['pages']} pages ({scores['sections']} sections) of the {result['split']} split: sites that "
            "the model never trained on. Intervals (95 %) by bootstrap over sites, then pages."
            + CHOSEN_HERE
            * (result["split"] == "validation")
        ),
        "",
        "| | all | interval | English news | all, as plain text |",
        "|---|---|---|---|---|",
    ]
    for name, text in SHOWN.items():
        interval = f"{scores[f'{name}_low']:.3f}–{scores[f'{name}_high']:.3f}" if f"{name}_low" in scores else ""
        cells = [scores.get(f"{prefix}{name}") for prefix in ("english_news_", "as_text_")]
        shown = " | ".join("–" if value is None else f"{value:.3f}" for value in cells)
        lines.append(f"| {text} | {scores[name]:.3f} | {interval} | {shown} |")
    lines += [
        "",
        f"Calibration error of sections: {scores['section_ece']:.4f}. Exact bodies: {scores['body_exact']:.2f}.",
        "",
        "| slice | pages | sections | macro F1 | paywall | sponsored | body word F1 | topics micro F1 |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {name} | {row['pages']} | {row['sections']} | {row['macro_f1']:.3f} | {row['paywall_f1']:.3f} "
            f"| {row['sponsored_f1']:.3f} | {row['body_word_f1']:.3f} | {row['topics_micro_f1']:.3f} |"
            for name, row in slices.items()
        ),
        "",
        "| label | sections | precision | recall | F1 |",
        "|---|---|---|---|---|",
        *(
            f"| {row['label']} | {row['sections']} | {row['precision']:.3f} | {row['recall']:.3f} | {row['f1']:.3f} |"
            for row in result["tables"]["labels"]
        ),
        "",
        "| topic | pages | marked | precision | recall | F1 |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['topic']} | {row['pages']} | {row['marked']} | {row['precision']:.2f} | {row['recall']:.2f} "
            f"| {row['f1']:.2f} |"
            for row in result["tables"]["topics"]
        ),
    ]
    return lines


def main() -> None:
    """Publish from the command line."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    datasets.disable_progress_bars()
    experiment = experiment_from_arguments("Score a released folder and copy it to models/released.")
    try:
        log.info("published to %s", publish(experiment))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"publish: {error}")


if __name__ == "__main__":
    main()
