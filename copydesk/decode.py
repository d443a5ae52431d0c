"""Turn logits into labels, topics and pages.

Knows label names, thresholds and the topic hierarchy; knows nothing of tokens, weights or files.
"""

from collections.abc import Sequence

import numpy as np

from copydesk.labels import CLASSES, HEADLINE, LABEL_OF_CLASS, SectionLabel, TopicList
from copydesk.page import ModelInfo, Page, Scores, Section, Topic
from copydesk.split import RawPage

_HEADLINE = CLASSES.index(HEADLINE)
_BODY_CLASS = CLASSES.index(SectionLabel.BODY)
_LABELS = tuple(SectionLabel)
_BODY = _LABELS.index(SectionLabel.BODY)


def class_probabilities(logits: np.ndarray, *, temperature: float) -> np.ndarray:
    """Return calibrated probabilities (sections, classes) from logits of that shape (arXiv:1706.04599)."""
    scaled = logits.astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def label_scores(probabilities: np.ndarray) -> np.ndarray:
    """Return scores of the four labels (sections, labels): a headline counts as body."""
    scores = np.zeros((len(probabilities), len(_LABELS)))
    for column, label in enumerate(LABEL_OF_CLASS):
        scores[:, label] += probabilities[:, column]
    return scores


def expecting_headline(probabilities: np.ndarray, *, share: float) -> np.ndarray:
    """Return the probabilities of a page's sections, knowing how many pages with body text have a headline.

    Sections are judged one by one. Where they say together that there is body text and yet hardly a headline, what is
    most like one becomes likelier (by Jeffrey's rule of conditioning, exactly), as far as body text is left beside it.

    Args:
        probabilities: (sections, classes).
        share: of the pages with body text, those that have a headline; 0: it is not known.
    """
    headline, body = probabilities[:, _HEADLINE], probabilities[:, _BODY_CLASS]
    logs = np.log(np.clip(1 - np.stack([headline, body, headline + body]), 1e-12, 1))
    no_headline, no_body, neither = np.exp(logs.sum(axis=1))
    with_body = 1 - no_body
    with_both = with_body - no_headline + neither
    if not 1e-6 < with_both < share * with_body:
        return probabilities
    # Of each section and class: its probability together with what the page then has.
    no_headline, no_body, neither = np.exp(logs.sum(axis=1, keepdims=True) - logs)[:, :, None]  # elsewhere
    beside_body = probabilities * (1 - no_body)
    beside_body[:, _BODY_CLASS] = body
    beside_both = probabilities * (1 - no_headline - no_body + neither)
    beside_both[:, _HEADLINE] = headline * (1 - no_body[:, 0])
    beside_both[:, _BODY_CLASS] = body * (1 - no_headline[:, 0])
    return (
        share * with_body / with_both * beside_both
        + (1 - share) * with_body / (with_body - with_both) * (beside_body - beside_both)
        + (probabilities - beside_body)
    )


def headlines_from(probabilities: np.ndarray) -> np.ndarray:
    """Mark (sections,) those labelled body that are rather headline than running text."""
    is_body = label_scores(probabilities).argmax(axis=1) == _BODY
    return is_body & (probabilities[:, _HEADLINE] > probabilities[:, _BODY_CLASS])


def topic_probabilities(logits: np.ndarray, *, temperature: float, topics: TopicList) -> np.ndarray:
    """Return calibrated (articles, topics): a broader topic is at least as likely as its narrower ones."""
    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64) / temperature))
    for index in range(len(topics)):
        for ancestor in topics.ancestors(index):
            probabilities[:, ancestor] = np.maximum(probabilities[:, ancestor], probabilities[:, index])
    return probabilities


def topics_from(
    probabilities: np.ndarray, *, thresholds: np.ndarray, topics: TopicList
) -> tuple[np.ndarray, np.ndarray]:
    """Mark the topics whose probability reaches its threshold, and those that they imply.

    Args:
        probabilities: (articles, topics).
        thresholds: (topics,), each in [0, 1].
        topics: with their hierarchy.

    Returns:
        Two (articles, topics) of bool: all that hold, and those of them that hold only by implication.

    Raises:
        ValueError: not one threshold a topic.
    """
    if thresholds.shape != probabilities.shape[1:]:
        raise ValueError(
            f"thresholds has shape {thresholds.shape}, expected {probabilities.shape[1:]}: one a topic. "
            "Run the release stage again after a change to the topic list."
        )
    own = probabilities >= thresholds
    marked = own.copy()
    for index in range(len(topics)):
        for ancestor in topics.ancestors(index):
            marked[:, ancestor] |= own[:, index]
    return marked, marked & ~own


def article_of(page: RawPage, probabilities: np.ndarray) -> tuple[str, str]:
    """Return headline (one section a line) and body (paragraphs joined by a blank line) of a page.

    Args:
        page: as split.
        probabilities: (sections, classes).
    """
    is_headline = headlines_from(probabilities)
    is_body = (label_scores(probabilities).argmax(axis=1) == _BODY) & ~is_headline
    headline = "\n".join(text for text, chosen in zip(page.texts(), is_headline, strict=True) if chosen)
    body: list[str] = []
    end = -1
    for section, chosen in zip(page.sections, is_body, strict=True):
        if not chosen:
            continue
        if body:  # pieces of one long paragraph have no line break between them
            gap = page.text[end : section.start]
            body.append(gap if len((gap + ".").splitlines()) == 1 and not gap.strip() else "\n\n")
        body.append(page.text[section.start : section.end])
        end = section.end
    return headline, "".join(body)


def page_from(
    raw: RawPage,
    *,
    article: tuple[str, str],
    probabilities: np.ndarray,
    topics: Sequence[Topic],
    model: ModelInfo,
    source: str | None = None,
    url: str | None = None,
) -> Page:
    """Put a page together from what was read.

    Args:
        raw: the page as split.
        article: headline and body, from `article_of`.
        probabilities: (sections, classes).
        topics: from `list_topics`.
        model: that read it.
        source: where the page came from.
        url: its address.
    """
    headline, body = article
    scores = label_scores(probabilities)
    labels = scores.argmax(axis=1)
    sections = [
        Section(
            text=text,
            label=_LABELS[label],
            role="headline" if is_headline else None,
            score=row[label],
            scores=Scores(**dict(zip(_LABELS, row, strict=True))),
            start=section.start,
            end=section.end,
            tag=section.tag,
        )
        for text, section, label, is_headline, row in zip(
            raw.texts(), raw.sections, labels, headlines_from(probabilities), scores.round(4).tolist(), strict=True
        )
    ]
    return Page(
        source=source,
        url=url,
        text=raw.text,
        headline=headline or None,
        body=body,
        sections=sections,
        topics=list(topics),
        model=model,
    )


def list_topics(probabilities: np.ndarray, *, thresholds: np.ndarray, topics: TopicList) -> list[list[Topic]]:
    """Return the topics of each article, likeliest first.

    Args:
        probabilities: (articles, topics).
        thresholds: (topics,).
        topics: with their hierarchy.
    """
    marked, implied = topics_from(probabilities, thresholds=thresholds, topics=topics)
    return [
        [
            Topic(
                id=topics.topics[i].id,
                name=topics.topics[i].name,
                score=round(float(probabilities[row, i]), 4),
                implied=bool(implied[row, i]),
            )
            for i in sorted(np.flatnonzero(marked[row]), key=lambda i: -probabilities[row, i])
        ]
        for row in range(len(probabilities))
    ]
