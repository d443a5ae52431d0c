"""Stage 4: score the released folder, through `copydesk.load`, on pages of sites that it did not train on.

Knows which rows are read and what is logged; knows nothing of how the model was made. Writes `scores.json`, figures,
`report.html` to look at and `README.md`, the model's card with its scores, to `models/NAME/evaluation`.
"""

import json
import logging
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError

import copydesk
from copydesk.decode import topics_from
from copydesk.encoder import sha256_of
from copydesk.labels import CLASSES, SectionLabel, TopicList
from copydesk.page import Page
from copydesk.predictor import Document, Predictor
from copydesk.saved import CARD
from copydesk.split import RawPage
from train import checkpoints, figures, tracking
from train.arguments import experiment_from_arguments
from train.baseline import BaselinePredictor
from train.card import scored_card
from train.config import BaselineFit, Experiment
from train.counts import page_table
from train.fit import MADE_OF, fitted_weights, hashes_of_rows
from train.metrics import body_f1, labels_of, topic_counts, topic_f1
from train.release import FITTED, named_rows, read_origin
from train.report import render_report
from train.rows import load_rows, resplit
from train.scores import (
    LABELS,
    ScoredPage,
    confusion_table,
    english_news,
    headline_scores,
    label_table,
    site_table,
    slice_table,
    summarise,
    topic_table,
    total,
)
from train.sources.articles import read_topics

log = logging.getLogger(__name__)

TEST_READS = Path("bench/test_reads.jsonl")


def evaluate(experiment: Experiment) -> dict[str, float]:
    """Run the stage and return its scores.

    Raises:
        FileNotFoundError: an earlier stage has not run.
        ModelError: the released folder cannot be trusted or understood.
        ValueError: the model trained on what it is to be scored on, or on rows that are not those prepared now.
    """
    settings = experiment.evaluate
    if experiment.is_refit and settings.split == "validation":
        raise ValueError(
            f"{experiment.folder} trained on validation (fit.refit), expected evaluate.split: test. What validation "
            f"says of its settings is in {experiment.before_refit.evaluated}"
        )
    rows = list(load_rows(experiment.prepared, "pages", settings.split))
    articles = list(load_rows(experiment.prepared, "articles", settings.split))
    predictor = load_predictor(experiment)
    check_release(experiment)
    card = (experiment.released / CARD).read_text("utf-8")
    topics = read_topics(experiment.prepare.topics)
    raws = [resplit(row) for row in rows]
    started = time.perf_counter()
    read = predictor.predict([Document(row["content"], kind=row["kind"]) for row in rows])
    seconds = time.perf_counter() - started
    as_text = predictor.predict([Document(raw.text, kind="text") for raw in raws])
    pages = score_pages(predictor, read, rows, raws, topics=topics)
    scores = headline_scores(pages, samples=settings.bootstrap_samples, seed=settings.seed)
    scores |= {"seconds": seconds, "pages_per_second": len(pages) / seconds}
    if in_english := english_news(pages):
        scores |= {f"english_news_{name}": value for name, value in summarise(in_english).items()}
    scored_as_text = score_pages(predictor, as_text, rows, raws, topics=topics)
    scores |= {f"as_text_{name}": value for name, value in summarise(scored_as_text).items()}
    scores |= _article_scores(predictor, articles, topics=topics)
    if settings.split == "test":
        scores["reads"] = _count_read(experiment, predictor.info.version)
    result = {
        "experiment": experiment.title,
        "split": settings.split,
        "model": predictor.info.model_dump(),
        "device": device_of(predictor),
        "scores": scores,
        "tables": {
            "pages": page_table(pages, topics=topics, out_of_fold=settings.split == "validation"),
            "labels": label_table(pages),
            "confusion": confusion_table(pages),
            "topics": topic_table(pages, topics, predictor.thresholds),
            "slices": slice_table(pages),
            "sites": site_table(pages),
        },
    }
    texts = {row["id"]: raw.texts() for row, raw in zip(rows, raws, strict=True)}
    drawn = _draw(pages, topics)
    report = render_report(result, pages, texts, topics=topics, reliability=drawn["reliability"])
    _write(experiment, result, drawn, {"report.html": report, CARD: scored_card(card, result)})
    figures.close(drawn.values())
    return scores


def check_release(experiment: Experiment) -> None:
    """See to it that the pages are split as when the model was fitted, and that the fit beside it is its own.

    Else it may have trained on them, and its scores would be logged as those of another model.

    Raises:
        ValueError: they are not, or it is not.
    """
    origin, rows = read_origin(experiment.released), named_rows(hashes_of_rows(experiment))
    if changed := [name for name in rows if origin.get(name, rows[name]) != rows[name]]:
        raise ValueError(
            f"{experiment.released} was fitted on other rows than {experiment.prepared} holds now, other "
            f"{', '.join(changed)}: run train.fit and train.release again, or train.prepare as before"
        )
    weights = fitted_weights(experiment)
    if FITTED in origin and (experiment.fitted / MADE_OF).is_file():
        if not weights.is_file():
            raise ValueError(
                f"{experiment.released} is of another fit than {experiment.fitted}, which was not finished: run "
                "train.fit with --resume, then train.release"
            )
        if (found := sha256_of(weights)) != origin[FITTED]:
            raise ValueError(
                f"{experiment.released} is of another fit: {weights} has the sha256 {found}, expected "
                f"{origin[FITTED]}. Run train.release"
            )


def _draw(pages: Sequence[ScoredPage], topics: TopicList) -> dict[str, Figure]:
    known = [page for page in pages if page.decided.any()]
    labels = np.eye(len(LABELS), dtype=bool)
    return {
        "confusion": figures.confusion(total(page.confusion for page in pages), LABELS),
        "precision_recall_labels": figures.precision_recall(
            labels[np.concatenate([page.true for page in pages])],
            np.concatenate([page.scores for page in pages]),
            labels[np.concatenate([page.predicted for page in pages])],
            LABELS,
        ),
        "precision_recall_topics": figures.precision_recall(
            np.array([page.holds for page in known]).reshape(-1, len(topics)),
            np.array([page.topic_scores for page in known]).reshape(-1, len(topics)),
            np.array([page.marked for page in known]).reshape(-1, len(topics)),
            topics.slugs(),
        ),
        "reliability": figures.reliability(
            np.concatenate([page.scores.max(axis=1) for page in pages]),
            np.concatenate([page.predicted == page.true for page in pages]),
        ),
    }


def _write(experiment: Experiment, result: dict[str, Any], drawn: dict[str, Figure], texts: dict[str, str]) -> None:
    """Write scores, figures and texts to the experiment's folder and its run."""
    split = experiment.evaluate.split
    with checkpoints.replacing(experiment.evaluated) as folder:
        (folder / "scores.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        for name, figure in drawn.items():
            figure.savefig(folder / f"{name}.png", dpi=120)
        for name, text in texts.items():
            (folder / name).write_text(text, "utf-8")
    with tracking.continue_run(experiment, stage="evaluate") as run:
        run.log_metrics({f"{split}/{name}": value for name, value in result["scores"].items()})
        for name, figure in drawn.items():
            run.log_figure(figure, f"figures/{split}_{name}.png")
        for name, table in result["tables"].items():
            run.log_table(table, f"tables/{split}_{name}.json")
        for name, text in texts.items():
            run.log_text(text, f"{split}/{name}")


def load_predictor(experiment: Experiment) -> Predictor | BaselinePredictor:
    """Load the released folder.

    Raises:
        FileNotFoundError: the release stage has not run.
    """
    if not (card := experiment.released / CARD).is_file():
        raise FileNotFoundError(f"there is no {card}: run `python -m train.release` first")
    if isinstance(experiment.fit, BaselineFit):
        return BaselinePredictor(experiment.released)
    return copydesk.load(experiment.released, device=experiment.evaluate.device)


def device_of(predictor: Predictor | BaselinePredictor) -> str:
    """Say what a predictor computes on."""
    if isinstance(predictor, BaselinePredictor):
        return "a processor, by scikit-learn"
    precision = predictor.precision
    if predictor.device.type == "cuda":
        return f"{torch.cuda.get_device_name(predictor.device)} in {precision}"
    kind, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"a processor with {kind} in {precision} (threads: {threads})"


def score_pages(
    predictor: Predictor | BaselinePredictor,
    read: Sequence[Page],
    rows: Sequence[dict[str, Any]],
    raws: Sequence[RawPage],
    *,
    topics: TopicList,
) -> list[ScoredPage]:
    """Compare pages, as read, with their labels.

    Args:
        predictor: read them.
        read: its answers.
        rows: of the prepared pages.
        raws: the same, split.
        topics: with their order.
    """
    articles = ["\n".join((page.headline or "", page.body)) for page in read]
    probabilities = predictor.topic_probabilities(articles)
    scored = []
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


def _count_read(experiment: Experiment, version: str) -> int:
    """Record that test was read, and return how often it has been."""
    TEST_READS.parent.mkdir(exist_ok=True)
    read = {"date": datetime.now(UTC).date().isoformat(), "experiment": experiment.title, "version": version}
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
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"evaluate: {error}")
    for name in ("macro_f1", "body_word_f1", "body_4gram_f1", "topics_micro_f1"):
        low, high = scores[f"{name}_low"], scores[f"{name}_high"]
        log.info("%s %s %.3f (%.3f–%.3f)", experiment.evaluate.split, name, scores[name], low, high)


if __name__ == "__main__":
    main()
