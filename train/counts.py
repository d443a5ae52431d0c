"""What each page adds to the scores, as a table, so that two models can be compared on the same pages.

Knows counts of sections and topics by page; knows nothing of models or of MLflow. No text of a page is in the table.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from copydesk.decode import topics_from
from copydesk.labels import SectionLabel, TopicList
from train.release import NUM_FOLDS, choose_thresholds
from train.scores import ScoredPage

CELLS = [f"{true}_as_{predicted}" for true, predicted in product(SectionLabel, SectionLabel)]
"""Columns: sections of a label, read as another."""
TOPICS = ["topics_hits", "topics_marked", "topics_true"]
MIN_POSITIVES = 20
"""Topics with fewer share one threshold here, as they do by default in a release."""


@dataclass(frozen=True, slots=True)
class Counts:
    """A table as arrays."""

    keys: list[tuple[str, str]]
    """Name of each page, and a hash of its sections and labels."""
    sites: list[str]
    confusions: np.ndarray
    """(pages, labels, labels): rows are the true label."""
    topics: np.ndarray
    """(pages, 3): hits, marked, true."""

    @classmethod
    def of(cls, table: Sequence[Mapping[str, Any]]) -> "Counts":
        """Read a table that `page_table` made."""
        size = len(SectionLabel)
        return cls(
            keys=[(row["page"], row["labels"]) for row in table],
            sites=[row["site"] for row in table],
            confusions=np.array([[row[cell] for cell in CELLS] for row in table], float).reshape(-1, size, size),
            topics=np.array([[row[name] for name in TOPICS] for row in table], float).reshape(-1, len(TOPICS)),
        )

    def select(self, keys: Sequence[tuple[str, str]]) -> "Counts":
        """Return these pages, in this order."""
        place = {key: row for row, key in enumerate(self.keys)}
        rows = [place[key] for key in keys]
        return Counts(list(keys), [self.sites[row] for row in rows], self.confusions[rows], self.topics[rows])


def page_table(pages: Sequence[ScoredPage], *, topics: TopicList, out_of_fold: bool) -> list[dict[str, Any]]:
    """Count the sections and topics of each page.

    Args:
        pages: as they were scored.
        topics: with their order.
        out_of_fold: mark the topics of each page by thresholds that are best on pages of other sites. For a split on
            which the model's own thresholds were chosen: there they look better than they are.
    """
    holds, decided = (np.stack([getattr(page, name) for page in pages]) for name in ("holds", "decided"))
    if out_of_fold:
        scores = np.stack([page.topic_scores for page in pages])
        marked = marks_out_of_fold(scores, holds, decided, sites=[page.site for page in pages], topics=topics)
    else:
        marked = np.stack([page.marked for page in pages])
    counts = np.stack([(holds & marked & decided).sum(1), (marked & decided).sum(1), (holds & decided).sum(1)], axis=1)
    return [
        {
            "page": page.id,
            "site": page.site,
            "labels": _hash_of(page),
            **dict(zip(CELLS, map(int, page.confusion.ravel()), strict=True)),
            **dict(zip(TOPICS, map(int, row), strict=True)),
        }
        for page, row in zip(pages, counts, strict=True)
    ]


def _hash_of(page: "ScoredPage") -> str:
    """Return what tells whether two models were asked the same about a page."""
    asked = (page.true, page.characters, page.holds, page.decided)
    return hashlib.sha256(b"|".join(values.astype("<i8").tobytes() for values in asked)).hexdigest()[:12]


def marks_out_of_fold(
    scores: np.ndarray, holds: np.ndarray, decided: np.ndarray, *, sites: Sequence[str], topics: TopicList
) -> np.ndarray:
    """Mark topics by thresholds that are chosen, as at release, on the pages of other sites.

    Args:
        scores: (pages, topics).
        holds: (pages, topics) of bool.
        decided: (pages, topics) of bool.
        sites: of the pages.
        topics: with their hierarchy.

    Returns:
        (pages, topics) of bool.
    """
    names, index = np.unique(sites, return_inverse=True)
    folds = np.random.default_rng(0).permutation(len(names))[index] % NUM_FOLDS
    marked = np.zeros_like(holds)
    for fold in np.unique(folds):
        inside, others = folds == fold, folds != fold
        thresholds, _ = choose_thresholds(
            scores[others], holds[others], decided[others], sites=np.array(sites)[others], min_positives=MIN_POSITIVES
        )
        marked[inside], _ = topics_from(scores[inside], thresholds=thresholds, topics=topics)
    return marked
