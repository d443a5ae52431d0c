from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import BertConfig, PretrainedConfig, RobertaConfig, RobertaModel

from copydesk import network
from copydesk.encode import NUM_FEATURES, EncodedPage, collate_pages
from copydesk.labels import CLASSES
from copydesk.network import CopydeskConfig, CopydeskModel, PageLayer, windows_of
from copydesk.ragged import TokenRows

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
ENCODER = BertConfig(**SIZES)


def make_model(*, encoder: PretrainedConfig = ENCODER, **shape) -> CopydeskModel:
    settings = {"page_width": 64, "page_layers": 1, "num_hints": 16, "hint_width": 8, "num_topics": 3}
    config = CopydeskConfig(encoder=encoder.to_dict(), **settings | shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CopydeskModel(config).eval()


def make_page(sections: int, *, seed: int = 0) -> EncodedPage:
    random = np.random.default_rng(seed)
    tokens = [random.integers(1, 40, size=random.integers(1, 30)).tolist() for _ in range(sections)]
    counts = random.integers(0, 4, size=sections)
    hints = random.integers(0, 16, size=counts.sum())
    features = random.random((sections, NUM_FEATURES), dtype=np.float32)
    return EncodedPage(tokens, np.arange(sections), features, hints, counts, np.zeros(len(hints), dtype=bool))


def shuffled(page: EncodedPage, order: list[int]) -> EncodedPage:
    hints = np.split(page.hint_ids, np.cumsum(page.hint_counts)[:-1])
    return EncodedPage(
        page.tokens,
        page.distinct[order],
        page.features[order],
        np.concatenate([hints[i] for i in order]),
        page.hint_counts[order],
        page.from_attributes,
    )


@torch.inference_mode()
def logits_of(model: CopydeskModel, *pages: EncodedPage) -> list[torch.Tensor]:
    batch = collate_pages(pages)
    return list(model.section_logits(batch).split(batch.page_lengths))


@pytest.fixture(scope="module")
def model() -> CopydeskModel:
    return make_model(window_sections=16, window_overlap=4)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 5_000), st.integers(1, 400), st.data())
def test_windows_cover_a_page_and_keep_each_section_once(length, size, data):
    overlap = data.draw(st.integers(0, size - 1))

    windows = windows_of(length, size=size, overlap=overlap)

    kept = [position for _, _, keep_from, keep_to in windows for position in range(keep_from, keep_to)]
    assert kept == list(range(length))
    for start, stop, keep_from, keep_to in windows:
        assert 0 <= start <= keep_from <= keep_to <= stop <= length
        assert stop - start == min(size, length)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 3_000), st.integers(2, 300), st.data())
def test_a_section_is_kept_from_the_window_in_which_it_stands_farther_from_an_edge(length, size, data):
    overlap = data.draw(st.integers(1, size - 1))
    windows = windows_of(length, size=size, overlap=overlap)

    for (_, stop, _, keep_to), (start, _, _, _) in pairwise(windows):
        assert stop - start >= overlap
        assert abs((keep_to - start) - (stop - keep_to)) <= 1


def test_windows_are_no_more_than_are_needed():
    assert windows_of(10, size=10, overlap=4) == [(0, 10, 0, 10)]
    assert windows_of(11, size=10, overlap=4) == [(0, 10, 0, 5), (1, 11, 5, 11)]
    assert len(windows_of(16, size=10, overlap=4)) == 2
    assert len(windows_of(17, size=10, overlap=4)) == 3


def test_a_page_gets_the_same_logits_in_a_batch_as_alone(model):
    pages = [make_page(sections, seed=sections) for sections in (3, 1, 40, 7)]

    for together, page in zip(logits_of(model, *pages), pages, strict=True):
        (alone,) = logits_of(model, page)
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_the_order_of_pages_does_not_matter(model):
    pages = [make_page(sections, seed=sections) for sections in (5, 20, 2)]

    forwards, backwards = logits_of(model, *pages), logits_of(model, *reversed(pages))

    for one, other in zip(forwards, reversed(backwards), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_same_batch_gives_the_same_numbers_twice(model):
    pages = [make_page(30), make_page(3, seed=1)]

    assert all(map(torch.equal, logits_of(model, *pages), logits_of(model, *pages)))


def test_a_page_without_sections_has_no_logits_and_disturbs_no_other(model):
    empty, page = make_page(0), make_page(4)
    (alone,) = logits_of(model, page)

    before, found, after = logits_of(model, empty, page, empty)

    assert before.shape == after.shape == (0, len(CLASSES))
    torch.testing.assert_close(found, alone)
    assert logits_of(model, empty)[0].shape == (0, len(CLASSES))
    assert model.section_logits(collate_pages([])).shape == (0, len(CLASSES))


def test_a_page_without_hints_is_read(model):
    (logits,) = logits_of(model, make_page(4).without_hints())

    assert logits.isfinite().all()


@pytest.mark.parametrize("sections", [16, 17, 40, 1_000])
def test_a_page_longer_than_a_window_gets_logits_for_each_section(model, sections):
    (logits,) = logits_of(model, make_page(sections))

    assert logits.shape == (sections, len(CLASSES))
    assert logits.isfinite().all()


def test_windows_read_some_at_a_time_say_what_all_at_once_do(monkeypatch, model):
    pages = [make_page(sections, seed=sections) for sections in (40, 3, 17, 90)]
    together = logits_of(model, *pages)

    monkeypatch.setattr(network, "MAX_GROUP_SECTIONS", 20)

    for some, one in zip(logits_of(model, *pages), together, strict=True):
        torch.testing.assert_close(some, one, rtol=1e-4, atol=1e-5)


def test_a_section_is_read_with_those_in_its_window_and_no_farther(model):
    page = make_page(40)
    changed = shuffled(page, list(range(40)))
    changed.features[39] += 5

    difference = (logits_of(model, page)[0] - logits_of(model, changed)[0]).abs().amax(dim=1)

    first_of_last_window = windows_of(40, size=16, overlap=4)[-1][2]
    assert (difference[:first_of_last_window] < 1e-5).all()
    assert (difference[first_of_last_window:] > 1e-5).all()


def test_the_page_encoder_knows_the_order_of_sections(model):
    page, order = make_page(10), [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]

    (forwards,), (backwards,) = logits_of(model, page), logits_of(model, shuffled(page, order))

    assert (forwards[order] - backwards).abs().max() > 1e-4


def test_without_page_layers_each_section_is_judged_by_itself():
    model, page, order = make_model(page_layers=0), make_page(10), [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]

    (forwards,), (mixed,) = logits_of(model, page), logits_of(model, shuffled(page, order))

    torch.testing.assert_close(forwards[order], mixed, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_padding_changes_no_article(model):
    rows = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10] * 20]

    together = model.topic_logits(TokenRows.of(rows))
    alone = torch.cat([model.topic_logits(TokenRows.of([row])) for row in rows])

    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert model.topic_logits(TokenRows.of([])).shape == (0, 3)


@torch.inference_mode()
def test_one_call_returns_what_all_heads_say():
    model = make_model(page_encoders=3)
    batch, articles = collate_pages([make_page(5)]), TokenRows.of([[1, 2, 3]])

    sections, _, topics = model([batch] * 3, articles)

    assert sections.shape == (3, 5, len(CLASSES))
    assert not torch.allclose(sections[0], sections[1])
    torch.testing.assert_close(model.section_logits(batch).exp(), sections.softmax(dim=-1).mean(dim=0))
    assert torch.equal(topics, model.topic_logits(articles))


@torch.inference_mode()
def test_page_encoders_take_turns_at_more_views_than_they_are():
    model = make_model(page_encoders=2)
    page = make_page(5)
    batch, as_text = collate_pages([page]), collate_pages([page.without_hints()])

    sections, _, _ = model([batch, batch, as_text, as_text], TokenRows.of([]))

    rows = model.encode_rows(batch.rows)
    for view, (number, seen) in enumerate([(0, batch), (1, batch), (0, as_text), (1, as_text)]):
        assert torch.equal(sections[view], model.section_logits_of(number, rows, [seen])[0][0])
    assert not torch.allclose(sections[0], sections[2])


@torch.inference_mode()
def test_text_readers_read_every_page_as_if_it_were_plain_text():
    model = make_model(page_encoders=3, text_readers=1)
    pages = [make_page(5), make_page(4)]
    batch, as_text = collate_pages(pages), collate_pages([page.without_hints() for page in pages])

    each, _ = model.each_section_logits(model.encode_rows(batch.rows), [batch, batch, as_text])

    torch.testing.assert_close(model.section_logits(batch).exp(), each.softmax(dim=-1).mean(dim=0))
    assert not torch.allclose(model.section_logits(batch), model.section_logits(as_text))


@pytest.mark.parametrize("name", ["text_readers", "own_text_readers"])
def test_more_readers_than_page_encoders_are_refused(name):
    with pytest.raises(ValidationError, match=f"{name} is 2, expected at most page_encoders: 1"):
        make_model(**{name: 2})


@torch.inference_mode()
def test_what_a_section_says_by_itself_counts_beside_what_its_page_says():
    model, page, order = make_model(own_text_readers=1), make_page(10), [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    batch, backwards = collate_pages([page.without_hints()]), collate_pages([shuffled(page, order)])
    rows = model.encode_rows(batch.rows)

    logits, own = model.section_logits_of(0, rows, [batch])

    assert own.std() > 0.1
    torch.testing.assert_close(model.section_logits_of(0, rows, [backwards])[1], own[:, order])
    model.page_encoders[0].own_text.head[1].bias.data += 3
    torch.testing.assert_close(model.section_logits_of(0, rows, [batch])[0], logits + 3)


@torch.inference_mode()
def test_only_as_many_page_encoders_as_are_asked_for_read_own_texts():
    model, batch = make_model(page_encoders=3, own_text_readers=2), collate_pages([make_page(5)])
    rows = model.encode_rows(batch.rows)

    sections, own = model.each_section_logits(rows, [batch] * 6)

    assert (sections.shape, own.shape) == ((6, 5, len(CLASSES)), (4, 5, len(CLASSES)))
    assert model.section_logits_of(2, rows, [batch, batch])[1].shape == (0, 5, len(CLASSES))


@pytest.mark.parametrize(("width", "is_linear"), [(0, True), (8, False)])
@torch.inference_mode()
def test_topics_are_linear_in_the_vector_of_an_article_unless_there_is_a_hidden_layer(width, is_linear):
    model = make_model(topic_width=width)
    one, other = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))

    middle, mean = model.topic_head((one + other) / 2), (model.topic_head(one) + model.topic_head(other)) / 2

    assert middle.shape == (3,)
    assert torch.allclose(middle, mean, atol=1e-5) == is_linear


def test_every_weight_is_trained_by_all_heads_together():
    model = make_model(page_encoders=2, own_text_readers=1, topic_width=8)
    sections, _, topics = model([collate_pages([make_page(5)])] * 2, TokenRows.of([[1, 2, 3]]))
    (sections.sum() + topics.sum()).backward()

    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_multiplied_in_bfloat16_pages_get_nearly_the_same_logits_and_sums_stay_float32():
    model = make_model(page_encoders=2, own_text_readers=1).eval()
    pages = [make_page(30), make_page(7, seed=1)]
    exact = torch.cat(logits_of(model, *pages)).exp()
    model.multiply_in(torch.bfloat16)
    norms: list[torch.dtype] = []
    for page_encoder in model.page_encoders:
        for module in page_encoder.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_pre_hook(lambda _, inputs: norms.append(inputs[0].dtype))
    rounded = torch.cat(logits_of(model, *pages)).exp()

    assert not torch.equal(rounded, exact)
    assert torch.allclose(rounded, exact, atol=0.02)
    assert set(norms) == {torch.float32}
    assert {layer.feed_up.weight.dtype for page_encoder in model.page_encoders for layer in page_encoder.layers} == {
        torch.bfloat16
    }


def test_encoders_of_other_families_are_those_of_transformers_less_the_pooler():
    model = make_model(encoder=RobertaConfig(**SIZES))

    assert isinstance(model.encoder, RobertaModel)
    assert [name for name in model.state_dict() if "pooler" in name] == []
    assert model.section_logits(collate_pages([make_page(5)])).shape == (5, len(CLASSES))


def test_an_untrained_hint_says_next_to_nothing():
    assert make_model().page_encoders[0].hint_embedding.weight.std() < 0.05


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="page_width is 100, expected a multiple of 64"):
        PageLayer(100, dropout=0.0)
