"""Prepared rows → encoded rows with targets.

Knows Parquet columns and targets; knows nothing of batches, the network or the loss.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet

from copydesk.encode import EncodedPage, TextEncoder
from copydesk.labels import CLASSES, TopicList
from copydesk.split import RawPage, split

_HEADLINE, _BODY, _BOILERPLATE = map(CLASSES.index, ("headline", "body", "boilerplate"))


@dataclass(frozen=True, slots=True)
class TrainingPage:
    """A page as numbers, with its targets."""

    id: str
    source: str
    site: str
    fold: int
    encoded: EncodedPage
    classes: np.ndarray
    """(sections,) of int64."""
    cleaned: bool = False
    """It is a copy, as somebody else may have cleaned the page."""


@dataclass(frozen=True, slots=True)
class TrainingArticle:
    """An article as numbers, with what is known of its topics."""

    id: str
    site: str
    fold: int
    tokens: list[int]
    holds: np.ndarray
    """(topics,) of float32: 1 where the topic holds."""
    decided: np.ndarray
    """(topics,) of float32: 1 where it is known whether it holds."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Encoded rows of one side of a split."""

    pages: list[TrainingPage]
    articles: list[TrainingArticle]

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """Return the rows of all parts."""
        return cls([row for part in parts for row in part.pages], [row for part in parts for row in part.articles])

    def marks(self, name: str, *, num_topics: int) -> np.ndarray:
        """Return (articles, topics): `holds` or `decided`."""
        marks = [getattr(article, name) for article in self.articles]
        return np.array(marks, dtype=np.float32).reshape(-1, num_topics)

    def inside(self, folds: frozenset[int]) -> "Rows":
        """Return the rows of these folds, without cleaned copies."""
        return Rows(
            [row for row in self.pages if row.fold in folds and not row.cleaned],
            [row for row in self.articles if row.fold in folds],
        )

    def outside(self, folds: frozenset[int]) -> "Rows":
        """Return the rows of no such fold."""
        return Rows(
            [row for row in self.pages if row.fold not in folds],
            [row for row in self.articles if row.fold not in folds],
        )


def load_rows(prepared: Path, kind: str, split_name: str) -> datasets.Dataset:
    """Read the rows of a split.

    Args:
        prepared: folder that the prepare stage wrote.
        kind: `pages` or `articles`.
        split_name: `train`, `validation` or `test`.

    Raises:
        FileNotFoundError: the stage has not run.
    """
    path = prepared / kind / f"{split_name}.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: run `python -m train.prepare` with the same config first")
    return datasets.Dataset(pyarrow.parquet.read_table(path))  # from_parquet refuses a file without rows


def resplit(row: dict[str, Any]) -> RawPage:
    """Split a prepared page.

    Raises:
        ValueError: it was prepared by a version that split it otherwise.
    """
    raw = split(row["content"], kind=row["kind"])
    if len(raw.sections) != len(row["classes"]):
        raise ValueError(
            f"page {row['id']} has {len(raw.sections)} sections, it was prepared with {len(row['classes'])}: "
            "run `python -m train.prepare` again"
        )
    return raw


def gold_article(raw: RawPage, classes: Sequence[int]) -> str:
    """Return headline, line break and body of a page as labelled: what its topics are read from."""
    texts = raw.texts()
    parts = [
        text for wanted in (_HEADLINE, _BODY) for text, label in zip(texts, classes, strict=True) if label == wanted
    ]
    return "\n".join(parts)


def choose_hints(pages: Iterable[dict[str, Any]], *, min_sites: int) -> list[str]:
    """Return the hints on the pages of at least `min_sites` sites, in alphabetical order."""
    sites: dict[str, set[str]] = defaultdict(set)
    for row in pages:
        for section in resplit(row).sections:
            for hint in section.hints:
                sites[hint].add(row["site"])
    return sorted(hint for hint, found in sites.items() if len(found) >= min_sites)


def encode_rows(
    pages: Iterable[dict[str, Any]], articles: Iterable[dict[str, Any]], *, encoder: TextEncoder, topics: TopicList
) -> tuple[list[TrainingPage], list[TrainingArticle]]:
    """Encode prepared rows; a page whose topics are known is an article too."""
    encoded_pages: list[TrainingPage] = []
    rows: list[tuple[dict[str, Any], str, list[str]]] = []
    everything = [topic.id for topic in topics.topics]
    for row in pages:
        raw = resplit(row)
        classes = np.array(row["classes"], dtype=np.int64)
        encoded_pages.append(
            TrainingPage(row["id"], row["source"], row["site"], row["fold"], encoder.encode_page(raw), classes)
        )
        text = gold_article(raw, row["classes"])
        if row["topics_known"] and text:
            rows.append((row, text, everything))
    rows += [(row, f"{row['title']}\n{row['text']}", row["decided"]) for row in articles]
    tokens = encoder.encode_articles([text for _, text, _ in rows])
    return encoded_pages, [
        TrainingArticle(row["id"], row["site"], row["fold"], ids, _mark(row["topics"], topics), _mark(decided, topics))
        for (row, _, decided), ids in zip(rows, tokens, strict=True)
    ]


def cleaned_copies(
    pages: Iterable[dict[str, Any]], *, encoder: TextEncoder, random: np.random.Generator
) -> Iterator[TrainingPage]:
    """Yield copies of prepared pages as texts that somebody else has cleaned, well or not so well.

    Half of them have no boilerplate, the others a little of it; half of them, again, are nothing but a beginning. Pages
    without an article have none.
    """
    for row in pages:
        texts, classes = resplit(row).texts(), np.array(row["classes"], dtype=np.int64)
        left = random.choice([0, 0.1 * random.random()])
        kept = np.flatnonzero((classes != _BOILERPLATE) | (random.random(len(classes)) < left))
        if random.random() < 0.5:
            kept = kept[: random.integers(1, 13)]
        if not np.isin(classes[kept], (_HEADLINE, _BODY)).any():
            continue
        text = "\n\n".join(" ".join(texts[i].split()) for i in kept)
        yield TrainingPage(
            row["id"],
            row["source"],
            row["site"],
            row["fold"],
            encoder.encode_page(split(text, kind="text")),
            classes[kept],
            cleaned=True,
        )


def _mark(ids: Iterable[str], topics: TopicList) -> np.ndarray:
    marked = np.zeros(len(topics), dtype=np.float32)
    marked[[topics.index[topic] for topic in ids]] = 1
    return marked
