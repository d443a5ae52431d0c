"""Encoded rows → packed batches with targets, in an order that is a function of seed and epoch alone.

Knows targets and packing; knows nothing of prepared files, the network or the loss.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from copydesk.encode import PageBatch, collate_pages
from copydesk.labels import CLASSES
from copydesk.ragged import TokenRows
from train.config import TransformerFit
from train.rows import TrainingArticle, TrainingPage


@dataclass(frozen=True, slots=True)
class Pack:
    """One step's worth of rows."""

    views: list[PageBatch]
    """The same pages, as page encoder v mod P sees them in view v; their texts stand in the first."""
    classes: torch.Tensor
    """(sections,)."""
    articles: TokenRows
    holds: torch.Tensor
    """(articles, topics)."""
    decided: torch.Tensor
    """(articles, topics)."""


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


def pack(views: Sequence[Sequence[TrainingPage]], articles: Sequence[TrainingArticle], *, num_topics: int) -> Pack:
    """Pack rows as they are.

    Args:
        views: the same pages as they are to be seen.
        articles: what the topic head is to read.
        num_topics: length of the targets of an article.
    """
    pages = collate_pages([page.encoded for page in views[0]])
    without_texts = replace(pages, rows=TokenRows.of([]))
    targets = [
        torch.from_numpy(np.stack([getattr(article, name) for article in articles]))
        if articles
        else torch.zeros(0, num_topics)
        for name in ("holds", "decided")
    ]
    return Pack(
        views=[pages, *(without_texts.showing([page.encoded for page in view]) for view in views[1:])],
        classes=torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *[page.classes for page in views[0]]])),
        articles=TokenRows.of([article.tokens for article in articles]),
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
        num_topics: int,
        num_processes: int = 1,
    ) -> None:
        self.pages, self.articles = pages, articles
        self.settings, self.epochs = settings, epochs
        self.num_topics = num_topics
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
