"""The model that the repository ships."""

from pathlib import Path

import pytest

import copydesk
from copydesk.predictor import Predictor


@pytest.fixture(scope="session")
def desk() -> Predictor:
    return copydesk.load(Path(__file__).parents[2] / "models" / "released", device="cpu")
