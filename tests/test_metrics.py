"""Our scores are scikit-learn's where it has the same ones."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from copydesk.labels import CLASSES, SectionLabel
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

LABELS = range(len(SectionLabel))


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_confusion_counts_sections_and_characters(random):
    true, predicted = random.integers(4, size=(2, 200))
    characters = random.integers(1, 100, size=200)

    assert np.array_equal(
        label_confusion(true, predicted), sklearn_metrics.confusion_matrix(true, predicted, labels=LABELS)
    )
    assert np.array_equal(
        label_confusion(true, predicted, weights=characters),
        sklearn_metrics.confusion_matrix(true, predicted, labels=LABELS, sample_weight=characters),
    )


def test_precision_recall_and_f1_are_those_of_sklearn(random):
    true, predicted = random.integers(4, size=(2, 200))
    expected = sklearn_metrics.precision_recall_fscore_support(true, predicted, labels=LABELS)[:3]

    assert precision_recall_f1(label_confusion(true, predicted)) == pytest.approx(np.stack(expected))


@pytest.mark.parametrize("labels", [4, 3, 2, 1])
def test_macro_f1_is_that_of_sklearn_over_the_labels_that_occur(random, labels):
    true, predicted = random.integers(labels, size=(2, 50))

    assert macro_f1(label_confusion(true, predicted)) == pytest.approx(
        sklearn_metrics.f1_score(true, predicted, average="macro")
    )


def test_a_label_that_is_only_predicted_counts_as_zero():
    true, predicted = np.array([0, 0, 1]), np.array([0, 2, 1])

    assert macro_f1(label_confusion(true, predicted)) == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_nothing_scores_zero_without_a_warning():
    empty = label_confusion(np.zeros(0, dtype=int), np.zeros(0, dtype=int))

    assert macro_f1(empty) == 0
    assert not precision_recall_f1(empty).any()


def test_scores_of_many_confusions_are_computed_at_once(random):
    confusions = random.integers(0, 20, size=(5, 4, 4))

    assert macro_f1(confusions) == pytest.approx(np.array([macro_f1(confusion) for confusion in confusions]))


def test_a_headline_counts_as_body():
    classes = np.arange(len(CLASSES))

    assert [tuple(SectionLabel)[i] for i in labels_of(classes)] == [
        SectionLabel.BODY if name == "headline" else name for name in CLASSES
    ]


@pytest.mark.parametrize("n", [1, 4])
def test_equal_bodies_score_one_and_disjoint_ones_zero(n):
    assert body_f1("the mayor of the town won", "the mayor of the town won", n=n) == 1
    assert body_f1("the mayor of the town won", "cats and dogs eat all day", n=n) == 0


@pytest.mark.parametrize("n", [1, 4])
def test_no_body_scores_one_only_where_there_is_none(n):
    assert body_f1("", "", n=n) == 1
    assert body_f1(" \n", "—!", n=n) == 1  # no words
    assert body_f1("the mayor won", "", n=n) == 0
    assert body_f1("", "the mayor won", n=n) == 0


def test_word_f1_counts_a_repeated_word_as_often_as_it_is_in_both():
    # "the" twice and "mayor" are in both: 3 of 4 found, of 5 true
    assert body_f1("the mayor the town the", "the the mayor man", n=1) == pytest.approx(2 * 3 / (5 + 4))


def test_four_gram_f1_counts_runs_of_four_words():
    # two true ones, one of them found, among two
    assert body_f1("a b c d e", "x a b c d", n=4) == pytest.approx(2 * 1 / (2 + 2))


def test_a_text_of_fewer_than_four_words_is_one_gram():
    assert body_f1("mayor wins again", "mayor wins again", n=4) == 1
    assert body_f1("mayor wins again", "mayor wins", n=4) == 0
    assert body_f1("mayor wins again", "the mayor wins again", n=4) == 0


def test_body_f1_is_symmetric_and_blind_to_punctuation_and_line_breaks():
    a, b = "The mayor won.\n\nHe said so, on Monday.", "the mayor won He said so on Monday"

    for n in (1, 4):
        assert body_f1(a, b, n=n) == body_f1(b, a, n=n) < 1  # letter case counts, as in the benchmark
        assert body_f1(a, a.replace("\n\n", " ").replace(".", "!"), n=n) == 1


def test_topic_f1_is_that_of_sklearn_where_all_is_decided(random):
    holds, marked = random.random((2, 60, 5)) < 0.4
    micro, macro, by_topic = topic_f1(topic_counts(holds, marked, np.ones_like(holds)))

    assert micro == pytest.approx(sklearn_metrics.f1_score(holds, marked, average="micro"))
    assert macro == pytest.approx(sklearn_metrics.f1_score(holds, marked, average="macro"))
    assert by_topic == pytest.approx(sklearn_metrics.f1_score(holds, marked, average=None))


def test_what_is_undecided_counts_neither_way():
    holds = np.array([[True], [True], [False]])
    marked = np.array([[True], [False], [True]])

    assert topic_counts(holds, marked, np.array([[True], [False], [False]])).tolist() == [[1, 1, 1]]


def test_topics_that_never_hold_are_left_out_of_the_mean_but_not_of_micro():
    counts = np.array([[2, 2, 2], [0, 4, 0]])

    micro, macro, _ = topic_f1(counts)
    assert macro == 1
    assert micro == pytest.approx(2 * 2 / (6 + 2))


def test_calibration_error_of_a_known_case():
    # Bins (0.6, 0.667] and (0.933, 1]: gaps |0.65 - 0.5| and |0.95 - 1|, each of half of the rows.
    scores, correct = np.array([0.65, 0.65, 0.95, 0.95]), np.array([True, False, True, True])

    assert expected_calibration_error(scores, correct) == pytest.approx((0.15 + 0.05) / 2)


def test_calibration_error_is_zero_for_perfect_confidence_and_for_no_rows():
    assert expected_calibration_error(np.ones(10), np.ones(10, dtype=bool)) == 0
    assert expected_calibration_error(np.zeros(0), np.zeros(0, dtype=bool)) == 0


def test_calibration_error_is_one_where_full_confidence_is_always_wrong():
    assert expected_calibration_error(np.ones(10), np.zeros(10, dtype=bool)) == 1


def test_calibrated_scores_have_hardly_any_error(random):
    scores = random.uniform(0.25, 1, size=20_000)

    assert expected_calibration_error(scores, random.random(20_000) < scores) < 0.02


def interval(values: np.ndarray, sites: list[str], *, seed: int = 0, confidence: float = 0.95) -> np.ndarray:
    def mean(weights: np.ndarray) -> np.ndarray:
        return weights @ values / weights.sum()

    return bootstrap(sites, mean, samples=300, seed=seed, confidence=confidence)


def test_an_interval_holds_the_mean_and_has_the_width_of_theory(random):
    values = random.normal(size=100)
    low, high = interval(values, [str(i) for i in range(100)])

    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.2)


def test_an_interval_is_a_function_of_the_seed(random):
    values, sites = random.normal(size=50), [str(i // 5) for i in range(50)]

    assert np.array_equal(interval(values, sites), interval(values, sites))
    assert not np.array_equal(interval(values, sites), interval(values, sites, seed=1))


def test_more_confidence_is_a_wider_interval(random):
    values, sites = random.normal(size=50), [str(i // 5) for i in range(50)]

    (low, high), (lower, higher) = interval(values, sites, confidence=0.8), interval(values, sites)
    assert lower < low < high < higher


def test_pages_of_one_site_that_agree_widen_the_interval():
    values = np.repeat(np.arange(10.0), 10)
    apart, together = (
        interval(values, [str(i) for i in range(100)]),
        interval(values, [str(i // 10) for i in range(100)]),
    )

    assert np.ptp(together) > 2 * np.ptp(apart)


def test_a_constant_has_an_interval_without_width():
    assert interval(np.full(20, 0.5), ["a"] * 20).tolist() == [0.5, 0.5]


def test_an_interval_has_the_shape_of_its_statistic():
    found = bootstrap(["a", "b"], lambda weights: np.outer(weights, [1.0, 2.0, 3.0]), samples=10, seed=0)

    assert found.shape == (2, 2, 3)
