"""Publish a released model: `models/NAME/release` → `models/released`, with its scores in the card.

Knows folders; knows nothing of training. `--set evaluate.split=test` puts test scores there: read test when a
model is final, not to choose one.
"""

import logging
import shutil
import sys
from pathlib import Path

import datasets
from safetensors import SafetensorError

from copydesk.saved import CARD, MANIFEST, read_manifest
from train import checkpoints
from train.arguments import experiment_from_arguments
from train.config import Experiment
from train.evaluate import evaluate

log = logging.getLogger(__name__)

RELEASED = Path("models/released")


def publish(experiment: Experiment) -> Path:
    """Score the released folder, and copy it with the card that has its scores.

    Raises:
        ModelError: the folder cannot be trusted or understood.
        ValueError: it is of other rows than those prepared now, or of another fit than the one beside it.
        CheckpointError: the copy could not be written; what was published before is there still.
    """
    manifest = read_manifest(experiment.released)
    evaluate(experiment)
    with checkpoints.replacing(RELEASED) as folder:
        for name in (*manifest.files, MANIFEST):
            shutil.copyfile(experiment.released / name, folder / name)
        shutil.copyfile(experiment.evaluated / CARD, folder / CARD)
        read_manifest(folder)
    return RELEASED


def main() -> None:
    """Publish from the command line."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    datasets.disable_progress_bars()
    experiment = experiment_from_arguments("Score a released folder and copy it to models/released.")
    try:
        log.info("published to %s", publish(experiment))
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"publish: {error}")


if __name__ == "__main__":
    main()
