"""Scores of labels, bodies, topics and probabilities, with intervals.

Knows formulas; knows nothing of models or files. Body F1 as in the ScrapingHub article extraction benchmark.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from copydesk.labels import LABEL_OF_CLASS, SectionLabel

NUM_LABELS = len(SectionLabel)


def label_confusion(true: np.ndarray, predicted: np.ndarray, *, weights: np.ndarray | None = None) -> np.ndarray:
    """Count (labels, labels): rows are the true label, columns the predicted one; `weights` counts characters."""
    cells = true * NUM_LABELS + predicted
    return np.bincount(cells, weights=weights, minlength=NUM_LABELS**2).reshape(NUM_LABELS, NUM_LABELS)


def precision_recall_f1(confusion: np.ndarray) -> np.ndarray:
    """Return (3, labels): precision, recall and F1 of each label; 0 where undefined.

    Args:
        confusion: (..., labels, labels).
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    predicted, actual = confusion.sum(axis=-2), confusion.sum(axis=-1)
    return np.stack([_ratio(hits, predicted), _ratio(hits, actual), _ratio(2 * hits, predicted + actual)])


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole > 0)


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Return the mean F1 over the labels that occur, true or predicted.

    Args:
        confusion: (..., labels, labels).
    """
    occurs = confusion.sum(axis=-1) + confusion.sum(axis=-2) > 0
    return _ratio((precision_recall_f1(confusion)[2] * occurs).sum(axis=-1), occurs.sum(axis=-1))


def labels_of(classes: np.ndarray) -> np.ndarray:
    """Return the label index of each class index."""
    return np.array(LABEL_OF_CLASS)[classes]


_WORD = re.compile(r"\w+", re.UNICODE)


def body_f1(true: str, predicted: str, *, n: int) -> float:
    """Return the F1 of the multisets of word n-grams; 1 where both are empty."""
    gold, found = _ngrams(true, n), _ngrams(predicted, n)
    if not gold and not found:
        return 1.0
    hits = sum((gold & found).values())
    return 2 * hits / (sum(gold.values()) + sum(found.values()))


def _ngrams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = _WORD.findall(text)
    if 0 < len(words) < n:  # as the benchmark does: a short text is one n-gram
        return Counter([tuple(words)])
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def topic_counts(holds: np.ndarray, marked: np.ndarray, decided: np.ndarray) -> np.ndarray:
    """Return (topics, 3): true positives, predicted and actual positives, where decided.

    Args:
        holds: (articles, topics) of bool.
        marked: (articles, topics) of bool.
        decided: (articles, topics) of bool.
    """
    return np.stack([(holds & marked & decided).sum(0), (marked & decided).sum(0), (holds & decided).sum(0)], axis=-1)


def topic_f1(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return micro F1, macro F1 over the topics that occur among the actual positives, and F1 by topic.

    Args:
        counts: (..., topics, 3).
    """
    by_topic = _ratio(2 * counts[..., 0], counts[..., 1] + counts[..., 2])
    total = counts.sum(axis=-2)
    micro = _ratio(2 * total[..., 0], total[..., 1] + total[..., 2])
    occurs = counts[..., 2] > 0
    return micro, _ratio((by_topic * occurs).sum(-1), occurs.sum(-1)), by_topic


def expected_calibration_error(scores: np.ndarray, correct: np.ndarray, *, num_bins: int = 15) -> float:
    """Return the mean gap between confidence and accuracy over equal-width bins (arXiv:1706.04599).

    Args:
        scores: (n,) confidence of the chosen label.
        correct: (n,) of bool.
        num_bins: of equal width.
    """
    if not len(scores):
        return 0.0
    bins = np.minimum((scores * num_bins).astype(int), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    gaps = np.abs(np.bincount(bins, scores, num_bins) - np.bincount(bins, correct, num_bins))
    return float(gaps[counts > 0].sum() / len(scores))


def bootstrap(
    sites: Sequence[str],
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    samples: int,
    seed: int,
    confidence: float = 0.95,
) -> np.ndarray:
    """Return the interval (2, ...) of a statistic over rows, from `resample`, with this mass between its ends."""
    tail = (1 - confidence) / 2
    return np.quantile(resample(sites, statistic, samples=samples, seed=seed), [tail, 1 - tail], axis=0)


def resample(
    sites: Sequence[str], statistic: Callable[[np.ndarray], np.ndarray], *, samples: int, seed: int
) -> np.ndarray:
    """Return (samples, ...) values of a statistic over rows, resampling sites, then pages within each site drawn.

    Args:
        sites: the site of each row.
        statistic: from weights (rows,), how often each row was drawn, to an array of any shape.
        samples: how often to resample.
        seed: of the draws.
    """
    random = np.random.default_rng(seed)
    members: dict[str, list[int]] = {}
    for row, site in enumerate(sites):
        members.setdefault(site, []).append(row)
    groups = [np.array(rows) for rows in members.values()]
    draws = []
    for _ in range(samples):
        weights = np.zeros(len(sites))
        for group in random.integers(len(groups), size=len(groups)):
            rows = groups[group]
            np.add.at(weights, rows[random.integers(len(rows), size=len(rows))], 1)
        draws.append(statistic(weights))
    return np.stack(draws)
