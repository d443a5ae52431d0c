"""Tables of scores count what they say they count."""

from typing import Any

import numpy as np
import pytest

from copydesk.labels import SectionLabel, TopicInfo, TopicList
from train.scores import (
    SHOWN,
    ScoredPage,
    confusion_table,
    english_news,
    headline_scores,
    label_table,
    site_table,
    slice_table,
    summarise,
    topic_table,
)

BODY, BOILERPLATE, PAYWALL, SPONSORED = range(4)
TOPICS = TopicList(
    [TopicInfo(id="t:0", slug="sport", name="sport"), TopicInfo(id="t:1", slug="weather", name="weather")]
)


def page(true: list[int], predicted: list[int], **changes: Any) -> ScoredPage:
    facts = {
        "id": "1",
        "site": "packet.test",
        "source": "sample",
        "genre": "news",
        "language": "en",
        "true": np.array(true),
        "scores": np.eye(4)[predicted] * 0.7 + 0.1 - 0.025 * np.eye(4)[predicted],
        "characters": np.full(len(true), 10),
        "body_word_f1": 0.5,
        "body_4gram_f1": 0.4,
        "body_exact": False,
        "holds": np.array([True, False]),
        "marked": np.array([True, True]),
        "decided": np.array([True, True]),
        "topic_scores": np.array([0.9, 0.6]),
    }
    return ScoredPage(**(facts | changes))


PAGES = [
    page([BODY, BODY, PAYWALL], [BODY, BOILERPLATE, BOILERPLATE]),
    page([BODY, SPONSORED], [BODY, SPONSORED], site="lantern.test", genre="other"),
    page([BOILERPLATE], [BODY], language="de", decided=np.array([False, False]), holds=np.array([False, False])),
]


def test_confusion_has_a_row_for_each_true_label():
    rows = {row["label"]: row for row in confusion_table(PAGES)}

    assert list(rows) == list(SectionLabel)
    assert rows["body"] == {"label": "body", "body": 2, "boilerplate": 1, "paywall": 0, "sponsored": 0}
    assert rows["paywall"]["boilerplate"] == 1
    assert sum(row[label] for row in rows.values() for label in SectionLabel) == 6


def test_labels_are_scored_by_section_and_counted():
    body, *_ = label_table(PAGES)

    assert (body["label"], body["sections"]) == ("body", 3)
    assert body["precision"] == body["recall"] == pytest.approx(2 / 3)


def test_the_site_with_most_wrong_sections_comes_first():
    worst, best = site_table(PAGES)

    assert (worst["site"], worst["pages"], worst["sections"], worst["errors"]) == ("packet.test", 2, 4, 3)
    assert (best["site"], best["errors"], best["macro_f1"]) == ("lantern.test", 0, 1)


def test_topics_are_counted_where_they_are_known():
    sport, weather = topic_table(PAGES, TOPICS, np.array([0.4, 0.5]))

    assert (sport["pages"], sport["marked"], sport["f1"], sport["threshold"]) == (2, 2, 1, 0.4)
    assert (weather["pages"], weather["marked"], weather["precision"]) == (0, 2, 0)


def test_a_slice_says_how_many_sections_of_each_label_it_has():
    rows = {row["slice"]: row for row in slice_table(PAGES)}

    assert list(rows)[:2] == ["all", "english news"]
    assert {name.partition(":")[0] for name in list(rows)[2:]} == {"source", "genre", "language", "length"}
    assert (rows["language: de"]["pages"], rows["language: de"]["boilerplate_sections"]) == (1, 1)
    assert (rows["language: de"]["paywall_sections"], rows["language: de"]["pages_with_topics"]) == (0, 0)
    assert rows["all"]["sections"] == 6


def test_a_slice_without_pages_is_left_out():
    german = [PAGES[2]]

    assert english_news(german) == []
    assert "english news" not in {row["slice"] for row in slice_table(german)}


def test_every_score_that_is_shown_has_an_interval_around_it():
    scores = headline_scores(PAGES * 3, samples=50, seed=0)

    for name in SHOWN:
        assert 0 <= scores[f"{name}_low"] <= scores[f"{name}_high"] <= 1
        assert scores[f"{name}_low"] - 1e-9 <= scores[name] <= scores[f"{name}_high"] + 1e-9
    assert scores["macro_f1"] == summarise(PAGES * 3)["macro_f1"]
