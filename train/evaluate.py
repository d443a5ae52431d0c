"""Stage 4: score the released folder, through `copydesk.load`, on pages of sites that it did not train on.

Knows scores, slices and figures; knows nothing of how the model was made. Writes `scores.json`, `slices.json` and
figures to `models/NAME/evaluation`.
"""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np

import copydesk
from copydesk.decode import topics_from
from copydesk.labels import CLASSES, SectionLabel, TopicList
from copydesk.predictor import Document, Predictor
from train import figures, tracking
from train.baseline import BaselinePredictor
from train.config import BaselineFit, Experiment, experiment_from_arguments
from train.counts import page_table
from train.metrics import (
    body_f1,
    bootstrap,
    expected_calibration_error,
    label_confusion,
    labels_of,
    macro_f1,
    precision_recall_f1,
    topic_counts,
    topic_f1,
)
from train.packs import load_rows, resplit
from train.sources.articles import read_topics

log = logging.getLogger(__name__)

LABELS = tuple(SectionLabel)
TEST_READS = Path("bench/test_reads.jsonl")


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


def evaluate(experiment: Experiment) -> dict[str, float]:
    """Run the stage and return its scores.

    Raises:
        FileNotFoundError: an earlier stage has not run.
        ModelError: the released folder cannot be trusted or understood.
    """
    settings = experiment.evaluate
    rows = list(load_rows(experiment.prepared, "pages", settings.split))
    articles = list(load_rows(experiment.prepared, "articles", settings.split))
    predictor = load_predictor(experiment)
    topics = read_topics(experiment.prepare.topics)
    pages = score_pages(predictor, rows, topics=topics)
    as_text = score_pages(predictor, rows, topics=topics, as_text=True)
    slices = _slices(pages)
    scores = _headline_scores(pages, samples=settings.bootstrap_samples, seed=settings.seed)
    scores |= {f"english_news_{name}": value for name, value in slices["english news"].items()}
    scores |= {f"as_text_{name}": value for name, value in summarise(as_text).items()}
    scores |= _article_scores(predictor, articles, topics=topics)
    if settings.split == "test":
        scores["reads"] = _count_read(experiment, predictor.info.version)
    shutil.rmtree(experiment.evaluated, ignore_errors=True)
    experiment.evaluated.mkdir(parents=True)
    tables = {
        "pages": page_table(pages, topics=topics, out_of_fold=settings.split == "validation"),
        "labels": _label_table(pages),
        "topics": _topic_table(pages, topics),
        "slices": [{"slice": name, **values} for name, values in slices.items()],
    }
    result = {"split": settings.split, "model": predictor.info.model_dump(), "scores": scores, "tables": tables}
    (experiment.evaluated / "scores.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    drawn = {
        "confusion": figures.confusion(_total(page.confusion for page in pages), LABELS),
        "precision_recall_labels": figures.precision_recall(
            np.concatenate([np.eye(len(LABELS), dtype=bool)[page.true] for page in pages]),
            np.concatenate([page.scores for page in pages]),
            LABELS,
        ),
        "precision_recall_topics": figures.precision_recall(
            np.stack([page.holds for page in pages]), np.stack([page.topic_scores for page in pages]), topics.slugs()
        ),
        "reliability": figures.reliability(
            np.concatenate([page.scores.max(axis=1) for page in pages]),
            np.concatenate([page.predicted == page.true for page in pages]),
        ),
    }
    for name, figure in drawn.items():
        figure.savefig(experiment.evaluated / f"{name}.png", dpi=120)
    with tracking.continue_run(experiment) as run:
        run.log_metrics({f"{settings.split}/{name}": value for name, value in scores.items()})
        for name, figure in drawn.items():
            run.log_figure(figure, f"figures/{settings.split}_{name}.png")
        for name, table in tables.items():
            run.log_table(table, f"tables/{settings.split}_{name}.json")
    figures.close(drawn.values())
    return scores


def load_predictor(experiment: Experiment) -> Predictor | BaselinePredictor:
    """Load the released folder.

    Raises:
        FileNotFoundError: the release stage has not run.
    """
    if not experiment.released.is_dir():
        raise FileNotFoundError(f"there is no {experiment.released}: run `python -m train.release` first")
    if isinstance(experiment.fit, BaselineFit):
        return BaselinePredictor(experiment.released)
    return copydesk.load(experiment.released, device=experiment.evaluate.device)


def score_pages(
    predictor: Predictor | BaselinePredictor,
    rows: Sequence[dict[str, Any]],
    *,
    topics: TopicList,
    as_text: bool = False,
) -> list[ScoredPage]:
    """Read prepared pages and compare with their labels.

    Args:
        predictor: reads them.
        rows: of the prepared pages.
        topics: with their order.
        as_text: read each page's text as if it had come as plain text.
    """
    raws = [resplit(row) for row in rows]
    documents = [
        Document(raw.text, kind="text") if as_text else Document(row["content"], kind=row["kind"])
        for raw, row in zip(raws, rows, strict=True)
    ]
    scored = []
    read = predictor.predict(documents)
    articles = ["\n".join((page.headline or "", page.body)) for page in read]
    probabilities = predictor.topic_probabilities(articles)
    for page, raw, row, article, topic_scores in zip(read, raws, rows, articles, probabilities, strict=True):
        classes = np.array(row["classes"], dtype=np.int64)
        gold = "\n\n".join(
            text for text, label in zip(raw.texts(), classes, strict=True) if CLASSES[label] == SectionLabel.BODY
        )
        marked = {topic.id for topic in page.topics}
        scored.append(
            ScoredPage(
                id=row["id"],
                site=row["site"],
                source=row["source"],
                genre=row["genre"],
                language=row["language"],
                true=labels_of(classes),
                scores=np.array(
                    [[getattr(section.scores, label) for label in LABELS] for section in page.sections]
                ).reshape(-1, len(LABELS)),
                characters=np.array([len("".join(section.text.split())) for section in page.sections]),
                body_word_f1=body_f1(gold, page.body, n=1),
                body_4gram_f1=body_f1(gold, page.body, n=4),
                body_exact=gold.split() == page.body.split(),
                holds=np.array([topic.id in row["topics"] for topic in topics.topics]),
                marked=np.array([topic.id in marked for topic in topics.topics]),
                decided=np.full(len(topics), row["topics_known"]),
                topic_scores=topic_scores if article.strip() else np.zeros(len(topics)),
            )
        )
    return scored


def summarise(pages: Sequence[ScoredPage]) -> dict[str, float]:
    """Return the scores of some pages, each a number that can be compared."""
    confusion = _total(page.confusion for page in pages)
    f1 = precision_recall_f1(confusion)[2]
    micro, macro, _ = topic_f1(_total(page.topics for page in pages))
    scores = np.concatenate([page.scores.max(axis=1) for page in pages])
    correct = np.concatenate([page.predicted == page.true for page in pages])
    return {
        "pages": len(pages),
        "sections": len(scores),
        "macro_f1": float(macro_f1(confusion)),
        "characters_macro_f1": float(macro_f1(_total(page.character_confusion for page in pages))),
        **{f"{label}_f1": float(f1[i]) for i, label in enumerate(LABELS)},
        "body_word_f1": float(np.mean([page.body_word_f1 for page in pages])),
        "body_4gram_f1": float(np.mean([page.body_4gram_f1 for page in pages])),
        "body_exact": float(np.mean([page.body_exact for page in pages])),
        "topics_micro_f1": float(micro),
        "topics_macro_f1": float(macro),
        "section_ece": expected_calibration_error(scores, correct),
    }


def _total(counts: Iterable[np.ndarray]) -> np.ndarray:
    return np.sum(list(counts), axis=0)


def _headline_scores(pages: Sequence[ScoredPage], *, samples: int, seed: int) -> dict[str, float]:
    """Return the scores of all pages, those with an interval as NAME, NAME_low, NAME_high."""
    names = [
        "macro_f1", "characters_macro_f1", *(f"{label}_f1" for label in LABELS),
        "body_word_f1", "body_4gram_f1", "topics_micro_f1", "topics_macro_f1",
    ]  # fmt: skip
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
    for name, a, b in zip(names, low, high, strict=True):
        scores |= {f"{name}_low": float(a), f"{name}_high": float(b)}
    return scores


def _slices(pages: Sequence[ScoredPage]) -> dict[str, dict[str, float]]:
    """Score the pages by source, genre, language and length."""
    cuts: dict[str, Callable[[ScoredPage], str]] = {
        "source": lambda page: page.source,
        "genre": lambda page: page.genre,
        "language": lambda page: page.language,
        "length": lambda page: _length(len(page.true)),
    }
    groups: dict[str, list[ScoredPage]] = {
        "all": list(pages),
        "english news": [page for page in pages if page.genre == "news" and page.language == "en"],
    }
    for name, key in cuts.items():
        for page in sorted(pages, key=key):
            groups.setdefault(f"{name}: {key(page)}", []).append(page)
    return {name: summarise(group) for name, group in groups.items() if group}


def _length(sections: int) -> str:
    return next(
        (f"{name} sections" for limit, name in ((50, "1–50"), (200, "51–200")) if sections <= limit), "over 200"
    )


def _article_scores(
    predictor: Predictor | BaselinePredictor, rows: Sequence[dict[str, Any]], *, topics: TopicList
) -> dict[str, float]:
    """Score the topics of articles that came without a page."""
    if not rows:
        return {}
    probabilities = predictor.topic_probabilities([f"{row['title']}\n{row['text']}" for row in rows])
    thresholds = predictor.thresholds
    marked, _ = topics_from(probabilities, thresholds=thresholds, topics=topics)
    holds = np.array([[topic.id in row["topics"] for topic in topics.topics] for row in rows])
    decided = np.array([[topic.id in row["decided"] for topic in topics.topics] for row in rows])
    micro, macro, _ = topic_f1(topic_counts(holds, marked, decided))
    return {"articles": len(rows), "articles_topics_micro_f1": float(micro), "articles_topics_macro_f1": float(macro)}


def _label_table(pages: Sequence[ScoredPage]) -> list[dict[str, Any]]:
    sections = precision_recall_f1(_total(page.confusion for page in pages))
    characters = precision_recall_f1(_total(page.character_confusion for page in pages))
    support = np.bincount(np.concatenate([page.true for page in pages]), minlength=len(LABELS))
    return [
        {
            "label": str(label),
            "sections": int(support[i]),
            **dict(zip(("precision", "recall", "f1"), sections[:, i].tolist(), strict=True)),
            **dict(zip(("char_precision", "char_recall", "char_f1"), characters[:, i].tolist(), strict=True)),
        }
        for i, label in enumerate(LABELS)
    ]


def _topic_table(pages: Sequence[ScoredPage], topics: TopicList) -> list[dict[str, Any]]:
    counts = _total(page.topics for page in pages)
    _, _, f1 = topic_f1(counts)
    return [
        {
            "topic": topic.slug,
            "pages": int(counts[i, 2]),
            "marked": int(counts[i, 1]),
            "precision": float(counts[i, 0] / max(counts[i, 1], 1)),
            "recall": float(counts[i, 0] / max(counts[i, 2], 1)),
            "f1": float(f1[i]),
        }
        for i, topic in enumerate(topics.topics)
    ]


def _count_read(experiment: Experiment, version: str) -> int:
    """Record that test was read, and return how often it has been."""
    TEST_READS.parent.mkdir(exist_ok=True)
    read = {"date": datetime.now(UTC).date().isoformat(), "experiment": experiment.name, "version": version}
    with TEST_READS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(read) + "\n")
    return len(TEST_READS.read_text("utf-8").splitlines())


def main() -> None:
    """Run the stage from the command line."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    datasets.disable_progress_bars()
    experiment = experiment_from_arguments("Stage 4: score the released folder.")
    try:
        scores = evaluate(experiment)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"evaluate: {error}")
    for name in ("macro_f1", "body_word_f1", "body_4gram_f1", "topics_micro_f1"):
        low, high = scores[f"{name}_low"], scores[f"{name}_high"]
        log.info("%s %s %.3f (%.3f–%.3f)", experiment.evaluate.split, name, scores[name], low, high)


if __name__ == "__main__":
    main()
