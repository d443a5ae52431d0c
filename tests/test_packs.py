"""Packs hold every row once an epoch, in an order that seed and epoch alone decide."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from copydesk.encode import NUM_FEATURES, TEXT_FEATURES, EncodedPage, PageBatch
from copydesk.labels import CLASSES
from copydesk.ragged import TokenRows
from train.config import TransformerFit
from train.packs import Pack, Packs, pack
from train.rows import TrainingArticle, TrainingPage

BODY, BOILERPLATE = CLASSES.index("body"), CLASSES.index("boilerplate")
NUM_TOPICS = 2


def make_page(number: int, *, source: str = "mine", sections: int = 4) -> TrainingPage:
    """Build a page whose number is the first token of each section and the label of none."""
    return TrainingPage(
        id=str(number),
        source=source,
        site="paper.com",
        fold=1,
        encoded=EncodedPage(
            tokens=[[1_000 + number, section] for section in range(sections)],
            distinct=np.arange(sections),
            features=np.ones((sections, NUM_FEATURES), dtype=np.float32),
            hint_ids=np.array([1, 2, 3] * sections),
            hint_counts=np.full(sections, 3),
            from_attributes=np.array([False, False, True] * sections),
        ),
        classes=np.array([BODY, *[BOILERPLATE] * (sections - 1)]),
    )


def make_article(number: int, *, length: int = 5) -> TrainingArticle:
    """Build an article whose first token is its number."""
    holds = np.array([number % 2, 0], dtype=np.float32)
    return TrainingArticle(str(number), "paper.com", 1, [5_000 + number] * length, holds, np.ones(2, dtype=np.float32))


def make_packs(
    *, pages: list[TrainingPage], articles: list[TrainingArticle], num_processes: int = 1, **changes: Any
) -> Packs:
    settings = TransformerFit.model_validate(
        {
            "kind": "transformer",
            "epochs": 3,
            "tokens_per_batch": 40,
            "learning_rate": 1e-3,
            "head_learning_rate": 1e-3,
            "class_weight_power": 0,
        }
        | changes
    )
    return Packs(
        pages,
        articles,
        settings=settings,
        epochs=settings.epochs,
        num_topics=NUM_TOPICS,
        num_processes=num_processes,
    )


@pytest.fixture
def packs() -> Packs:
    return make_packs(pages=[make_page(i) for i in range(30)], articles=[make_article(i) for i in range(20)])


def first_tokens(rows: TokenRows) -> torch.Tensor:
    return rows.ids[rows.positions == 0]


def pages_of(packed: Pack) -> list[int]:
    batch = packed.views[0]
    if not batch.page_lengths:
        return []
    tokens = first_tokens(batch.rows)[batch.row_of_section]
    return [int(token) - 1_000 for token in tokens[np.cumsum([0, *batch.page_lengths[:-1]])]]


def hint_counts(batch: PageBatch) -> torch.Tensor:
    return torch.diff(batch.hint_offsets, append=torch.tensor([len(batch.hint_ids)]))


def articles_of(packed: Pack) -> list[int]:
    return [int(token) - 5_000 for token in first_tokens(packed.articles)]


def epoch_of(packs: Packs, epoch: int) -> list[Pack]:
    return [packs[epoch * packs.num_packs + i] for i in range(packs.num_packs)]


def test_an_epoch_has_as_many_packs_as_its_tokens_fill(packs):
    assert packs.num_packs == 6  # 30 pages of 8 tokens, 40 a pack
    assert len(packs) == 18


def test_every_epoch_has_every_row_once(packs):
    for epoch in range(3):
        found = epoch_of(packs, epoch)
        assert sorted(itertools.chain(*map(pages_of, found))) == list(range(30))
        assert sorted(itertools.chain(*map(articles_of, found))) == list(range(20))


def test_packs_of_an_epoch_are_about_equally_large(packs):
    assert {len(pages_of(packed)) for packed in epoch_of(packs, 0)} == {5}
    assert {len(articles_of(packed)) for packed in epoch_of(packs, 0)} <= {3, 4}


def test_the_order_is_that_of_seed_and_epoch_whatever_was_drawn_before():
    rows = {"pages": [make_page(i) for i in range(30)], "articles": [make_article(i) for i in range(20)]}
    first, again, other = make_packs(**rows), make_packs(**rows), make_packs(**rows, seed=1)
    forwards = [(pages_of(packed), articles_of(packed)) for packed in (first[i] for i in range(len(first)))]
    np.random.seed(5)  # noqa: NPY002 (the global state must not matter)
    torch.manual_seed(5)
    backwards = [(pages_of(packed), articles_of(packed)) for packed in (again[i] for i in reversed(range(len(again))))]

    assert forwards == backwards[::-1]
    assert forwards[:6] != forwards[6:12]
    assert forwards[0] != (pages_of(other[0]), articles_of(other[0]))


def test_the_number_of_packs_is_a_multiple_of_the_processes():
    rows = {"pages": [make_page(i) for i in range(31)], "articles": [make_article(0)]}

    for num_processes in (1, 2, 3, 8):
        packs = make_packs(**rows, num_processes=num_processes)
        assert packs.num_packs % num_processes == 0
        assert sorted(itertools.chain(*map(pages_of, epoch_of(packs, 1)))) == list(range(31))


def test_a_step_shows_the_same_rows_in_the_same_order_in_any_process_count():
    rows = {"pages": [make_page(i) for i in range(31)], "articles": [make_article(i) for i in range(17)]}
    alone = make_packs(**rows)
    steps = range(alone.num_steps * 3)

    assert [alone.rows_of_step(step) for step in steps] == [alone.rows_of(step) for step in steps]
    for num_processes in (2, 3, 8):
        shared = make_packs(**rows, num_processes=num_processes)
        assert [shared.rows_of_step(step) for step in steps] == [alone.rows_of_step(step) for step in steps]


def test_there_is_no_pack_behind_the_last_one(packs):
    with pytest.raises(IndexError, match="pack 18 of 18"):
        packs[18]


def test_of_a_source_with_a_share_about_that_share_is_drawn_anew_in_each_epoch():
    pages = [make_page(i, source="wide" if i < 200 else "mine") for i in range(250)]
    packs = make_packs(pages=pages, articles=[], page_share={"wide": 0.5}, tokens_per_batch=100)

    epochs = [set(itertools.chain(*map(pages_of, epoch_of(packs, epoch)))) for epoch in range(3)]
    assert packs.num_packs == 12  # of 150 pages, not 250
    for drawn in epochs:
        assert drawn >= set(range(200, 250))
        assert len(drawn) == pytest.approx(150, abs=25)
    assert epochs[0] != epochs[1] != epochs[2]


def test_hints_are_dropped_for_about_the_share_asked_for():
    packs = make_packs(
        pages=[make_page(i, sections=1) for i in range(1_000)],
        articles=[],
        tokens_per_batch=1_000_000,
        hint_dropout=0.3,
        attribute_hint_dropout=0.2,
        spacing_dropout=0.2,
    )

    for epoch in range(2):
        batch = packs[epoch].views[0]
        counts = hint_counts(batch)
        assert (counts == 0).float().mean() == pytest.approx(0.3, abs=0.05)
        assert (counts == 2).float().mean() == pytest.approx(0.2, abs=0.05)
        as_text = batch.features[:, len(TEXT_FEATURES) :].sum(dim=1) == 0
        assert torch.equal(as_text, counts == 0)
        blank = batch.features[:, TEXT_FEATURES.index("breaks_before")] == 1
        assert blank[~as_text].all()
        assert blank[as_text].float().mean() == pytest.approx(0.8, abs=0.08)
    whole = make_packs(pages=packs.pages, articles=[], hint_dropout=0, attribute_hint_dropout=0)[0]
    assert whole.views[0].hint_ids.any()


def test_each_page_encoder_sees_the_same_pages_with_hints_of_its_own():
    pages = [make_page(i) for i in range(100)]
    packs = make_packs(pages=pages, articles=[], tokens_per_batch=10_000, network={"page_encoders": 2})

    first, second = packs[0].views

    assert first.page_lengths == second.page_lengths
    assert torch.equal(first.row_of_section, second.row_of_section)
    assert len(first.rows.lengths)
    assert not len(second.rows.lengths)
    assert not torch.equal(hint_counts(first), hint_counts(second))


def test_consistency_takes_a_second_reading_of_each_page_by_each_page_encoder():
    settings = {"tokens_per_batch": 10_000, "network": {"page_encoders": 2}}
    pages = [make_page(i) for i in range(100)]
    once = make_packs(pages=pages, articles=[], **settings)[0].views
    twice = make_packs(pages=pages, articles=[], consistency_weight=1.0, **settings)[0].views

    assert (len(once), len(twice)) == (2, 4)
    shown = [tuple(hint_counts(view).tolist()) for view in twice]
    assert len(set(shown)) == 4
    assert shown[:2] == [tuple(hint_counts(view).tolist()) for view in once]


def test_each_page_encoder_warms_up_in_an_order_of_its_own(packs):
    epochs = [[packs.rows_of_step(step, reader) for step in range(packs.num_steps)] for reader in (0, 1)]

    assert epochs[0] != epochs[1]
    for pages, articles in (zip(*epoch, strict=True) for epoch in epochs):
        assert sorted(itertools.chain(*pages)) == list(range(30))
        assert sorted(itertools.chain(*articles)) == list(range(20))


def test_single_hints_are_left_out_for_about_the_share_asked_for_and_tags_stay_before_attributes():
    packs = make_packs(
        pages=[make_page(i, sections=4) for i in range(500)],
        articles=[],
        hint_dropout=0,
        attribute_hint_dropout=0,
        hint_word_dropout=0.3,
    )
    thinned = [packs.with_dropped_hints(i, 0).encoded for i in range(500)]

    assert sum(page.hint_ids.size for page in thinned) / (500 * 4 * 3) == pytest.approx(0.7, abs=0.03)
    for page in thinned:
        assert page.hint_counts.sum() == len(page.hint_ids)
        assert ((page.hint_ids == 3) == page.from_attributes).all()
        for ids in np.split(page.hint_ids, np.cumsum(page.hint_counts)[:-1]):
            assert ids.tolist() == sorted(set(ids.tolist()))


def test_which_hints_are_dropped_changes_from_epoch_to_epoch_but_not_from_run_to_run():
    def dropped(epoch: int) -> set[int]:
        packs = make_packs(pages=[make_page(i) for i in range(100)], articles=[], tokens_per_batch=10_000)
        counts = hint_counts(packs[epoch].views[0])[::4]
        return {page for page, count in zip(pages_of(packs[epoch]), counts.tolist(), strict=True) if not count}

    assert dropped(0) == dropped(0)
    assert dropped(0) != dropped(1)


def test_rows_themselves_are_never_changed(packs):
    for i in range(len(packs)):
        packs[i]

    assert all(page.encoded.features.all() and page.encoded.hint_ids.size == 12 for page in packs.pages)


def test_targets_stand_in_the_order_of_the_rows():
    articles = [make_article(i, length=9 - i) for i in range(6)]
    packed = pack([[make_page(0), make_page(1)]], articles, num_topics=NUM_TOPICS)

    assert packed.classes.tolist() == [BODY, *[BOILERPLATE] * 3] * 2
    assert packed.holds[:, 0].tolist() == [number % 2 for number in articles_of(packed)]
    assert packed.decided.shape == (6, 2)


def test_a_pack_without_articles_has_targets_of_the_right_width():
    packed = pack([[make_page(0)]], [], num_topics=NUM_TOPICS)

    assert not len(packed.articles.lengths)
    assert packed.holds.shape == packed.decided.shape == (0, NUM_TOPICS)


def test_a_pack_without_pages_is_whole():
    packed = pack([[]], [make_article(0)], num_topics=NUM_TOPICS)

    assert packed.classes.shape == (0,)
    assert packed.classes.dtype == torch.int64
    assert packed.views[0].page_lengths == []


def test_sections_of_each_class_are_counted(packs):
    assert packs.class_counts.tolist() == [{BODY: 30, BOILERPLATE: 90}.get(i, 0) for i in range(len(CLASSES))]


def test_of_cleaned_copies_about_the_share_asked_for_is_drawn_in_each_epoch():
    pages = [replace(make_page(i), cleaned=i >= 100) for i in range(400)]
    packs = make_packs(pages=pages, articles=[], cleaned_share=0.2, tokens_per_batch=100)

    drawn = [set(itertools.chain(*map(pages_of, epoch_of(packs, epoch)))) for epoch in range(2)]
    assert packs.num_packs == 13  # of 160 pages
    for shown in drawn:
        assert shown >= set(range(100))
        assert len(shown) == pytest.approx(160, abs=25)
    assert drawn[0] != drawn[1]
