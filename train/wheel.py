"""The wheel of copydesk as this checkout holds it, to go along with a model that runs elsewhere.

Knows how a wheel is built; knows nothing of models.
"""

from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


def build_wheel(folder: Path) -> Path:
    """Build the wheel into a folder and return its path."""
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return Path(built)
