"""Read scraped news pages: what is body, boilerplate, paywall or sponsored, and what the article is about."""

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from copydesk.page import FailedPage, ModelInfo, Page, PageError, Scores, Section, Topic

if TYPE_CHECKING:
    from copydesk.predictor import Document, Predictor, load

# oneDNN, and torch beside it, keep what was compiled for each size of a product, 1,024 of them, and pages bring ever
# new sizes. They look when the first is multiplied: where that was before, this does nothing.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")

__all__ = [
    "Document",
    "FailedPage",
    "ModelInfo",
    "Page",
    "PageError",
    "Predictor",
    "Scores",
    "Section",
    "Topic",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in {"Document", "Predictor", "load"}:  # torch takes a second to import: only those who predict wait for it
        from copydesk import predictor

        return getattr(predictor, name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        with suppress(PackageNotFoundError):  # run from a checkout that is not installed
            return version("copydesk")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
