"""The rule of promotion, and the counts that it is applied to."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from copydesk.labels import TopicInfo, TopicList
from train.counts import Counts, marks_out_of_fold
from train.gate import NAMES, Cost, compare, judge
from train.metrics import macro_f1

COST = Cost(parameters=1_000, bytes=4_000)
BODY, BOILERPLATE, PAYWALL, SPONSORED = range(4)


@pytest.fixture
def counts(page_table: Callable[..., list[dict]]) -> Callable[..., Counts]:
    return lambda wrong, **options: Counts.of(page_table(wrong, **options))


def verdict(challenger: Counts, champion: Counts, *, cost: Cost = COST, margin: float = 0.01):
    differences = compare(challenger, champion, samples=200)
    return judge(differences, challenger=cost, champion=COST, margin=margin, label_margin=0.02)


def test_a_better_model_is_promoted(counts: Callable[..., Counts]):
    found = verdict(counts({PAYWALL: 1}), counts({PAYWALL: 4}))

    assert found.promoted
    assert found.reason.startswith("better: macro F1 +")


def test_an_equal_model_is_refused_unless_it_is_cheaper(counts: Callable[..., Counts]):
    same = counts({PAYWALL: 4})

    assert not verdict(same, same).promoted
    assert "no cheaper" in verdict(same, same).reason
    assert verdict(same, same, cost=replace(COST, parameters=900)).promoted
    assert verdict(same, same, cost=replace(COST, bytes=2_000)).promoted
    assert not verdict(same, same, cost=replace(COST, parameters=990)).promoted
    assert not verdict(same, same, cost=Cost(parameters=1_001, bytes=2_000)).promoted


def test_a_cheaper_model_may_be_worse_within_the_margin_only(counts: Callable[..., Counts]):
    worse, before, cost = counts({PAYWALL: 5}), counts({PAYWALL: 4}), replace(COST, parameters=500)
    lower_by = -compare(worse, before, samples=200)["macro_f1"].low

    assert 0.005 < lower_by < 0.05
    differences = compare(worse, before, samples=200)
    for margin, promoted in ((lower_by * 1.01, True), (lower_by * 0.99, False)):
        found = judge(differences, challenger=cost, champion=COST, margin=margin, label_margin=1.0)
        assert found.promoted == promoted


def test_a_model_that_is_worse_in_one_label_is_refused_though_better_on_the_whole(counts: Callable[..., Counts]):
    found = verdict(counts({SPONSORED: 3}), counts({BODY: 9}))

    assert not found.promoted
    assert "worse by more than 0.02: sponsored_f1 -" in found.reason


def test_a_model_that_is_worse_in_topics_is_refused(counts: Callable[..., Counts]):
    found = verdict(counts({PAYWALL: 1}, topics_hits=1), counts({PAYWALL: 4}))

    assert not found.promoted
    assert "topics_micro_f1 -0.4" in found.reason


def test_differences_are_those_of_the_pooled_counts(counts: Callable[..., Counts]):
    new, old = counts({PAYWALL: 1}), counts({PAYWALL: 4, BODY: 2})

    found = compare(new, old, samples=200)

    assert list(found) == list(NAMES)
    expected = [float(macro_f1(one.confusions.sum(axis=0))) for one in (old, new)]
    assert [found["macro_f1"].champion, found["macro_f1"].challenger] == pytest.approx(expected)
    assert found["macro_f1"].low <= found["macro_f1"].gain <= found["macro_f1"].high
    assert found["topics_micro_f1"].gain == 0
    assert found["topics_micro_f1"].p == 1


def test_counts_of_different_pages_are_not_compared(counts: Callable[..., Counts]):
    with pytest.raises(ValueError, match="different pages"):
        compare(counts({}), counts({}, num_sites=3), samples=100)


def test_pages_are_selected_by_name_and_labels(counts: Callable[..., Counts]):
    all_of_them = counts({PAYWALL: 1})
    keys = [("p7", "0"), ("p2", "0")]

    found = all_of_them.select(keys)

    assert (found.keys, found.sites) == (keys, ["s7", "s2"])
    assert np.array_equal(found.confusions, all_of_them.confusions[[7, 2]])


def test_topics_of_a_page_are_marked_by_thresholds_of_other_sites():
    topics = TopicList([TopicInfo(id="medtop:1", slug="one", name="one")])
    sites = [f"s{number // 4}" for number in range(40)]
    scores = np.where(np.arange(40) % 2, 0.6, 0.2)[:, None]
    holds, decided = scores > 0.5, np.ones((40, 1), bool)
    odd = np.array(sites) == "s3"
    scores[odd] *= 0.5  # in its own fold a threshold below 0.3 would be best

    marked = marks_out_of_fold(scores, holds, decided, sites=sites, topics=topics)

    assert not marked[odd].any()
    assert np.array_equal(marked[~odd], holds[~odd])
