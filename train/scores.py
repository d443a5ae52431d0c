"""Pages beside their labels → scores: of all, with intervals, of slices and of sites, as tables.

Knows what is counted and over which pages; knows nothing of models, files or figures.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from copydesk.labels import SectionLabel, TopicList
from train.metrics import (
    bootstrap,
    expected_calibration_error,
    label_confusion,
    macro_f1,
    precision_recall_f1,
    topic_counts,
    topic_f1,
)

LABELS = tuple(SectionLabel)
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
"""Scores that people compare, each with an interval, and what they are called; `headline_scores` knows the order."""


@dataclass(frozen=True, slots=True)
class ScoredPage:
    """What one page adds to the scores."""

    id: str
    site: str
    source: str
    genre: str
    language: str
    true: np.ndarray
    """(sections,): label index."""
    scores: np.ndarray
    """(sections, labels)."""
    characters: np.ndarray
    """(sections,): white space apart."""
    body_word_f1: float
    body_4gram_f1: float
    body_exact: bool
    holds: np.ndarray
    """(topics,) of bool."""
    marked: np.ndarray
    """(topics,) of bool."""
    decided: np.ndarray
    """(topics,) of bool."""
    topic_scores: np.ndarray
    """(topics,)."""

    @property
    def predicted(self) -> np.ndarray:
        """(sections,): label index."""
        return self.scores.argmax(axis=1)

    @property
    def errors(self) -> int:
        """Sections with a wrong label."""
        return int((self.predicted != self.true).sum())

    @property
    def confusion(self) -> np.ndarray:
        """(labels, labels) of sections."""
        return label_confusion(self.true, self.predicted)

    @property
    def character_confusion(self) -> np.ndarray:
        """(labels, labels) of characters."""
        return label_confusion(self.true, self.predicted, weights=self.characters)

    @property
    def topics(self) -> np.ndarray:
        """(topics, 3): hits, marked, true."""
        return topic_counts(self.holds[None], self.marked[None], self.decided[None])


def summarise(pages: Sequence[ScoredPage]) -> dict[str, float]:
    """Return the scores of some pages, each a number that can be compared."""
    confusion = total(page.confusion for page in pages)
    f1 = precision_recall_f1(confusion)[2]
    micro, macro, _ = topic_f1(total(page.topics for page in pages))
    scores = np.concatenate([page.scores.max(axis=1) for page in pages])
    correct = np.concatenate([page.predicted == page.true for page in pages])
    return {
        "pages": len(pages),
        "sections": len(scores),
        "macro_f1": float(macro_f1(confusion)),
        "characters_macro_f1": float(macro_f1(total(page.character_confusion for page in pages))),
        **{f"{label}_f1": float(f1[i]) for i, label in enumerate(LABELS)},
        "body_word_f1": float(np.mean([page.body_word_f1 for page in pages])),
        "body_4gram_f1": float(np.mean([page.body_4gram_f1 for page in pages])),
        "body_exact": float(np.mean([page.body_exact for page in pages])),
        "topics_micro_f1": float(micro),
        "topics_macro_f1": float(macro),
        "section_ece": expected_calibration_error(scores, correct),
    }


def total(counts: Iterable[np.ndarray]) -> np.ndarray:
    """Add up the counts of pages."""
    return np.sum(list(counts), axis=0)


def headline_scores(pages: Sequence[ScoredPage], *, samples: int, seed: int) -> dict[str, float]:
    """Return the scores of all pages, those with an interval as NAME, NAME_low, NAME_high."""
    confusions = np.stack([page.confusion for page in pages]).astype(np.float64)
    characters = np.stack([page.character_confusion for page in pages])
    bodies = np.array([[page.body_word_f1, page.body_4gram_f1] for page in pages])
    topics = np.stack([page.topics for page in pages]).astype(np.float64)

    def statistic(weights: np.ndarray) -> np.ndarray:
        confusion = np.tensordot(weights, confusions, axes=1)
        micro, macro, _ = topic_f1(np.tensordot(weights, topics, axes=1))
        return np.array(
            [
                macro_f1(confusion),
                macro_f1(np.tensordot(weights, characters, axes=1)),
                *precision_recall_f1(confusion)[2],
                *(weights @ bodies / weights.sum()),
                micro,
                macro,
            ]
        )

    low, high = bootstrap([page.site for page in pages], statistic, samples=samples, seed=seed)
    scores = summarise(pages)
    for name, a, b in zip(SHOWN, low, high, strict=True):
        scores |= {f"{name}_low": float(a), f"{name}_high": float(b)}
    return scores


def english_news(pages: Sequence[ScoredPage]) -> list[ScoredPage]:
    """Return the pages that the model is made for, maybe none."""
    return [page for page in pages if page.genre == "news" and page.language == "en"]


def slice_table(pages: Sequence[ScoredPage]) -> list[dict[str, Any]]:
    """Return a row for each slice, by source, genre, language and length: its scores and the sections of each label."""
    cuts: dict[str, Callable[[ScoredPage], str]] = {
        "source": lambda page: page.source,
        "genre": lambda page: page.genre,
        "language": lambda page: page.language,
        "length": lambda page: _length(len(page.true)),
    }
    groups: dict[str, list[ScoredPage]] = {"all": list(pages), "english news": english_news(pages)}
    for name, key in cuts.items():
        for page in sorted(pages, key=key):
            groups.setdefault(f"{name}: {key(page)}", []).append(page)
    return [
        {
            "slice": name,
            **summarise(group),
            **{f"{label}_sections": count for label, count in _support(group).items()},
            "pages_with_topics": sum(bool(page.holds[page.decided].any()) for page in group),
        }
        for name, group in groups.items()
        if group
    ]


def _support(pages: Sequence[ScoredPage]) -> dict[str, int]:
    counts = np.bincount(np.concatenate([page.true for page in pages]), minlength=len(LABELS))
    return {str(label): int(count) for label, count in zip(LABELS, counts, strict=True)}


def _length(sections: int) -> str:
    return next(
        (f"{name} sections" for limit, name in ((50, "1–50"), (200, "51–200")) if sections <= limit), "over 200"
    )


def label_table(pages: Sequence[ScoredPage]) -> list[dict[str, Any]]:
    """Return a row for each label: sections, precision, recall and F1, by section and by character."""
    sections = precision_recall_f1(total(page.confusion for page in pages))
    characters = precision_recall_f1(total(page.character_confusion for page in pages))
    return [
        {
            "label": label,
            "sections": count,
            **dict(zip(("precision", "recall", "f1"), sections[:, i].tolist(), strict=True)),
            **dict(zip(("char_precision", "char_recall", "char_f1"), characters[:, i].tolist(), strict=True)),
        }
        for i, (label, count) in enumerate(_support(pages).items())
    ]


def confusion_table(pages: Sequence[ScoredPage]) -> list[dict[str, Any]]:
    """Return a row for each true label: how many of its sections were read as each label."""
    counts = total(page.confusion for page in pages).astype(int).tolist()
    return [
        {"label": str(label), **{str(read_as): row[i] for i, read_as in enumerate(LABELS)}}
        for label, row in zip(LABELS, counts, strict=True)
    ]


def topic_table(pages: Sequence[ScoredPage], topics: TopicList, thresholds: np.ndarray) -> list[dict[str, Any]]:
    """Return a row for each topic: pages that have it, pages marked with it, and how these agree.

    Args:
        pages: those whose topics are not known say nothing.
        topics: in their order.
        thresholds: (topics,), from which each is marked.
    """
    counts = total(page.topics for page in pages)
    _, _, f1 = topic_f1(counts)
    return [
        {
            "topic": topic.slug,
            "name": topic.name,
            "threshold": float(thresholds[i]),
            "pages": int(counts[i, 2]),
            "marked": int(counts[i, 1]),
            "precision": float(counts[i, 0] / max(counts[i, 1], 1)),
            "recall": float(counts[i, 0] / max(counts[i, 2], 1)),
            "f1": float(f1[i]),
        }
        for i, topic in enumerate(topics.topics)
    ]


def site_table(pages: Sequence[ScoredPage]) -> list[dict[str, Any]]:
    """Return a row for each site, the one with most wrong sections first."""
    sites: dict[str, list[ScoredPage]] = {}
    for page in pages:
        sites.setdefault(page.site, []).append(page)
    rows = [
        {
            "site": site,
            "pages": len(group),
            "sections": sum(len(page.true) for page in group),
            "errors": sum(page.errors for page in group),
            "macro_f1": float(macro_f1(total(page.confusion for page in group))),
            "body_word_f1": float(np.mean([page.body_word_f1 for page in group])),
        }
        for site, group in sites.items()
    ]
    return sorted(rows, key=lambda row: (-row["errors"], row["site"]))
