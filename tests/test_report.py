"""The report shows all it should, needs nothing else, and takes no page at its word."""

import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from copydesk.labels import TopicInfo, TopicList
from train import figures
from train.report import MAX_CHARACTERS, MAX_FOLDED, NUM_PAGES, render_report
from train.scores import (
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

TOPICS = TopicList(
    [
        TopicInfo(id="t:0", slug="sport", name="sport & games"),
        TopicInfo(id="t:1", slug="weather", name="weather"),
        TopicInfo(id="t:2", slug="religion", name="religion"),
    ]
)
PARTS = ("numbers", "confusion", "calibration", "labels", "topics", "slices", "sites", "pages")
BODY, BOILERPLATE, PAYWALL, SPONSORED = range(4)
HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">'\"></p>{{ 7 * 7 }}"


def page(number: int, true: Sequence[int], predicted: Sequence[int], **changes: Any) -> ScoredPage:
    facts = {
        "id": f"page-{number}",
        "site": f"paper{number}.test",
        "source": "sample",
        "genre": "news",
        "language": "en",
        "true": np.array(true, dtype=int),
        "scores": np.eye(4)[list(predicted)] * 0.6 + 0.1,
        "characters": np.full(len(true), 10),
        "body_word_f1": 0.5,
        "body_4gram_f1": 0.4,
        "body_exact": False,
        "holds": np.array([number % 2 == 0, number % 3 == 0, False]),
        "marked": np.array([True, number % 3 == 0, False]),
        "decided": np.ones(3, dtype=bool),
        "topic_scores": np.array([0.9, 0.3 if number % 3 else 0.8, 0.1]),
    }
    return ScoredPage(**(facts | changes))


def report_of(pages: Sequence[ScoredPage], texts: dict[str, list[str]], topics: TopicList = TOPICS) -> str:
    scores = headline_scores(pages, samples=10, seed=0) | {"seconds": 2.0, "pages_per_second": len(pages) / 2}
    scores |= {f"as_text_{name}": value for name, value in summarise(pages).items()}
    if in_english := english_news(pages):
        scores |= {f"english_news_{name}": value for name, value in summarise(in_english).items()}
    result = {
        "experiment": "tiny",
        "split": "validation",
        "model": {"name": "tiny", "version": "0123456789ab"},
        "device": "a processor",
        "scores": scores,
        "tables": {
            "labels": label_table(pages),
            "confusion": confusion_table(pages),
            "topics": topic_table(pages, topics, np.full(len(topics), 0.41)),
            "slices": slice_table(pages),
            "sites": site_table(pages),
        },
    }
    drawn = figures.reliability(
        np.concatenate([page.scores.max(axis=1) for page in pages]),
        np.concatenate([page.predicted == page.true for page in pages]),
    )
    report = render_report(result, pages, texts, topics=topics, reliability=drawn)
    figures.close([drawn])
    return report


def sample(count: int = 4) -> tuple[list[ScoredPage], dict[str, list[str]]]:
    """Make pages with one wrong section each, in the midst of right ones."""
    true = [BOILERPLATE] * 10 + [BODY, PAYWALL] + [BODY] * 20 + [SPONSORED]
    pages = [page(i, true, [*true[:11], BOILERPLATE, *true[12:]]) for i in range(count)]
    return pages, {page.id: [f"text {i} of {page.id}" for i in range(len(true))] for page in pages}


class Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_every_part_is_there_and_can_be_reached():
    elements = Elements(report_of(*sample()))

    assert tuple(section["id"] for section in elements.all("section")) == PARTS
    assert [link["href"] for link in elements.all("a")] == [f"#{name}" for name in PARTS]
    assert "tiny on validation" in elements.text
    assert "2.0 pages a second, on one machine: a processor" in elements.text
    assert len(elements.all("svg")) == 1 + 4 + 2  # reliability, labels, topics with positives
    assert "1 of 3 topics occur on none of these pages and are left out: religion" in elements.text
    assert elements.text.count("threshold 0.41") == 2


def test_nothing_outside_of_the_file_is_needed():
    report = report_of(*sample())
    elements = Elements(report)

    assert re.findall(r"""(?:src|href|srcset|data|action)\s*=\s*["']?\s*(?!#)[^"'\s>]+""", report) == []
    assert re.findall(r"url\((?!#)|@import", report) == []
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {name for name, _ in elements.found}
    (policy,) = (meta for meta in elements.all("meta") if meta.get("http-equiv"))
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_what_comes_from_a_page_is_text_and_nothing_else():
    names = ("id", "site", "source", "genre", "language")
    hostile = page(0, [BODY, PAYWALL], [BODY, BODY], **dict.fromkeys(names, HOSTILE))
    elements = Elements(report_of([hostile], {HOSTILE: [HOSTILE, HOSTILE]}))

    assert {"script", "img"} & {name for name, _ in elements.found} == set()
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert elements.text.count(HOSTILE) == 2 + 1 + 3 + len(names)  # sections, worst sites, slices, the page


def test_names_of_topics_are_escaped_in_figures_too():
    report = report_of(*sample())

    assert "sport &amp; games" in report
    assert "sport & games" not in report


def test_no_id_stands_for_two_things():
    ids = [attributes["id"] for _, attributes in Elements(report_of(*sample())).found if "id" in attributes]

    assert len(set(ids)) == len(ids)


def test_a_wrong_section_stands_in_the_open_between_its_neighbours_and_the_rest_is_folded():
    pages, texts = sample(1)
    report = report_of(pages, texts)
    elements = Elements(report)

    assert [item["class"] for item in elements.all("li") if "wrong" in (item["class"] or "")] == ["of-paywall wrong"]
    folds = re.findall(r'<details class="fold">.*?</details>', report, re.DOTALL)
    assert [re.search(r"<summary>(.*?)</summary>", fold)[1] for fold in folds] == [
        "10 right: 10 boilerplate",
        "20 right: 19 body, 1 sponsored",
    ]
    assert folds[1].count("<li") == MAX_FOLDED
    assert f"… and {20 - MAX_FOLDED} more" in folds[1]
    in_the_open = re.sub(r'<details class="fold">.*?</details>', "", report, flags=re.DOTALL)
    assert re.findall(r"text (\d+) of", in_the_open) == ["10", "11", "12"]


def test_long_texts_are_cut_and_say_so():
    report = report_of([page(0, [BODY], [PAYWALL])], {"page-0": ["a" * (MAX_CHARACTERS + 1_234)]})

    assert "a" * MAX_CHARACTERS + "<i>… 1,234 more characters</i>" in report


@pytest.mark.parametrize("character", ["a", "新", "&"])
def test_a_report_on_endless_pages_stays_below_two_megabytes(character):
    pages = [page(i, [BODY] * 3_000, [PAYWALL] * 3_000) for i in range(NUM_PAGES + 2)]
    report = report_of(pages, {page.id: [character * 1_000] * 3_000 for page in pages})

    assert len(report.encode()) < 2_000_000
    assert report.count('<details class="page"') == NUM_PAGES
    assert "more sections of this page are not shown" in report


def test_a_report_on_pages_of_unknown_topics_says_so():
    pages, texts = sample()
    nothing = np.zeros(3, dtype=bool)
    unknown = [page(i, p.true, p.predicted, holds=nothing, decided=nothing) for i, p in enumerate(pages)]

    assert "No page here has known topics." in Elements(report_of(unknown, texts)).text


def test_a_report_of_a_model_without_topics_says_so():
    pages, texts = sample()
    empty: dict[str, Any] = dict.fromkeys(("holds", "marked", "decided"), np.zeros(0, dtype=bool))
    bare = [page(i, p.true, p.predicted, topic_scores=np.zeros(0), **empty) for i, p in enumerate(pages)]

    assert "No page here has known topics." in Elements(report_of(bare, texts, topics=TopicList([]))).text


def test_a_slice_without_pages_or_without_a_label_gets_a_dash():
    report = report_of([page(0, [BODY, BOILERPLATE], [BODY, BODY], language="de")], {"page-0": ["a", "b"]})

    (row,) = re.findall(r"<tr><td>language: de</td>.*?</tr>", report)
    assert row.count("<td>–</td>") == 2  # paywall, sponsored
    (macro,) = re.findall(r"<tr><td>macro F1.*?</tr>", report, re.DOTALL)
    assert macro.count("<td>–</td>") == 1  # English news
    assert "english news" not in report


def test_a_report_without_a_wrong_section_says_so():
    report = report_of([page(0, [BODY, BOILERPLATE], [BODY, BOILERPLATE])], {"page-0": ["a", "b"]})

    assert report.count("No section is wrong.") == 2


@pytest.fixture(scope="module")
def opened(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Open a report in Chromium; nothing may go wrong in it, and it may ask nobody."""
    pages, texts = sample()
    texts["page-0"][11] = HOSTILE
    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report_of(pages, texts), "utf-8")
    context = browser.new_context()
    shown = context.new_page()
    faults: list[str] = []
    shown.on("pageerror", lambda error: faults.append(str(error)))
    shown.on("console", lambda message: faults.append(message.text))
    shown.on("request", lambda request: faults.append(request.url) if not request.url.startswith(path.as_uri()) else 0)
    shown.goto(path.as_uri())
    yield shown
    context.close()
    assert faults == []


@pytest.mark.parametrize("width", [360, 1_280])
def test_it_fits_a_phone_and_a_wide_screen(opened, width):
    opened.set_viewport_size({"width": width, "height": 800})

    assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_a_browser_runs_nothing_of_a_page(opened):
    assert opened.title() == "tiny on validation: copydesk evaluation"
    assert opened.locator("li.wrong p").first.text_content() == HOSTILE


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_have_the_ink_of_the_text_around_them(opened, scheme):
    opened.emulate_media(color_scheme=scheme)
    ink = opened.evaluate("getComputedStyle(document.body).color")

    assert opened.locator(".reliability svg text").first.evaluate("text => getComputedStyle(text).fill") == ink
    path = opened.locator(".reliability svg [style*=currentColor]").first
    assert path.evaluate("path => getComputedStyle(path).stroke") == ink
