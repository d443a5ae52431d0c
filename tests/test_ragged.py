import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from copydesk.ragged import FEW_TOKENS, MAX_PADDED_TOKENS, MAX_PADDING, TokenRows, equal_runs

GENERATED = settings(max_examples=200, deadline=None, derandomize=True, database=None)
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=400)


def make_rows(lengths: list[int]) -> TokenRows:
    return TokenRows.of([[1_000 * row + place for place in range(length)] for row, length in enumerate(lengths)])


def listed(rows: TokenRows) -> list[list[int]]:
    return [row.tolist() for row in rows.ids.split(rows.lengths.tolist())]


def test_rows_stand_one_after_the_other():
    rows = TokenRows.of([[5, 6, 7], (8,), [9, 10]])

    assert listed(rows) == [[5, 6, 7], [8], [9, 10]]
    assert rows.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert TokenRows.of([]).ids.dtype == TokenRows.of([]).lengths.dtype == torch.int64


@GENERATED
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.randoms())
def test_rows_are_taken_in_any_order(lengths, random):
    rows = make_rows(lengths)
    chosen = random.sample(range(len(lengths)), random.randint(0, len(lengths)))

    taken = rows.take(torch.tensor(chosen, dtype=torch.long))

    assert listed(taken) == [listed(rows)[i] for i in chosen]


def test_padding_stands_behind_the_text_and_outside_the_mask():
    ids, mask = TokenRows.of([[7], [8, 9]]).padded(5)

    assert ids.tolist() == [[7, 5], [8, 9]]
    assert mask.tolist() == [[1, 0], [1, 1]]


@GENERATED
@given(LENGTHS, st.booleans())
def test_each_row_is_in_one_stretch_and_the_shortest_come_first(lengths, padded):
    rows = make_rows(lengths)

    parts = rows.stretches(padded=padded)

    order = [int(i) for part in parts for i in part]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths)


@GENERATED
@given(LENGTHS)
def test_hardly_a_token_of_a_padded_stretch_is_padding(lengths):
    rows = make_rows(lengths)
    for part in rows.stretches(padded=True):
        ids, mask = rows.take(part).padded(0)
        assert int((mask == 0).sum()) <= max(MAX_PADDING * ids.numel(), FEW_TOKENS)
        assert len(ids) == 1 or ids.numel() <= MAX_PADDED_TOKENS


@GENERATED
@given(LENGTHS, st.integers(1, 2_000))
def test_stretches_without_padding_are_as_long_as_they_may_be(lengths, limit):
    rows = make_rows(lengths)

    sizes = [rows.lengths[part] for part in rows.stretches(padded=False, max_tokens=limit)]

    assert all(len(part) == 1 or part.sum() <= limit for part in sizes)
    assert all(part.sum() + after[0] > limit for part, after in zip(sizes, sizes[1:], strict=False))


@pytest.mark.parametrize("padded", [False, True])
def test_a_row_longer_than_a_stretch_has_one_of_its_own(padded):
    rows = make_rows([10, 50])

    assert [part.tolist() for part in rows.stretches(padded=padded, max_tokens=20)] == [[0], [1]]
    assert TokenRows.of([]).stretches(padded=padded) == []


def test_neighbours_of_equal_length_come_together():
    x = torch.arange(14).view(7, 2)

    runs = list(equal_runs(x, [1, 2, 2, 1, 1]))

    assert [run.shape for run in runs] == [(1, 1, 2), (2, 2, 2), (2, 1, 2)]
    assert torch.equal(torch.cat([run.flatten(0, 1) for run in runs]), x)
