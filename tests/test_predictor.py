import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import copydesk
from copydesk import int8
from copydesk.page import FailedPage, Page, PageError
from copydesk.predictor import Document, Predictor, choose_device, native_bfloat16
from copydesk.saved import TOKENIZER, load_saved, read_description, save_folder
from copydesk.split import Limits, split

HTML = "<h1>Minister said talks</h1><p>The <a href=x>goal</a> of the match today.</p><p>Subscribe to read more.</p>"
PAGES = [
    HTML,
    "",
    "Minister said talks\n\nThe match today.\n\nShare",
    b"<p>Gr\xf6\xdfe</p><p>share</p>",
    "".join(f"<p>goal {i % 7}</p><ul><li>share</ul>" for i in range(60)),
    "<p>" + "the match of news today. " * 200 + "</p>",
]


@pytest.fixture(scope="module")
def predictor(tiny_model: Path) -> Predictor:
    """Load the tiny model in float32, so that numbers do not depend on the processor."""
    return copydesk.load(tiny_model, device="cpu", precision="float32")


def assert_close(page: Page, other: Page) -> None:
    """Compare pages; scores of another batch may differ in the last digit."""
    scores = {"sections": {"__all__": {"score", "scores"}}, "topics": {"__all__": {"score"}}}
    assert page.model_dump(exclude=scores) == other.model_dump(exclude=scores)
    for one, two in zip(page.sections, other.sections, strict=True):
        assert one.scores.model_dump() == pytest.approx(two.scores.model_dump(), abs=2e-4)
    for one, two in zip(page.topics, other.topics, strict=True):
        assert one.score == pytest.approx(two.score, abs=2e-4)


def assert_sound(page: Page) -> None:
    assert Page.model_validate_json(page.model_dump_json()) == page
    end = 0
    for section in page.sections:
        assert end <= section.start
        assert page.text[section.start : section.end] == section.text
        end = section.end
    assert np.isfinite([section.score for section in page.sections]).all()


def test_a_page_is_read_from_end_to_end(predictor):
    page = predictor.predict_one(HTML)

    assert_sound(page)
    assert [section.text for section in page.sections] == page.text.split("\n\n")
    assert [section.tag for section in page.sections] == ["body>h1", "body>p", "body>p"]
    assert page.model.name == "tiny"
    assert page.model.version == load_saved_version(predictor)


def load_saved_version(predictor: Predictor) -> str:
    return predictor.saved.manifest.version


@pytest.mark.parametrize("budget", [1, 100, 32_768])
def test_pages_read_together_get_the_answers_that_they_get_alone(tiny_model, predictor, budget):
    batched = Predictor(load_saved(tiny_model), device="cpu", precision="float32", max_batch_tokens=budget)

    together = batched.predict(PAGES)

    assert len(together) == len(PAGES)
    for page, source in zip(together, PAGES, strict=True):
        assert_close(page, predictor.predict_one(source))


def test_a_budget_of_sections_batches_too(tiny_model, predictor):
    batched = Predictor(load_saved(tiny_model), device="cpu", precision="float32", max_batch_sections=4)

    for page, source in zip(batched.predict(PAGES), PAGES, strict=True):
        assert_close(page, predictor.predict_one(source))


def test_the_same_page_gets_the_same_answer_twice(predictor):
    assert predictor.predict_one(HTML) == predictor.predict_one(HTML)


def test_two_loads_give_the_same_answer(tiny_model, predictor):
    other = copydesk.load(str(tiny_model), device="cpu", precision="float32")

    assert other.predict_one(HTML) == predictor.predict_one(HTML)


def test_the_collector_passes_over_a_loaded_model_until_another_one_is_loaded(tiny_model):
    gc.unfreeze()
    predictor = copydesk.load(tiny_model)
    predictor.itself = predictor  # a cycle, which only the collector can free
    gone = weakref.ref(predictor)

    assert gc.get_freeze_count() > 0
    del predictor
    copydesk.load(tiny_model)

    assert gone() is None


@pytest.mark.skipif(not int8.is_native(), reason="the processor multiplies no 8-bit integers")
def test_integers_give_nearly_the_scores_of_floating_point(tiny_model, predictor):
    measuring = Predictor(load_saved(tiny_model), device="cpu", precision="float32")
    with int8.measured(measuring.model.encoder) as ranges:
        measuring.predict(PAGES)
    saved = load_saved(tiny_model)
    saved = replace(saved, description=saved.description.model_copy(update={"ranges": ranges}))

    desk = Predictor(saved, device="cpu")

    assert desk.precision == "int8"
    for page, exact in zip(desk.predict(PAGES), predictor.predict(PAGES), strict=True):
        assert page.text == exact.text
        for found, expected in zip(page.sections, exact.sections, strict=True):
            assert found.scores.model_dump() == pytest.approx(expected.scores.model_dump(), abs=0.02)


def test_no_pages_give_no_answers(predictor):
    assert predictor.predict([]) == []
    assert list(predictor.stream([])) == []


def test_pages_come_back_in_order_with_what_was_known_of_them(predictor):
    documents = [Document(f"goal {i}", source=f"{i}.txt", url=f"https://example.org/{i}") for i in range(20)]

    pages = list(predictor.stream(documents))

    assert [(page.text, page.source, page.url) for page in pages] == [tuple(d[:3]) for d in documents]


def test_the_kind_is_that_of_the_document_or_else_of_the_call(predictor):
    document = Document("<p>a</p>", kind="html")

    pages = predictor.predict(["<p>a</p><p>b</p>", document], kind="text")

    assert [page.text for page in pages] == ["<p>a</p><p>b</p>", "a"]


def test_a_kind_that_there_is_not_is_refused_with_those_that_there_are(predictor):
    for read in (
        lambda: predictor.predict_one("<p>a</p>", kind="HTML"),
        lambda: list(predictor.stream([Document("<p>a</p>", kind="HTML")])),
    ):
        with pytest.raises(ValueError, match="kind is 'HTML', expected one of auto, html, text"):
            read()


@pytest.mark.parametrize("page", ["<p>ab</p>", b"<p>ab</p>", Document("<p>ab</p>")])
def test_one_page_is_not_taken_for_a_list_of_its_characters(predictor, page):
    with pytest.raises(TypeError, match=r"expected a list: pass \[page\], or use predict_one"):
        predictor.predict(page)


LIMITS = Limits(max_bytes=1_000, max_sections=10, max_depth=50)
OVER = {
    "bytes": ("x" * 1_001, "1,001 bytes, the limit is 1,000"),
    "sections": ("a\n" * 11, "11 sections, the limit is 10"),
    "depth": ("<div>" * 51, "more than 50 deep"),
}


@pytest.mark.parametrize(("source", "message"), OVER.values(), ids=OVER)
def test_a_page_over_a_limit_is_an_error_where_it_was_asked_for_alone(tiny_model, source, message):
    predictor = copydesk.load(tiny_model, limits=LIMITS)

    with pytest.raises(PageError, match=message):
        predictor.predict_one(source, kind="html" if "<" in source else "text")
    with pytest.raises(PageError, match=message):
        predictor.predict(["a", Document(source, kind="html" if "<" in source else "text")])


def test_a_page_over_a_limit_is_a_row_of_its_own_in_a_stream(tiny_model):
    predictor = copydesk.load(tiny_model, limits=LIMITS)
    too_much = [Document(source, source=name) for name, (source, _) in OVER.items()]

    rows = list(predictor.stream([too_much[0], Document("a", source="1"), *too_much[1:], Document("b", source="2")]))

    assert [row.source for row in rows] == ["bytes", "1", "sections", "depth", "2"]
    assert [isinstance(row, FailedPage) for row in rows] == [True, False, True, True, False]
    for name, row in zip(OVER, [rows[0], rows[2], rows[3]], strict=True):
        assert OVER[name][1] in row.error


def test_a_stream_of_nothing_but_failures_ends(tiny_model):
    predictor = copydesk.load(tiny_model, limits=LIMITS)

    rows = list(predictor.stream(Document("x" * 2_000, source=str(i)) for i in range(3)))

    assert [row.source for row in rows] == ["0", "1", "2"]


def test_a_page_that_breaks_the_splitter_is_a_row_of_its_own_in_a_stream(predictor, monkeypatch):
    def fail(content, **options):
        if content == "hard":
            raise MemoryError("Can't parse HTML.")
        return split(content, **options)

    monkeypatch.setattr("copydesk.predictor.split", fail)

    rows = list(predictor.stream(Document(content, source=content) for content in ("goal", "hard", "match")))

    assert [(row.source, isinstance(row, Page)) for row in rows] == [("goal", True), ("hard", False), ("match", True)]
    assert "MemoryError: Can't parse HTML." in rows[1].error
    with pytest.raises(MemoryError):
        predictor.predict(["goal", "hard"])


def test_a_stream_asks_for_no_more_pages_than_it_needs(tiny_model):
    predictor = Predictor(load_saved(tiny_model), max_batch_tokens=1)
    asked = []

    stream = predictor.stream(asked.append(i) or Document("goal") for i in range(10))
    next(stream)

    assert asked == [0, 1]


HARD = {
    "empty": "",
    "no bytes": b"",
    "white space": " \n\t\u2028\xa0 \r\n" * 1_000,
    "white space in HTML": "<html><p> \n </p><div>&nbsp;</div><br><br>",
    "NUL bytes": b"\0" * 1_000,
    "NUL bytes among words": b"match\0goal\n\0\ntalks" * 100,
    "NUL bytes in HTML": b"<p>match\0goal</p>\0<p\0>talks</p\0>",
    "control characters": "".join(map(chr, range(32))) * 50,
    "broken UTF-8": "Größe ".encode() * 100 + b"\xc3\x28\xff\xfe\x80",
    "half a character": "日本".encode()[:-1],
    "UTF-16 cut in half": "match goal".encode("utf-16")[:-1],
    "all bytes": bytes(range(256)) * 40,
    "declared nonsense": b"<meta charset=nonsense><p>Gr\xf6\xdfe</p>",
    "lone surrogates": "match \ud800 goal\udfff",
    "unclosed everything": "<html><body class='x<div><p><a href='y><b>match<ul><li>goal<table><td>talks<!-- <script>",
    "unclosed elements": "<div><p><a href=x><b><i>match<ul><li>goal<li><table><tr><td>talks<td><select><option>x" * 100,
    "unclosed paragraphs": "<p>match goal" * 5_000,
    "closed nothing": "</p></div></b></table></html>" * 1_000 + "match",
    "deep": "<div>" * 2_000 + "match" + "</div>" * 2_000,
    "one long word": "x" * 100_000,
    "emoji": "👩‍👩‍👧‍👦" * 3_000,
    "combining marks": "a" + "\u0301" * 10_000,
    "right to left": "שלום \u202eעולם\u202c " * 500,
    "the same line": "share\n" * 5_000,
    "no letters": "…。!?" * 2_000,
    "a frameset": "<frameset><frame src=x></frameset>",
    "binary": np.random.default_rng(0).bytes(20_000),
}


@pytest.mark.parametrize("source", HARD.values(), ids=HARD)
def test_a_hard_page_is_answered(predictor, source):
    assert_sound(predictor.predict_one(source))


def test_hard_pages_are_answered_together(predictor):
    pages = predictor.predict(list(HARD.values()))

    assert [page.text for page in pages] == [predictor.predict_one(source).text for source in HARD.values()]


@pytest.mark.parametrize("source", ["", " \n ", "<p></p>", "\0"])
def test_a_page_without_an_article_has_no_topics(predictor, source):
    page = predictor.predict_one(source)

    if not page.body and not page.headline:
        assert page.topics == []
    assert page.sections == [] or page.text == "\0"


FIVE_MEGABYTES = 5 * 2**20


@pytest.mark.parametrize(
    "unit", ["x", "match goal ", "The match of news today. ", "日"], ids=["no spaces", "words", "sentences", "no ASCII"]
)
def test_a_single_line_of_five_megabytes_is_answered_within_a_sane_time(predictor, within, unit):
    source = unit * (FIVE_MEGABYTES // len(unit.encode()))

    with within(30):
        page = predictor.predict_one(source)

    assert page.text == source
    assert max(section.end - section.start for section in page.sections) <= 1_000
    assert sum(len("".join(section.text.split())) for section in page.sections) == len("".join(source.split()))


def test_a_page_of_20_000_flat_sections_is_answered_within_a_sane_time(predictor, within):
    with within(30):
        page = predictor.predict_one("".join(f"<p>match goal {i}</p>" for i in range(20_000)))

    assert len(page.sections) == 20_000
    assert len(json.loads(page.model_dump_json())["sections"]) == 20_000


@pytest.fixture
def unframed(tiny_model: Path, tmp_path: Path) -> Path:
    """Save the tiny model with a tokenizer that adds nothing around a text, and knows no word for the unknown."""
    tokenizer = json.loads((tiny_model / TOKENIZER).read_text())
    saved = load_saved(tiny_model)
    save_folder(
        tmp_path / "unframed",
        tensors=saved.model.state_dict(),
        description=read_description(tiny_model),
        tokenizer=json.dumps(tokenizer | {"post_processor": None}),
        name="unframed",
        created="2026-01-01",
        run={},
        card="",
    )
    return tmp_path / "unframed"


def test_a_tokenizer_that_frames_nothing_reads_pages_without_an_article(unframed):
    predictor = copydesk.load(unframed)

    for page in predictor.predict(["", HTML, "Subscribe"]):
        assert_sound(page)


def test_logits_come_in_the_order_of_the_texts(predictor):
    texts = ["match " * 30, "", "talks\nminister", "goal", "match " * 3]

    together = predictor.topic_logits(texts)

    alone = np.concatenate([predictor.topic_logits([text]) for text in texts])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert predictor.topic_logits([]).shape == (0, 3)


def test_a_model_folder_may_go_once_it_is_loaded(tiny_model, tmp_path, predictor):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    moved = copydesk.load(folder, device="cpu", precision="float32")
    shutil.rmtree(folder)

    assert moved.predict_one(HTML) == predictor.predict_one(HTML)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with CUDA")
def test_cuda_that_is_not_there_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="torch finds no CUDA device: use --device cpu"):
        choose_device("cuda")


@pytest.mark.parametrize(("option", "value"), [("device", "gpu"), ("precision", "fp16")])
def test_a_device_or_precision_that_there_is_not_is_refused_with_those_that_there_are(tiny_model, option, value):
    with pytest.raises(ValueError, match=f"{option} is '{value}', expected one of auto, "):
        copydesk.load(tiny_model, **{option: value})


def test_the_processor_says_whether_it_knows_bfloat16():
    assert native_bfloat16(choose_device("cpu")) in {True, False}
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
