"""The scikit-learn model that every transformer has to beat, through the same stages.

Knows TF-IDF, section features and logistic regression; knows nothing of thresholds or scores. Its folder holds
`baseline.skops` (no pickle), read by `load`, and goes into no wheel.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import skops.io
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from copydesk.decode import article_of, class_probabilities, list_topics, page_from, topic_probabilities
from copydesk.encode import features_of
from copydesk.encoder import sha256_of
from copydesk.hints import ATTRIBUTE_HINTS
from copydesk.labels import CLASSES, TopicInfo, TopicList
from copydesk.page import ModelInfo, Page
from copydesk.predictor import Document
from copydesk.split import RawPage, split
from train.config import BaselineFit, Experiment
from train.metrics import label_confusion, labels_of, macro_f1
from train.rows import gold_article, load_rows, resplit
from train.sources.articles import read_topics

log = logging.getLogger(__name__)

MODEL, DESCRIPTION = "baseline.skops", "baseline.json"


@dataclass(slots=True)
class Baseline:
    """Two linear models: sections and topics."""

    section_words: TfidfVectorizer
    section_tags: TfidfVectorizer
    sections: LogisticRegression
    topic_words: TfidfVectorizer
    topics: list[LogisticRegression | None]
    """None for a topic without two kinds of rows in training."""

    def section_logits(self, pages: Sequence[RawPage]) -> np.ndarray:
        """Return (sections of all pages, classes)."""
        logits = np.full((sum(len(page.sections) for page in pages), len(CLASSES)), -30.0)
        if len(logits):
            matrix = self.section_matrix(pages)
            logits[:, self.sections.classes_] = self.sections.predict_log_proba(matrix)
        return np.maximum(logits, -30.0)

    def section_matrix(self, pages: Sequence[RawPage]) -> scipy.sparse.csr_matrix:
        """Return (sections of all pages, features): words, tags, layout."""
        texts = [text for page in pages for text in page.texts()]
        layout = np.concatenate([features_of(page, page.texts()) for page in pages])
        return scipy.sparse.hstack(
            [self.section_words.transform(texts), self.section_tags.transform(tags_of(pages)), layout], format="csr"
        )

    def topic_logits(self, texts: Sequence[str]) -> np.ndarray:
        """Return (articles, topics)."""
        logits = np.full((len(texts), len(self.topics)), -30.0)
        if texts and any(self.topics):  # else there were no words to learn from
            words = self.topic_words.transform(texts)
            for column, model in enumerate(self.topics):
                if model is not None:
                    logits[:, column] = model.decision_function(words)
        return logits


def tags_of(pages: Sequence[RawPage]) -> list[str]:
    """Return the tag hints of each section as one string."""
    return [
        " ".join(hint for hint in section.hints if not hint.startswith(ATTRIBUTE_HINTS))
        for page in pages
        for section in page.sections
    ]


def fit(experiment: Experiment) -> dict[str, Any]:
    """Fit on the training rows, score the validation rows, and return a summary."""
    settings = experiment.fit
    if not isinstance(settings, BaselineFit):
        raise TypeError(f"experiment {experiment.name} is no baseline")
    topics = read_topics(experiment.prepare.topics)
    rows = {
        split_name: (
            list(load_rows(experiment.prepared, "pages", split_name)),
            list(load_rows(experiment.prepared, "articles", split_name)),
        )
        for split_name in ("train", "validation")
    }
    model = _fit(*rows["train"], settings=settings, topics=topics)
    held_out = _held_out(model, *rows["validation"], topics=topics)
    np.savez_compressed(experiment.fitted / "held_out.npz", allow_pickle=False, **held_out)
    skops.io.dump(_as_dict(model), experiment.fitted / MODEL)
    predicted = held_out["section_logits"].argmax(axis=1)
    confusion = label_confusion(labels_of(held_out["classes"]), labels_of(predicted))
    return {"kind": "baseline", "validation_macro_f1": float(macro_f1(confusion))}


def _fit(
    pages: list[dict[str, Any]], articles: list[dict[str, Any]], *, settings: BaselineFit, topics: TopicList
) -> Baseline:
    raws = [resplit(row) for row in pages]
    classes = np.concatenate([row["classes"] for row in pages])
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=3, max_features=settings.max_text_features, sublinear_tf=True)
    words.fit([text for raw in raws for text in raw.texts()])
    tags = TfidfVectorizer(token_pattern=r"\S+", min_df=3, use_idf=False, lowercase=False)
    tags.fit(tags_of(raws))
    class_weight = None if settings.class_weights == "none" else settings.class_weights
    regression = {"C": settings.inverse_regularisation, "class_weight": class_weight, "random_state": settings.seed}
    sections = LogisticRegression(max_iter=200, tol=1e-3, **regression)
    model = Baseline(words, tags, sections, TfidfVectorizer(), [])
    log.info("fitting %d sections", len(classes))
    sections.fit(model.section_matrix(raws), classes)

    texts, holds, decided = _topic_rows(pages, raws, articles, topics)
    model.topic_words = TfidfVectorizer(
        ngram_range=(1, 2), min_df=2, max_features=settings.max_text_features, sublinear_tf=True, stop_words="english"
    )
    log.info("fitting %d articles", len(texts))
    parted = (holds & decided).any(axis=0) & (~holds & decided).any(axis=0)
    matrix = model.topic_words.fit_transform(texts) if parted.any() else None
    for column in range(len(topics)):
        known = decided[:, column]
        target = holds[known, column]
        if matrix is not None and parted[column]:
            model.topics.append(LogisticRegression(max_iter=500, **regression).fit(matrix[known], target))
        else:
            model.topics.append(None)
    return model


def _topic_rows(
    pages: list[dict[str, Any]], raws: list[RawPage], articles: list[dict[str, Any]], topics: TopicList
) -> tuple[list[str], np.ndarray, np.ndarray]:
    everything = [topic.id for topic in topics.topics]
    rows = [
        (gold_article(raw, row["classes"]), row["topics"], everything)
        for row, raw in zip(pages, raws, strict=True)
        if row["topics_known"]
    ]
    rows += [(f"{row['title']}\n{row['text']}", row["topics"], row["decided"]) for row in articles]
    marks = np.zeros((2, len(rows), len(topics)), dtype=bool)
    for i, (_, holds, decided) in enumerate(rows):
        marks[0, i, [topics.index[topic] for topic in holds]] = True
        marks[1, i, [topics.index[topic] for topic in decided]] = True
    return [text for text, _, _ in rows], marks[0], marks[1]


def _held_out(
    model: Baseline, pages: list[dict[str, Any]], articles: list[dict[str, Any]], *, topics: TopicList
) -> dict[str, np.ndarray]:
    raws = [resplit(row) for row in pages]
    texts, holds, decided = _topic_rows(pages, raws, articles, topics)
    known = [row["site"] for row in pages if row["topics_known"]]
    return {
        "section_logits": model.section_logits(raws),
        "classes": np.concatenate([row["classes"] for row in pages]),
        "section_sites": np.repeat([row["site"] for row in pages], [len(raw.sections) for raw in raws]),
        "topic_logits": model.topic_logits(texts),
        "holds": holds.astype(np.float32),
        "decided": decided.astype(np.float32),
        "article_sites": np.array([*known, *(row["site"] for row in articles)]),
    }


def _as_dict(model: Baseline) -> dict[str, Any]:
    return {name: getattr(model, name) for name in Baseline.__slots__}


def save(
    folder: Path,
    *,
    fitted: Path,
    topics: TopicList,
    thresholds: Sequence[float],
    temperatures: tuple[float, float],
    name: str,
    card: str,
) -> ModelInfo:
    """Write a released baseline: the fitted model, thresholds, temperatures and a card."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).write_bytes((fitted / MODEL).read_bytes())
    info = ModelInfo(name=name, version=sha256_of(folder / MODEL)[:12])
    description = {
        "model": info.model_dump(),
        "topics": [topic.model_dump() for topic in topics.topics],
        "thresholds": list(thresholds),
        "temperatures": list(temperatures),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", "utf-8")
    (folder / "README.md").write_text(card, "utf-8")
    return info


class BaselinePredictor:
    """Reads pages with a released baseline, as `copydesk.Predictor` does with a transformer."""

    def __init__(self, folder: Path) -> None:
        """Load a released baseline.

        Raises:
            ValueError: the folder holds types that a baseline does not need.
        """
        path = folder / MODEL
        allowed = {"scipy.sparse._csr.csr_matrix", "numpy.dtype", "numpy.float64", "numpy.int64"}
        if unknown := set(skops.io.get_untrusted_types(file=path)) - allowed:
            raise ValueError(f"{path} holds the types {sorted(unknown)}, which no baseline needs: do not load it")
        self.model = Baseline(**skops.io.load(path, trusted=sorted(allowed)))
        description = json.loads((folder / DESCRIPTION).read_text("utf-8"))
        self.info = ModelInfo.model_validate(description["model"])
        self.topics = TopicList(TopicInfo.model_validate(entry) for entry in description["topics"])
        self.thresholds = np.array(description["thresholds"])
        self.section_temperature, self.topic_temperature = description["temperatures"]

    def topic_probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Return calibrated (articles, topics)."""
        return topic_probabilities(
            self.model.topic_logits(texts), temperature=self.topic_temperature, topics=self.topics
        )

    def predict(self, documents: Iterable[Document]) -> list[Page]:
        """Read pages, in order."""
        pages = []
        for document in documents:
            raw = split(document.content, kind=document.kind)
            probabilities = class_probabilities(self.model.section_logits([raw]), temperature=self.section_temperature)
            article = article_of(raw, probabilities)
            found = list_topics(
                self.topic_probabilities(["\n".join(article)]), thresholds=self.thresholds, topics=self.topics
            )[0]
            pages.append(
                page_from(
                    raw,
                    article=article,
                    probabilities=probabilities,
                    topics=found if any(article) else (),
                    model=self.info,
                    source=document.source,
                    url=document.url,
                )
            )
        return pages
