from itertools import product

import numpy as np
import pytest

from copydesk.decode import (
    article_of,
    class_probabilities,
    expecting_headline,
    headlines_from,
    label_scores,
    list_topics,
    page_from,
    topic_probabilities,
    topics_from,
)
from copydesk.labels import CLASSES, TopicInfo, TopicList
from copydesk.page import ModelInfo
from copydesk.split import split

POLITICS, DIPLOMACY, SUMMIT, SPORT = range(4)
TOPICS = TopicList(
    [
        TopicInfo(id="1", slug="politics", name="politics"),
        TopicInfo(id="2", slug="diplomacy", name="diplomacy", parent="1"),
        TopicInfo(id="3", slug="summit", name="summits", parent="2"),
        TopicInfo(id="4", slug="sport", name="sport"),
    ]
)
MODEL = ModelInfo(name="tiny", version="0")


def surely(*classes: str) -> np.ndarray:
    """Return probabilities (sections, classes) that leave no doubt."""
    return np.array([[float(name == chosen) for name in CLASSES] for chosen in classes]).reshape(-1, len(CLASSES))


def test_class_probabilities_are_a_softmax():
    logits = np.log(np.array([[0.1, 0.2, 0.3, 0.3, 0.1]], dtype=np.float32))

    np.testing.assert_allclose(class_probabilities(logits, temperature=1.0), np.exp(logits), rtol=1e-5)


def test_a_higher_temperature_is_less_sure_of_the_same_class():
    logits = np.array([[3.0, 1.0, 0.0, 0.0, 0.0]])

    cold, warm = (class_probabilities(logits, temperature=temperature) for temperature in (1.0, 2.0))

    assert cold.argmax() == warm.argmax() == 0
    assert cold[0, 0] > warm[0, 0]


def test_large_logits_overflow_nothing():
    probabilities = class_probabilities(np.array([[1e4, -1e4, 0, 0, 0]], dtype=np.float32), temperature=0.5)

    np.testing.assert_array_equal(probabilities, [[1, 0, 0, 0, 0]])


def test_an_article_is_likely_to_have_a_headline():
    # Headline, body, boilerplate, paywall, sponsored.
    page = np.array([[0.1, 0.05, 0.5, 0.25, 0.1], [0.15, 0.6, 0.25, 0, 0], [0.0, 0.1, 0.5, 0.4, 0.0]])
    joint = {name: np.zeros_like(page) for name in ("both", "body alone", "no body")}
    for chosen in product(range(len(CLASSES)), repeat=len(page)):
        name = "no body" if 1 not in chosen else "both" if 0 in chosen else "body alone"
        joint[name][np.arange(len(page)), chosen] += page[np.arange(len(page)), chosen].prod()
    mass = {name: table[0].sum() for name, table in joint.items()}
    shares = {name: (0.9, 0.1)[name == "body alone"] * (1 - mass["no body"]) for name in ("both", "body alone")}

    found = expecting_headline(page, share=0.9)

    expected = joint["no body"] + sum(shares[name] / mass[name] * joint[name] for name in shares)
    np.testing.assert_allclose(found, expected)
    assert (page.argmax(axis=1) == [2, 1, 2]).all()
    assert (found.argmax(axis=1) == [0, 1, 2]).all()


@pytest.mark.parametrize(
    ("page", "share"),
    [
        (surely("headline", "body"), 0.9),  # it has one
        (surely("body", "body"), 0.9),  # nothing is like one
        (np.array([[0.5, 0.0, 0.5, 0, 0], [0.2, 0.0, 0.8, 0, 0]]), 0.9),  # there is no article
        (np.array([[0.2, 0.8, 0, 0, 0], [0.2, 0.8, 0, 0, 0]]), 0.0),  # nobody knows
        (np.zeros((0, 5)), 0.9),
    ],
)
def test_other_pages_are_left_as_they_are(page, share):
    np.testing.assert_array_equal(expecting_headline(page, share=share), page)


def test_probabilities_stay_probabilities_on_a_page_of_many_sections():
    others = np.random.default_rng(0).dirichlet(np.full(len(CLASSES) - 1, 0.05), size=50_000)
    page = np.column_stack([np.full(len(others), 1e-6), others * (1 - 1e-6)])

    found = expecting_headline(page, share=0.994)

    assert found[:, 0].sum() > 0.9
    assert (found > -1e-9).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-9)


def test_a_page_without_sections_has_no_probabilities():
    probabilities = class_probabilities(np.zeros((0, 5), dtype=np.float32), temperature=1.0)

    assert probabilities.shape == (0, 5)
    assert label_scores(probabilities).shape == (0, 4)
    assert headlines_from(probabilities).shape == (0,)


def test_headline_and_body_count_together():
    scores = label_scores(np.array([[0.25, 0.3, 0.35, 0.06, 0.04]]))

    np.testing.assert_allclose(scores, [[0.55, 0.35, 0.06, 0.04]])


@pytest.mark.parametrize(
    ("probabilities", "is_headline"),
    [
        ([0.6, 0.4, 0.0, 0.0, 0.0], True),
        ([0.3, 0.25, 0.45, 0.0, 0.0], True),  # together likelier than boilerplate, though neither is alone
        ([0.4, 0.6, 0.0, 0.0, 0.0], False),
        ([0.5, 0.5, 0.0, 0.0, 0.0], False),
        ([0.45, 0.0, 0.55, 0.0, 0.0], False),
    ],
)
def test_a_headline_is_labelled_body_and_rather_headline_than_running_text(probabilities, is_headline):
    assert headlines_from(np.array([probabilities])).tolist() == [is_headline]


def test_a_topic_exactly_at_its_threshold_is_kept():
    probabilities = np.array([[0.5, 0.1, 0.1, 0.5]])

    marked, implied = topics_from(probabilities, thresholds=np.array([0.5, 0.9, 0.9, 0.5 + 1e-9]), topics=TOPICS)

    assert marked.tolist() == [[True, False, False, False]]
    assert not implied.any()


def test_a_topic_brings_all_broader_ones_marked_as_implied():
    probabilities = np.array([[0.6, 0.6, 0.6, 0.0]])

    marked, implied = topics_from(probabilities, thresholds=np.array([0.9, 0.6, 0.6, 0.9]), topics=TOPICS)

    assert marked.tolist() == [[True, True, True, False]]
    assert implied.tolist() == [[True, False, False, False]]


def test_a_broader_topic_does_not_bring_its_narrower_ones():
    marked, _ = topics_from(np.array([[0.9, 0.1, 0.1, 0.1]]), thresholds=np.full(4, 0.5), topics=TOPICS)

    assert marked.tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("thresholds", [np.full(3, 0.5), np.full(5, 0.5), np.full((1, 4), 0.5)])
def test_a_wrong_number_of_thresholds_is_refused(thresholds):
    with pytest.raises(ValueError, match=r"expected \(4,\): one a topic"):
        topics_from(np.zeros((1, 4)), thresholds=thresholds, topics=TOPICS)


def test_a_broader_topic_is_at_least_as_likely_as_its_narrower_ones():
    logits = np.array([[-5.0, -2.0, 1.0, 0.0], [3.0, 0.0, -1.0, -1.0]])

    probabilities = topic_probabilities(logits, temperature=1.0, topics=TOPICS)

    sigmoid = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(probabilities[0], sigmoid[0, [SUMMIT, SUMMIT, SUMMIT, SPORT]])
    np.testing.assert_allclose(probabilities[1], sigmoid[1])


def test_topics_are_listed_likeliest_first_with_their_own_scores():
    probabilities = np.array([[0.61239, 0.61239, 0.2, 0.7], [0.0, 0.0, 0.0, 0.0]])

    first, second = list_topics(probabilities, thresholds=np.array([0.9, 0.6, 0.9, 0.5]), topics=TOPICS)

    assert [(topic.name, topic.score, topic.implied) for topic in first] == [
        ("sport", 0.7, False),
        ("politics", 0.6124, True),
        ("diplomacy", 0.6124, False),
    ]
    assert second == []


def test_no_articles_have_no_topics():
    assert list_topics(np.zeros((0, 4)), thresholds=np.full(4, 0.5), topics=TOPICS) == []


def test_paragraphs_of_the_body_are_joined_by_a_blank_line():
    raw = split("<h1>Head</h1><p>By me</p><p>One.</p><p>Ad</p><p>Two.</p><p>Three.</p>", kind="html")

    article = article_of(raw, surely("headline", "boilerplate", "body", "sponsored", "body", "body"))

    assert article == ("Head", "One.\n\nTwo.\n\nThree.")


def test_several_headline_sections_stand_on_a_line_each():
    raw = split("Head\n\nStandfirst\n\nOne.", kind="text")

    assert article_of(raw, surely("headline", "headline", "body")) == ("Head\nStandfirst", "One.")


@pytest.mark.parametrize("gap", [" ", "  ", "\t", "\xa0 "])
def test_pieces_of_one_long_paragraph_keep_their_own_gap(gap):
    line = gap.join(["A sentence of the article that goes on for a while."] * 60)
    raw = split(f"{line}\nNext.", kind="text")

    _, body = article_of(raw, surely(*["body"] * len(raw.sections)))

    assert len(raw.sections) > 3
    assert body == f"{line}\n\nNext."


@pytest.mark.parametrize("source", ["日本の新聞。" * 400, "x" * 2_500])
def test_pieces_that_nothing_parted_are_joined_by_nothing(source):
    raw = split(source, kind="text")

    assert len(raw.sections) > 1
    assert article_of(raw, surely(*["body"] * len(raw.sections))) == ("", source)


def test_pieces_of_a_long_element_are_one_paragraph():
    line = "A sentence that goes on. " * 60
    raw = split(f"<p>{line}</p><p>Next.</p>", kind="html")

    assert article_of(raw, surely(*["body"] * len(raw.sections))) == ("", f"{line.strip()}\n\nNext.")


def test_pieces_with_something_else_between_them_are_two_paragraphs():
    raw = split("x" * 2_500, kind="text")

    assert article_of(raw, surely("body", "boilerplate", "body")) == ("", "x" * 1_000 + "\n\n" + "x" * 500)


def test_lines_of_plain_text_are_paragraphs_however_they_end():
    raw = split("One.\r\nTwo.\u2028Three.\n \n\nFour.", kind="text")

    assert article_of(raw, surely(*["body"] * 4))[1] == "One.\n\nTwo.\n\nThree.\n\nFour."


def test_a_page_says_for_each_section_what_it_is():
    raw = split("<h1>Head</h1><p>One.</p><p>Pay</p>", kind="html")
    probabilities = np.array([[0.7, 0.2, 0.1, 0.0, 0.0], [0.1, 0.8, 0.1, 0.0, 0.0], [0.0, 0.1, 0.2, 0.65, 0.05]])

    page = page_from(
        raw, article=article_of(raw, probabilities), probabilities=probabilities, topics=[], model=MODEL, url="u"
    )

    assert [(s.label, s.role, s.score, s.tag) for s in page.sections] == [
        ("body", "headline", 0.9, "body>h1"),
        ("body", None, 0.9, "body>p"),
        ("paywall", None, 0.65, "body>p"),
    ]
    assert page.sections[2].scores.model_dump() == {
        "body": 0.1,
        "boilerplate": 0.2,
        "paywall": 0.65,
        "sponsored": 0.05,
    }
    assert (page.headline, page.body, page.text) == ("Head", "One.", "Head\n\nOne.\n\nPay")
    assert (page.source, page.url, page.model, page.topics) == (None, "u", MODEL, [])
    assert all(page.text[s.start : s.end] == s.text for s in page.sections)


def test_the_score_of_a_section_is_that_of_its_label():
    raw = split("\n".join("abcdefgh"), kind="text")
    probabilities = np.random.default_rng(0).dirichlet(np.ones(5), size=8)

    page = page_from(raw, article=("", ""), probabilities=probabilities, topics=[], model=MODEL)

    for section in page.sections:
        scores = section.scores.model_dump()
        assert section.score == scores[section.label] == max(scores.values())
        assert sum(scores.values()) == pytest.approx(1, abs=3e-4)


def test_a_page_without_an_article_has_no_headline_and_no_body():
    raw = split("Ad", kind="text")
    probabilities = surely("sponsored")

    page = page_from(raw, article=article_of(raw, probabilities), probabilities=probabilities, topics=[], model=MODEL)

    assert (page.headline, page.body) == (None, "")
    assert article_of(split(""), surely()) == ("", "")
