import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from copydesk.encode import (
    NUM_FEATURES,
    TEXT_FEATURES,
    EncodedPage,
    Encoding,
    TextEncoder,
    collate_pages,
    features_of,
)
from copydesk.ragged import TokenRows
from copydesk.split import split

GENERATED = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
HINTS = "0:p 0:h1 1:body 1:article in:article own:lead own:story class:story own:promo with:a link:x".split()
HTML = (
    "<article class='story'><h1>Minister said talks.</h1><p id=lead>The <a href=x>match</a> today</p>"
    "<p>Share</p><aside class='promo box'><p>Read more 24</p></aside><p>Share</p></article>"
)


@pytest.fixture(scope="module")
def tokenizer_json(tiny_model) -> str:
    return (tiny_model / "tokenizer.json").read_text()


def text_encoder(tokenizer_json: str, **encoding) -> TextEncoder:
    return TextEncoder(Tokenizer.from_str(tokenizer_json), Encoding(**encoding), HINTS)


def assert_equal(page: EncodedPage, other: EncodedPage) -> None:
    assert page.tokens == other.tokens
    np.testing.assert_array_equal(page.hint_ids, other.hint_ids)
    np.testing.assert_array_equal(page.hint_counts, other.hint_counts)
    np.testing.assert_array_equal(page.from_attributes, other.from_attributes)
    np.testing.assert_array_equal(page.distinct, other.distinct)
    np.testing.assert_array_equal(page.features, other.features)


def test_each_distinct_section_is_tokenized_once(tokenizer_json):
    page = text_encoder(tokenizer_json).encode_page(split(HTML))

    assert page.distinct.tolist() == [0, 1, 2, 3, 2]
    assert len(page) == 5
    assert len(page.tokens) == 4
    assert page.num_tokens == sum(len(tokens) for tokens in page.tokens)


def words_kept(text: str, tokenizer_json: str, **encoding) -> str:
    encoder = text_encoder(tokenizer_json, **encoding)
    (tokens,) = encoder.encode_page(split(text, kind="text")).tokens
    return " ".join(map(encoder.tokenizer.id_to_token, tokens))


def test_a_long_section_keeps_its_head_and_its_tail(tokenizer_json):
    kept = words_kept("the a of to in and minister", tokenizer_json, head_tokens=3, tail_tokens=2)

    assert kept == "[CLS] the a of and minister [SEP]"


def test_a_section_that_fits_is_whole(tokenizer_json):
    kept = words_kept("the a of to in", tokenizer_json, head_tokens=3, tail_tokens=2)

    assert kept == "[CLS] the a of to in [SEP]"


def test_a_section_can_be_read_without_its_tail(tokenizer_json):
    assert words_kept("the a of to", tokenizer_json, head_tokens=2, tail_tokens=0) == "[CLS] the a [SEP]"


def test_the_sections_of_a_page_of_too_many_tokens_are_cut_shorter_until_it_fits(tokenizer_json):
    raw = split("the a of to in and\nthe a of to in talks\nminister", kind="text")

    def read(budget: int) -> list[str]:
        encoder = text_encoder(tokenizer_json, head_tokens=4, tail_tokens=2, max_page_tokens=budget)
        page = encoder.encode_page(raw)
        texts = [" ".join(map(encoder.tokenizer.id_to_token, row[1:-1])) for row in page.tokens]
        return [texts[i] for i in page.distinct]

    assert read(19) == ["the a of to in and", "the a of to in talks", "minister"]
    assert read(18) == ["the a and", "the a talks", "minister"]
    assert read(12) == read(7) == read(1) == ["the", "the", "minister"]


def test_sections_that_are_equal_once_cut_are_read_once(tokenizer_json):
    encoder = text_encoder(tokenizer_json, head_tokens=4, tail_tokens=2, max_page_tokens=7)

    page = encoder.encode_page(split("the a of to in and\nminister\nthe a of to in talks", kind="text"))

    assert page.distinct.tolist() == [0, 1, 0]
    assert page.num_tokens == 6


def test_padding_and_truncation_left_in_a_tokenizer_are_switched_off(tokenizer_json):
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.enable_padding(length=40)
    tokenizer.enable_truncation(4)

    (tokens,) = TextEncoder(tokenizer, Encoding(), []).encode_page(split("the a of to in", kind="text")).tokens

    assert len(tokens) == 7


@pytest.mark.parametrize(
    ("frame", "expected"), [(None, [1, 2]), ("$A [E]", [1, 2, 3]), ("[B] $A [E]", [4, 1, 2, 3])], ids=str
)
def test_a_section_is_framed_as_its_tokenizer_frames_text(frame, expected):
    tokenizer = Tokenizer(WordLevel({"?": 0, "a": 1, "b": 2, "[E]": 3, "[B]": 4}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    if frame:
        tokenizer.post_processor = TemplateProcessing(single=frame, special_tokens=[("[E]", 3), ("[B]", 4)])
    encoder = TextEncoder(tokenizer, Encoding(), [])

    assert encoder.encode_page(split("a b", kind="text")).tokens == [expected]
    assert encoder.encode_articles(["a b"]) == [expected]


@pytest.mark.parametrize("source", [HTML, "<p>" + "word. " * 1_000 + "</p><p>a</p>", "<p></p>", "<p>a<br><br>a</p>"])
def test_without_hints_a_page_looks_as_if_it_had_come_as_plain_text(source, tokenizer_json):
    encoder = text_encoder(tokenizer_json)
    page = split(source, kind="html")
    plain = split(page.text, kind="text")

    assert_equal(encoder.encode_page(page).without_hints(), encoder.encode_page(plain))


def test_without_attribute_hints_a_page_looks_as_if_it_had_no_classes_and_addresses(tokenizer_json):
    encoder = text_encoder(tokenizer_json)
    bare = (
        HTML.replace(" class='story'", "")
        .replace(" id=lead", "")
        .replace(" class='promo box'", "")
        .replace(" href=x", "")
    )

    assert_equal(encoder.encode_page(split(HTML)).without_attribute_hints(), encoder.encode_page(split(bare)))


def test_what_is_dropped_is_dropped_from_a_copy(tokenizer_json):
    encoder = text_encoder(tokenizer_json)
    page = encoder.encode_page(split(HTML))
    page.without_hints()
    page.without_attribute_hints()

    assert_equal(page, encoder.encode_page(split(HTML)))


def test_a_hint_is_its_place_in_the_vocabulary_and_an_unknown_one_says_nothing(tokenizer_json):
    page = text_encoder(tokenizer_json).encode_page(split("<p class='lead css-x1'><u>a</u></p>", kind="html"))

    assert [HINTS[i] for i in page.hint_ids] == ["0:p", "1:body", "own:lead"]
    assert page.hint_counts.tolist() == [3]
    assert page.from_attributes.tolist() == [False, False, True]


def test_layout_features_tell_the_place_and_the_look_of_a_section():
    raw = split("<h1><a>To be.</a></h1><p>x</p><p>x</p>", kind="html")

    features = features_of(raw, raw.texts())

    assert features.dtype == np.float32
    assert features.shape == (3, NUM_FEATURES)
    np.testing.assert_allclose(features[:, 2], [1, 0, 0])  # ends like a sentence
    np.testing.assert_allclose(features[:, 4], [1 / 6, 0, 0])  # capitals
    np.testing.assert_allclose(features[:, 5], np.log([1, 2, 2]))  # occurrences
    np.testing.assert_allclose(features[:, 6], [1 / 6, 0.5, 5 / 6])  # place by sections
    np.testing.assert_allclose(features[:, 7], [3 / 8, 6.5 / 8, 7.5 / 8])  # place by characters
    np.testing.assert_allclose(features[:, 13:], [[1, 1, 1], [0, 0, 1], [0, 0, 1]])  # HTML


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("a\nb\n\nc\n\n\n\nd", [0.5, 0.5, 1, 1]),
        ("a\r\nb\r\n \t\r\nc", [0.5, 0.5, 1]),
        ("a\n\nb\n\nc", [0.5, 0.5, 0.5]),  # the same everywhere says nothing
        (f"{'word ' * 300}\nb\n\nc", [0.5, 0, 0.5, 1]),  # a line cut in two
        ("\n\n\na\n\n\n", [0.5]),
    ],
)
def test_layout_features_tell_where_blank_lines_stand(text, before):
    raw = split(text, kind="text")

    features = features_of(raw, raw.texts())

    assert features[:, 11].tolist() == before
    assert features[:, 12].tolist() == [*before[1:], 0.5]


def test_a_page_and_its_text_have_the_same_layout_but_for_what_tags_say():
    page = split("<div>Menu<ul><li>a<li>b</ul></div><h1>To be.</h1><p>x</p><p>y<br><br>z</p>", kind="html")
    text = split(page.text, kind="text")

    both = [features_of(raw, raw.texts())[:, : len(TEXT_FEATURES)] for raw in (page, text)]

    np.testing.assert_array_equal(*both)
    assert both[0][:, 11].tolist() == [0.5, 1, 0.5, 1, 1, 1, 1]


def test_a_page_without_blank_lines_looks_as_if_it_had_come_so(tokenizer_json):
    encoder = text_encoder(tokenizer_json)
    spaced, plain = (encoder.encode_page(split(text, kind="text")) for text in ("a\nb\n\nc\nd", "a\nb\nc\nd"))

    np.testing.assert_array_equal(spaced.without_blank_lines().features[:, 11:13], plain.features[:, 11:13])
    assert not np.array_equal(spaced.features[:, 11:13], plain.features[:, 11:13])


@GENERATED
@given(st.text(max_size=300))
def test_features_are_finite_and_small_whatever_the_text(text):
    raw = split(text, kind="text")

    features = features_of(raw, raw.texts())

    assert np.isfinite(features).all()
    assert (features >= 0).all()
    assert (features[:, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]] <= 1.5).all()


def test_an_article_is_cut_to_its_first_tokens(tokenizer_json):
    encoder = text_encoder(tokenizer_json, max_article_tokens=8)
    vocabulary = encoder.tokenizer.get_vocab()

    short, long = encoder.encode_articles(["talks\n", "match goal " * 100_000])

    assert short == [vocabulary[word] for word in ("[CLS]", "talks", "[SEP]")]
    assert long == [vocabulary[word] for word in ("[CLS]", *["match", "goal"] * 3, "[SEP]")]
    assert encoder.encode_articles([]) == []


token_rows = st.lists(st.integers(1, 9), min_size=1, max_size=40)


@st.composite
def encoded_pages(draw) -> EncodedPage:
    tokens = draw(st.lists(token_rows, max_size=8, unique_by=tuple))
    count = draw(st.integers(len(tokens), len(tokens) + 4)) if tokens else 0
    distinct = draw(st.permutations([*range(len(tokens)), *[0] * (count - len(tokens))]))
    counts = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    hints = np.array(draw(st.lists(st.integers(0, 63), min_size=sum(counts), max_size=sum(counts))), dtype=np.int64)
    features = np.arange(count * NUM_FEATURES, dtype=np.float32).reshape(count, NUM_FEATURES)
    return EncodedPage(
        tokens=tokens,
        distinct=np.array(distinct, dtype=np.int64),
        features=features,
        hint_ids=hints,
        hint_counts=np.array(counts, dtype=np.int64),
        from_attributes=hints > 31,
    )


def unpacked(rows: TokenRows) -> list[list[int]]:
    return [row.tolist() for row in rows.ids.split(rows.lengths.tolist())]


@GENERATED
@given(st.lists(encoded_pages(), max_size=5))
def test_packing_keeps_every_section_of_every_page_in_order(pages):
    batch = collate_pages(pages)

    rows = unpacked(batch.rows)
    assert [rows[i] for i in batch.row_of_section] == [page.tokens[i] for page in pages for i in page.distinct]
    assert batch.page_lengths == [len(page) for page in pages]
    assert batch.features.tolist() == [row for page in pages for row in page.features.tolist()]
    assert batch.hint_ids.tolist() == [hint for page in pages for hint in page.hint_ids]
    ends = torch.cat([batch.hint_offsets[1:], torch.tensor([len(batch.hint_ids)])])[: len(batch.hint_offsets)]
    assert (ends - batch.hint_offsets).tolist() == [count for page in pages for count in page.hint_counts]


@GENERATED
@given(st.lists(encoded_pages(), max_size=5))
def test_a_batch_without_hints_is_that_of_pages_without_hints(pages):
    ours, theirs = collate_pages(pages).without_hints(), collate_pages([page.without_hints() for page in pages])

    for name in ("row_of_section", "features", "hint_ids", "hint_offsets"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert ours.page_lengths == theirs.page_lengths


@GENERATED
@given(st.lists(encoded_pages(), max_size=5))
def test_no_row_is_encoded_twice(pages):
    rows = unpacked(collate_pages(pages).rows)

    assert sorted(rows) == sorted({tuple(tokens): tokens for page in pages for tokens in page.tokens}.values())


def test_equal_sections_of_different_pages_share_a_row(tokenizer_json):
    encoder = text_encoder(tokenizer_json)
    pages = [encoder.encode_page(split(text, kind="text")) for text in ("share\ntalks", "goal\nshare")]

    batch = collate_pages(pages)

    assert len(batch.rows.lengths) == 3
    first, _, _, last = batch.row_of_section.tolist()
    assert first == last


@pytest.mark.parametrize("count", [0, 1, 2])
def test_pages_without_sections_pack_into_nothing(count, tokenizer_json):
    empty = text_encoder(tokenizer_json).encode_page(split(""))
    batch = collate_pages([empty] * count)

    assert (len(batch.rows.lengths), batch.page_lengths) == (0, [0] * count)
    assert batch.features.shape == (0, NUM_FEATURES)
    assert all(tensor.dtype == torch.int64 for tensor in (batch.row_of_section, batch.hint_ids, batch.hint_offsets))


@pytest.mark.parametrize("setting", [{"head_tokens": 0}, {"max_article_tokens": 7}, {"tail": 3}])
def test_an_encoding_that_makes_no_sense_is_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Encoding.model_validate(setting)
