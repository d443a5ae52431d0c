"""Vectors of sections that come again: the same as encoded anew, the least recently used forgotten, safe in threads."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import copydesk
from copydesk.memory import VectorMemory
from copydesk.predictor import Predictor
from copydesk.saved import load_saved

CPU = torch.device("cpu")


class Encoder:
    """Gives each row its first token and its length, and notes what it was given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []

    def __call__(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        self.given += [list(row) for row in rows]
        return torch.tensor([[row[0], len(row)] for row in rows], dtype=torch.float32).reshape(-1, 2)


def test_only_what_is_not_known_is_encoded():
    memory, encode = VectorMemory(8, width=2, device=CPU), Encoder()
    memory.vectors([(1,), (2, 2)], encode)
    found = memory.vectors([(3, 3, 3), (2, 2), (4,), (1,)], encode)
    assert found.tolist() == [[3, 3], [2, 2], [4, 1], [1, 1]]
    assert encode.given == [[1], [2, 2], [3, 3, 3], [4]]


def test_the_least_recently_used_is_forgotten():
    memory, encode = VectorMemory(2, width=2, device=CPU), Encoder()
    for row in (1, 2, 1, 3):
        memory.vectors([(row,)], encode)
    encode.given.clear()
    assert memory.vectors([(1,), (3,)], encode).tolist() == [[1, 1], [3, 1]]
    assert encode.given == []
    memory.vectors([(2,)], encode)
    assert encode.given == [[2]]


@pytest.mark.parametrize("max_rows", [0, 1, 3, 50])
def test_more_rows_than_it_can_keep_are_all_answered(max_rows):
    memory, encode = VectorMemory(max_rows, width=2, device=CPU), Encoder()
    rows = [(i,) for i in range(20)]
    for _ in range(2):
        assert memory.vectors(rows, encode).tolist() == [[i, 1] for i in range(20)]
    assert len(encode.given) == 40 - min(max_rows, 20)


def test_after_clearing_nothing_is_known():
    memory, encode = VectorMemory(4, width=2, device=CPU), Encoder()
    memory.vectors([(1,)], encode)
    memory.clear()
    memory.vectors([(1,), (2,)], encode)
    assert encode.given == [[1], [1], [2]]


def test_nothing_is_no_row():
    assert VectorMemory(4, width=2, device=CPU).vectors([], Encoder()).shape == (0, 2)


def test_an_encoder_that_fails_leaves_nothing_behind():
    memory, encode = VectorMemory(4, width=2, device=CPU), Encoder()

    def fail(rows: Sequence[Sequence[int]]) -> torch.Tensor:
        raise MemoryError(f"{len(rows)} rows")

    with pytest.raises(MemoryError):
        memory.vectors([(1,)], fail)
    assert memory.vectors([(1,)], encode).tolist() == [[1, 1]]


def test_threads_that_make_room_for_each_other_get_their_own_vectors():
    memory = VectorMemory(16, width=2, device=CPU)

    def ask(start: int) -> bool:
        rows = [(i % 40, *[0] * (i % 3)) for i in range(start, start + 24)]
        return memory.vectors(rows, Encoder()).tolist() == [[row[0], len(row)] for row in rows]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(400)))


def test_a_page_of_a_known_site_costs_what_is_new_on_it(tiny_model, monkeypatch):
    desk = copydesk.load(tiny_model)
    encoded: list[int] = []
    real = desk.model.encode_rows

    def count(rows):
        encoded.append(len(rows.lengths))
        return real(rows)

    monkeypatch.setattr(desk.model, "encode_rows", count)
    # All words are unknown to the tiny tokenizer: sections differ by their number.
    menu = "<ul><li>Home</li><li>The harbour</li><li>Letters to us</li></ul>"
    desk.predict_one(f"<body>{menu}<p>The ferry is late.</p>")
    desk.predict_one(f"<body>{menu}<p>The ferry came after all today.</p>")
    assert (encoded[0], encoded[2]) == (4, 1)  # those between are articles, read for topics


def test_what_was_read_before_changes_no_answer(tiny_model):
    pages = ["<body><p>Gulls.</p><p>Subscribe</p>", "<body><p>Subscribe</p><p>Two gulls, and a third one.</p>"]
    fresh = Predictor(load_saved(tiny_model), max_remembered_sections=0)
    desk = copydesk.load(tiny_model)
    desk.predict(pages)
    for page in pages:
        ours, theirs = desk.predict_one(page), fresh.predict_one(page)
        assert [section.label for section in ours.sections] == [section.label for section in theirs.sections]
        for one, other in zip(ours.sections, theirs.sections, strict=True):
            assert one.score == pytest.approx(other.score, abs=2e-4)
