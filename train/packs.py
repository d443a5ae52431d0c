"""Prepared rows → packed batches with targets, in an order that is a function of seed and epoch alone.

Knows Parquet columns, targets and packing; knows nothing of the network or the loss.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import torch

from copydesk.encode import EncodedPage, PageBatch, TextEncoder, chunk, collate_pages
from copydesk.labels import CLASSES, TopicList
from copydesk.split import RawPage, split
from train.config import TransformerFit

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
class Pack:
    """One step's worth of rows."""

    views: list[PageBatch]
    """The same pages, as page encoder v mod P sees them in view v; the chunks of their texts stand in the first."""
    classes: torch.Tensor
    """(sections,)."""
    articles: list[tuple[torch.Tensor, torch.Tensor | None]]
    """Chunks of token ids and mask."""
    holds: torch.Tensor
    """(articles, topics), in the order of the chunks' rows."""
    decided: torch.Tensor
    """(articles, topics)."""


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


def batches_of(rows: Sequence[Any], sizes: Sequence[int], budget: int = 32_768) -> Iterator[list[Any]]:
    """Yield rows in batches of about `budget` in all."""
    batch: list[Any] = []
    total = 0
    for row, size in zip(rows, sizes, strict=True):
        if batch and total + size > budget:
            yield batch
            batch, total = [], 0
        batch.append(row)
        total += size
    if batch:
        yield batch


def pack(
    views: Sequence[Sequence[TrainingPage]], articles: Sequence[TrainingArticle], *, pad_id: int, num_topics: int
) -> Pack:
    """Pack rows as they are.

    Args:
        views: the same pages as they are to be seen.
        articles: what the topic head is to read.
        pad_id: the token that fills up rows.
        num_topics: length of the targets of an article.
    """
    pages = collate_pages([page.encoded for page in views[0]], pad_id=pad_id)
    without_texts = replace(pages, chunks=[])
    ordered = sorted(articles, key=lambda article: len(article.tokens))
    targets = [
        torch.from_numpy(np.stack([getattr(article, name) for article in ordered]))
        if ordered
        else torch.zeros(0, num_topics)
        for name in ("holds", "decided")
    ]
    return Pack(
        views=[pages, *(without_texts.showing([page.encoded for page in view]) for view in views[1:])],
        classes=torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *[page.classes for page in views[0]]])),
        articles=chunk([article.tokens for article in ordered], pad_id=pad_id),
        holds=targets[0],
        decided=targets[1],
    )


class Packs(torch.utils.data.Dataset[Pack]):
    """The packs of all epochs, one after the other: item `i` is pack `i % num_packs` of epoch `i // num_packs`.

    Every epoch has the same number of packs, a multiple of `num_processes`, so that a step number says which rows were
    seen, in any process count.
    """

    def __init__(
        self,
        pages: Sequence[TrainingPage],
        articles: Sequence[TrainingArticle],
        *,
        settings: TransformerFit,
        epochs: int,
        pad_id: int,
        num_topics: int,
        num_processes: int = 1,
    ) -> None:
        self.pages, self.articles = pages, articles
        self.settings, self.epochs = settings, epochs
        self.pad_id, self.num_topics = pad_id, num_topics
        tokens = sum(page.encoded.num_tokens * self._share(page) for page in pages)
        self.num_steps = max(1, round(tokens / settings.tokens_per_batch))
        self.num_packs = self.num_steps * num_processes
        self._plans: dict[int, tuple[int, list[list[int]], list[list[int]]]] = {}

    def __len__(self) -> int:
        return self.num_packs * self.epochs

    @cached_property
    def class_counts(self) -> np.ndarray:
        """(classes,): sections of each class that an epoch shows on average."""
        shown = np.repeat([self._share(page) for page in self.pages], [len(page.classes) for page in self.pages])
        return np.bincount(np.concatenate([page.classes for page in self.pages]), weights=shown, minlength=len(CLASSES))

    def __getitem__(self, index: int) -> Pack:
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        pages, articles = self.rows_of(index)
        epoch = index // self.num_packs
        return pack(
            [[self.with_dropped_hints(i, epoch, view) for i in pages] for view in range(self.settings.num_views)],
            [self.articles[i] for i in articles],
            pad_id=self.pad_id,
            num_topics=self.num_topics,
        )

    def _share(self, page: TrainingPage) -> float:
        return self.settings.page_share.get(page.source, 1.0) * (self.settings.cleaned_share if page.cleaned else 1.0)

    def _arrange(self, epoch: int, reader: int) -> tuple[list[list[int]], list[list[int]]]:
        random = np.random.default_rng([self.settings.seed, epoch, reader])
        drawn = random.random(len(self.pages)) < np.array([self._share(page) for page in self.pages])
        pages = self._deal({i: self.pages[i].encoded.num_tokens for i in np.flatnonzero(drawn).tolist()}, random)
        return pages, self._deal({i: len(article.tokens) for i, article in enumerate(self.articles)}, random)

    def _deal(self, sizes: dict[int, int], random: np.random.Generator) -> list[list[int]]:
        """Shuffle rows and cut them into `num_packs` stretches of about equal size.

        The cuts between steps are the same in any process count.
        """
        packs: list[list[int]] = [[] for _ in range(self.num_packs)]
        total, before = sum(sizes.values()), 0.0
        for row in random.permutation(list(sizes)).tolist():
            middle = min((before + sizes[row] / 2) / total * self.num_steps, self.num_steps - 1e-9)
            step, share = int(middle), self.num_packs // self.num_steps
            packs[step * share + int((middle - step) * share)].append(row)
            before += sizes[row]
        return packs

    def rows_of(self, index: int, reader: int = 0) -> tuple[list[int], list[int]]:
        """Return which pages and which articles an item packs; each reader has an order of its own."""
        epoch, number = divmod(index, self.num_packs)
        plan = self._plans.get(reader)
        if plan is None or plan[0] != epoch:
            plan = self._plans[reader] = (epoch, *self._arrange(epoch, reader))
        return plan[1][number], plan[2][number]

    def rows_of_step(self, step: int, reader: int = 0) -> tuple[list[int], list[int]]:
        """Return which pages and which articles the packs of all processes hold in a step."""
        share = self.num_packs // self.num_steps
        packs = [self.rows_of(step * share + i, reader) for i in range(share)]
        return [row for pages, _ in packs for row in pages], [row for _, articles in packs for row in articles]

    def with_dropped_hints(self, index: int, epoch: int, view: int = 0) -> TrainingPage:
        """Return a page as this epoch shows it in a view: with most hints, without class names, or as text."""
        page = self.pages[index]
        random = np.random.default_rng([self.settings.seed, epoch, index, view])
        draw = random.random()
        if draw < self.settings.hint_dropout:
            encoded = page.encoded.without_hints()
            if random.random() < self.settings.spacing_dropout:
                encoded = encoded.without_blank_lines()
        elif draw < self.settings.hint_dropout + self.settings.attribute_hint_dropout:
            encoded = page.encoded.without_attribute_hints()
        else:
            encoded = page.encoded
        if self.settings.hint_word_dropout:
            encoded = encoded.thinned(random, share=self.settings.hint_word_dropout)
        return replace(page, encoded=encoded)
