"""Stage 1: sources → deduplicated, site-disjoint, checked splits.

Knows duplicates, sites and splits; knows nothing of tokens or models. Writes `pages/SPLIT.parquet`,
`articles/SPLIT.parquet` and `report.json` (counts, quarantined rows, leakage) to `data/prepared/NAME`.
"""

import hashlib
import json
import logging
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasketch import MinHash, MinHashLSH

from copydesk.labels import CLASSES, TopicList
from train import checkpoints
from train.arguments import experiment_from_arguments
from train.config import Experiment, Prepare
from train.sources import annotated_pages
from train.sources.articles import LabelledArticle, read_articles, read_topics
from train.sources.pages import AnnotatedPage, BadRow

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
ALWAYS_TRAIN = -1
"""Fold of rows that no fold holds out."""


class LeakageError(ValueError):
    """A site or an article stands on both sides of a split."""


@dataclass(slots=True)
class Row:
    """A page or an article on its way to a split."""

    item: AnnotatedPage | LabelledArticle
    site: str
    text: str
    """The article, for finding duplicates."""
    split: str = "train"
    fold: int = ALWAYS_TRAIN

    @property
    def id(self) -> str:
        """Name of the page or id of the article."""
        return self.item.annotation.page if isinstance(self.item, AnnotatedPage) else self.item.id

    @property
    def group(self) -> str:
        """What no split parts: the site, or more."""
        return (isinstance(self.item, AnnotatedPage) and self.item.group) or self.site

    @property
    def work(self) -> str:
        """What tells compositions of one article from duplicates."""
        return (isinstance(self.item, AnnotatedPage) and self.item.work) or self.id

    @property
    def weak(self) -> bool:
        """Whether a rule labelled it."""
        return isinstance(self.item, LabelledArticle) and self.item.weak


def prepare(experiment: Experiment) -> dict[str, Any]:
    """Run the stage and return its report.

    Raises:
        LeakageError: a site or a near-duplicate crosses splits.
        FileNotFoundError: a source is missing.
        ValueError: a source or the topic list cannot be used at all.
    """
    settings = experiment.prepare
    topics = read_topics(settings.topics)
    rows, bad = _read(settings, topics)
    if not any(isinstance(row.item, AnnotatedPage) for row in rows):
        reasons = "; ".join(row.reason for row in bad[:3])
        raise ValueError(f"no annotated page can be used ({len(bad)} bad rows: {reasons}): see data/README.md")
    rows, duplicates = drop_duplicates(rows, similarity=settings.near_duplicate_similarity)
    assign_splits(rows, settings=settings)
    leaks = find_leaks(rows, similarity=settings.near_duplicate_similarity)
    measuring = {source.name for source in (*settings.pages, *settings.articles) if getattr(source, "only_evaluate", 0)}
    rows = [row for row in rows if row.split != "train" or row.item.source not in measuring]
    report: dict[str, Any] = {
        "splits": {split: _counts([row for row in rows if row.split == split], topics) for split in SPLITS},
        "folds": {
            str(fold): _counts([row for row in rows if row.fold == fold], topics) for fold in range(settings.num_folds)
        },
        "quarantined": dict(Counter(row.source for row in bad)),
        "quarantine": [{"source": row.source, "row": row.row, "reason": row.reason} for row in bad],
        "duplicates": [{"dropped": dropped, "kept": kept} for dropped, kept in duplicates],
        "leaks": leaks,
    }
    _write(experiment.prepared, rows, report, topics)
    for row in bad[:20]:
        log.warning("quarantined %s: %s", row.row, row.reason)
    for split in SPLITS:
        counts = report["splits"][split]
        log.info("%s: %d pages, %d articles, %d sites", split, counts["pages"], counts["articles"], counts["sites"])
    log.info("%d quarantined, %d duplicates dropped", len(bad), len(duplicates))
    if leaks:
        raise LeakageError(
            f"{len(leaks)} leak(s) across splits, the first: {leaks[0]}. All are in {experiment.prepared}/report.json; "
            "give sites of one publisher one name under prepare.site_aliases"
        )
    return report


def _read(settings: Prepare, topics: TopicList) -> tuple[list[Row], list[BadRow]]:
    rows: list[Row] = []
    bad: list[BadRow] = []
    for page_source in settings.pages:
        for page in annotated_pages(page_source, topics):
            if isinstance(page, BadRow):
                bad.append(page)
            else:
                rows.append(Row(page, page.annotation.site, "\n".join(page.article()).strip() or page.raw.text))
    for article_source in settings.articles:
        for article in read_articles(article_source, topics):
            if isinstance(article, BadRow):
                bad.append(article)
            else:
                rows.append(Row(article, article.site, f"{article.title}\n{article.text}"))
    for row in rows:
        row.site = settings.site_aliases.get(row.site, row.site)
    return rows, bad


_WORD = re.compile(r"\w+")


def _shingles(text: str) -> frozenset[bytes]:
    words = _WORD.findall(text.lower())[:2_000]
    if len(words) < 5:
        return frozenset((" ".join(words).encode(),))
    return frozenset(" ".join(words[i : i + 5]).encode() for i in range(len(words) - 4))


class _NearDuplicates:
    """Index of texts by MinHash (Broder 1997), candidates verified exactly."""

    def __init__(self, *, similarity: float, seed: int) -> None:
        self.similarity, self.seed = similarity, seed
        # A lower threshold in the index loses hardly a pair: what it finds too much is verified away.
        self.index = MinHashLSH(threshold=similarity * 0.6, num_perm=128)
        self.shingles: dict[int, frozenset[bytes]] = {}

    def find(self, text: str) -> tuple[list[int], Callable[[int], None]]:
        """Return the keys of all near-duplicates in the index, and what adds the text to it under a key."""
        shingles = _shingles(text)
        signature = MinHash(num_perm=128, seed=self.seed)
        signature.update_batch(sorted(shingles))

        def add(key: int) -> None:
            self.index.insert(key, signature)
            self.shingles[key] = shingles

        return [other for other in sorted(self.index.query(signature)) if self._alike(shingles, other)], add

    def _alike(self, shingles: frozenset[bytes], other: int) -> bool:
        theirs = self.shingles[other]
        return len(shingles & theirs) >= self.similarity * len(shingles | theirs)


def drop_duplicates(rows: Sequence[Row], *, similarity: float) -> tuple[list[Row], list[tuple[str, str]]]:
    """Keep one of each article: pages before articles, judged before weak, else the first.

    Returns:
        The kept rows, and pairs of ids: dropped, kept in its place.
    """
    order = sorted(range(len(rows)), key=lambda i: (isinstance(rows[i].item, LabelledArticle), rows[i].weak, i))
    index = _NearDuplicates(similarity=similarity, seed=1)
    duplicates = []
    kept = []
    for i in order:
        others, add = index.find(rows[i].text)
        others = [other for other in others if rows[other].work != rows[i].work]
        if others:
            duplicates.append((rows[i].id, rows[others[0]].id))
        else:
            kept.append(i)
            add(i)
    return [rows[i] for i in sorted(kept)], duplicates


def assign_splits(rows: Sequence[Row], *, settings: Prepare) -> None:
    """Give each site a split and a fold, stratified by source, language and paywall text; deterministic by seed."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    strata: dict[tuple, list[str]] = defaultdict(list)
    for group, members in groups.items():
        if not _always_trains(members, settings=settings):
            strata[_stratum(members)].append(group)
    # Parts are test, then the folds; fold 0 is validation.
    share = (1 - settings.test_fraction) / settings.num_folds
    target = np.array([settings.test_fraction, *[share] * settings.num_folds])
    for stratum in sorted(strata):
        sizes = {group: _size(groups[group]) for group in strata[stratum]}
        # The largest first, then by a hash of the name: a site more or less moves few others.
        names = sorted(sizes, key=lambda group: (-sizes[group], _shuffled(group, settings.seed)))
        filled = np.zeros(len(target))
        for group in names:
            part = int(np.argmax(target * (filled.sum() + sizes[group]) - filled))
            filled[part] += sizes[group]
            for row in groups[group]:
                row.split = ("test", "validation")[part] if part < 2 else "train"
                row.fold = part - 1 if part else ALWAYS_TRAIN


def _always_trains(members: Sequence[Row], *, settings: Prepare) -> bool:
    pages = [row.item for row in members if isinstance(row.item, AnnotatedPage)]
    composed = any(page.work for page in pages)
    return any(page.only_train for page in pages) or (len(members) > settings.large_site_rows and not composed)


def _size(members: Sequence[Row]) -> int:
    """Count the pages of a site; its articles only where it has no pages, so that they crowd out none."""
    pages = sum(isinstance(row.item, AnnotatedPage) for row in members)
    return pages or len(members)


def _shuffled(site: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{site}".encode()).hexdigest()


def _stratum(members: Iterable[Row]) -> tuple[str, bool, bool]:
    paywall = CLASSES.index("paywall")
    pages = [row.item for row in members if isinstance(row.item, AnnotatedPage)]
    if not pages:
        return "articles", True, False
    return (
        pages[0].source,
        pages[0].annotation.language == "en",
        any(paywall in page.classes for page in pages),
    )


def find_leaks(rows: Sequence[Row], *, similarity: float) -> list[str]:
    """Describe each site and each near-duplicate that stands in two splits; independent of how they were made."""
    leaks = []
    splits: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        splits[f"site {row.site}"].add(row.split)
        if row.group != row.site:
            splits[f"group {row.group}"].add(row.split)
    leaks += [f"{name} is in {' and '.join(sorted(found))}" for name, found in splits.items() if len(found) > 1]
    index = _NearDuplicates(similarity=similarity, seed=2)
    for i, row in enumerate(rows):
        others, add = index.find(row.text)
        leaks += [
            f"{row.id} ({row.split}) is a near-duplicate of {rows[other].id} ({rows[other].split})"
            for other in others
            if rows[other].split != row.split
        ]
        add(i)
    return leaks


def _counts(rows: Sequence[Row], topics: TopicList) -> dict[str, Any]:
    pages = [row.item for row in rows if isinstance(row.item, AnnotatedPage)]
    articles = [row.item for row in rows if isinstance(row.item, LabelledArticle)]
    sections = Counter(CLASSES[label] for page in pages for label in page.classes)
    with_label = Counter(CLASSES[label] for page in pages for label in set(page.classes))
    positives = Counter(topic for page in pages for topic in topics.with_parents(page.annotation.topics or ()))
    positives.update(topic for article in articles for topic in article.topics)

    def table(key: Callable[[AnnotatedPage], str]) -> dict[str, int]:
        return dict(Counter(key(page) for page in pages).most_common())

    return {
        "pages": len(pages),
        "articles": len(articles),
        "sites": len({row.site for row in rows}),
        "sections": {label: sections[label] for label in CLASSES},
        "pages_with": {label: with_label[label] for label in CLASSES},
        "topics": {topic.slug: positives[topic.id] for topic in topics.topics},
        "sources": table(lambda page: page.source),
        "languages": table(lambda page: page.annotation.language),
        "genres": table(lambda page: page.annotation.genre),
    }


def _write(folder: Path, rows: Sequence[Row], report: dict[str, Any], topics: TopicList) -> None:
    with checkpoints.replacing(folder) as partial:
        for kind in ("pages", "articles"):
            (partial / kind).mkdir()
        for split in SPLITS:
            chosen = [row for row in rows if row.split == split]
            pages = [_page_row(row, row.item, topics) for row in chosen if isinstance(row.item, AnnotatedPage)]
            articles = [_article_row(row, row.item) for row in chosen if isinstance(row.item, LabelledArticle)]
            _write_rows(partial / "pages" / f"{split}.parquet", pages, PAGE_FEATURES)
            _write_rows(partial / "articles" / f"{split}.parquet", articles, ARTICLE_FEATURES)
        (partial / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _write_rows(file: Path, rows: Sequence[dict[str, Any]], features: datasets.Features) -> None:
    columns = {name: [row[name] for row in rows] for name in features}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(file)


_STRING, _INTEGER = datasets.Value("string"), datasets.Value("int32")
PAGE_FEATURES = datasets.Features(
    {
        "id": _STRING,
        "source": _STRING,
        "site": _STRING,
        "url": _STRING,
        "language": _STRING,
        "genre": _STRING,
        "kind": _STRING,
        "content": datasets.Value("large_string"),
        "classes": datasets.List(datasets.Value("int8")),
        "topics": datasets.List(_STRING),
        "topics_known": datasets.Value("bool"),
        "fold": _INTEGER,
    }
)
ARTICLE_FEATURES = datasets.Features(
    {
        "id": _STRING,
        "source": _STRING,
        "site": _STRING,
        "language": _STRING,
        "title": _STRING,
        "text": datasets.Value("large_string"),
        "topics": datasets.List(_STRING),
        "decided": datasets.List(_STRING),
        "weak": datasets.Value("bool"),
        "fold": _INTEGER,
    }
)


def _page_row(row: Row, page: AnnotatedPage, topics: TopicList) -> dict[str, Any]:
    annotation = page.annotation
    return {
        "id": annotation.page,
        "source": page.source,
        "site": row.site,
        "url": annotation.url,
        "language": annotation.language,
        "genre": annotation.genre,
        "kind": page.raw.kind,
        "content": page.content,
        "classes": page.classes,
        "topics": topics.with_parents(annotation.topics or ()),
        "topics_known": annotation.topics is not None,
        "fold": row.fold,
    }


def _article_row(row: Row, article: LabelledArticle) -> dict[str, Any]:
    return {
        "id": article.id,
        "source": article.source,
        "site": row.site,
        "language": article.language,
        "title": article.title,
        "text": article.text,
        "topics": article.topics,
        "decided": article.decided,
        "weak": article.weak,
        "fold": row.fold,
    }


def main() -> None:
    """Run the stage from the command line."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    datasets.disable_progress_bars()
    experiment = experiment_from_arguments("Stage 1: sources → deduplicated, site-disjoint, checked splits.")
    try:
        prepare(experiment)
    except (ValueError, OSError) as error:
        sys.exit(f"prepare: {error}")


if __name__ == "__main__":
    main()
