"""The report of an evaluation: one HTML file that needs nothing else.

Knows what a reader wants to see and how much of it; knows nothing of how scores come about. It shows texts of pages, so
it stays with the experiment and its run, never in git.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score

from copydesk.labels import TopicList
from train import figures
from train.scores import LABELS, SHOWN, ScoredPage

TEMPLATE = Path(__file__).with_name("report.html")
NUM_PAGES, NUM_SITES = 10, 20
MAX_PAGE_BYTES = 150_000
"""Of the HTML that one page may take, so that ten stay below two megabytes together with the figures."""
MAX_CHARACTERS, MAX_FOLDED_CHARACTERS, MAX_FOLDED = 400, 120, 12
"""Of a section in the open; of one that is folded; folded sections in a row."""
MARKUP_BYTES = 250
"""Of a section beside its text."""


@dataclass(frozen=True, slots=True)
class Curve:
    """How precision falls as recall rises, for one label or topic."""

    name: str
    positives: int
    average_precision: float
    precision: float | None
    """None where it is given to no row."""
    recall: float
    threshold: float | None
    figure: Markup


@dataclass(frozen=True, slots=True)
class ShownSection:
    """A section as the report shows it."""

    text: str
    left_out: int
    """Characters of its text that are not shown."""
    true: str
    predicted: str
    score: float
    """Probability of the predicted label."""


@dataclass(frozen=True, slots=True)
class Run:
    """Sections in a row, all in the open or all folded."""

    sections: list[ShownSection]
    folded: Counter[str] | None
    """How many of each label, all of them right; None where the sections stand in the open."""
    left_out: int
    """Folded sections that are not shown."""


@dataclass(frozen=True, slots=True)
class ShownPage:
    """A page with its labels beside those that the model gave."""

    page: ScoredPage
    runs: list[Run]
    left_out: int
    """Sections after the last run."""
    missed: list[str]
    """Names of topics that it has and that were not marked."""
    added: list[str]
    """Names of topics that were marked and that it does not have."""


def render_report(
    result: Mapping[str, Any],
    pages: Sequence[ScoredPage],
    texts: Mapping[str, Sequence[str]],
    *,
    topics: TopicList,
    reliability: Figure,
) -> str:
    """Return the report as HTML. Whatever comes from a page is escaped.

    Args:
        result: as `scores.json` holds it.
        pages: all that were scored.
        texts: id of a page → text of each section.
        topics: in their order.
        reliability: the figure of that name.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    known = [page for page in pages if page.decided.any()]
    worst = sorted((page for page in pages if page.errors), key=lambda page: (-page.errors, page.id))[:NUM_PAGES]
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        result=result,
        scores=result["scores"],
        tables=result["tables"],
        shown=SHOWN,
        labels=[str(label) for label in LABELS],
        reliability=figures.svg(reliability, title="Accuracy against confidence, in 15 bins"),
        label_curves=list(_label_curves(pages)),
        topic_curves=list(_topic_curves(known, result["tables"]["topics"])),
        num_known=len(known),
        without_positives=[row["name"] for row in result["tables"]["topics"] if not row["pages"]],
        worst_sites=[row for row in result["tables"]["sites"] if row["errors"]][:NUM_SITES],
        worst_pages=[_show(page, texts[page.id], topics) for page in worst],
    )


def _label_curves(pages: Sequence[ScoredPage]) -> Iterator[Curve]:
    true = np.concatenate([page.true for page in pages])
    predicted = np.concatenate([page.predicted for page in pages])
    scores = np.concatenate([page.scores for page in pages])
    for i, label in enumerate(LABELS):
        if (true == i).any():
            yield _curve(str(label), true == i, scores[:, i], predicted == i, threshold=None)


def _topic_curves(pages: Sequence[ScoredPage], table: Sequence[Mapping[str, Any]]) -> Iterator[Curve]:
    for i, row in enumerate(table):
        decided = [page for page in pages if page.decided[i]]
        if row["pages"]:
            true, chosen = (np.array([getattr(page, name)[i] for page in decided]) for name in ("holds", "marked"))
            scores = np.array([page.topic_scores[i] for page in decided])
            yield _curve(row["name"], true, scores, chosen, threshold=row["threshold"])


def _curve(name: str, true: np.ndarray, scores: np.ndarray, chosen: np.ndarray, *, threshold: float | None) -> Curve:
    figure = figures.small_precision_recall(true, scores, chosen)
    drawn = figures.svg(figure, title=f"Precision against recall: {name}")
    figures.close([figure])
    hits = int((true & chosen).sum())
    return Curve(
        name=name,
        positives=int(true.sum()),
        average_precision=float(average_precision_score(true, scores)),
        precision=hits / int(chosen.sum()) if chosen.any() else None,
        recall=hits / int(true.sum()),
        threshold=threshold,
        figure=drawn,
    )


def _show(page: ScoredPage, texts: Sequence[str], topics: TopicList) -> ShownPage:
    wrong = page.predicted != page.true
    near = wrong | np.append(wrong[1:], False) | np.insert(wrong[:-1], 0, False)
    runs, size, done = [], 0, 0
    for is_open, group in groupby(range(len(texts)), key=lambda i: bool(near[i])):
        run = _run(page, texts, list(group), is_open=is_open, budget=MAX_PAGE_BYTES - size)
        size += sum(map(_size, run.sections))
        done += len(run.sections) + run.left_out
        runs.append(run)
        if size >= MAX_PAGE_BYTES:
            break
    return ShownPage(
        page=page,
        runs=runs,
        left_out=len(texts) - done,
        missed=[topics.topics[i].name for i in np.flatnonzero(page.holds & ~page.marked & page.decided)],
        added=[topics.topics[i].name for i in np.flatnonzero(page.marked & ~page.holds & page.decided)],
    )


def _run(page: ScoredPage, texts: Sequence[str], group: list[int], *, is_open: bool, budget: int) -> Run:
    folds = not is_open and len(group) > 2
    limit = MAX_FOLDED_CHARACTERS if folds else MAX_CHARACTERS
    sections: list[ShownSection] = []
    for i in group[:MAX_FOLDED] if folds else group:
        sections.append(_section(page, texts[i], i, limit=limit))
        budget -= _size(sections[-1])
        if budget <= 0:
            break
    return Run(
        sections=sections,
        folded=Counter(LABELS[page.true[i]].value for i in group) if folds else None,
        left_out=len(group) - len(sections) if folds else 0,
    )


def _section(page: ScoredPage, text: str, i: int, *, limit: int) -> ShownSection:
    return ShownSection(
        text=text[:limit],
        left_out=max(len(text) - limit, 0),
        true=LABELS[page.true[i]].value,
        predicted=LABELS[page.predicted[i]].value,
        score=float(page.scores[i].max()),
    )


def _size(section: ShownSection) -> int:
    return len(str(escape(section.text)).encode()) + MARKUP_BYTES
