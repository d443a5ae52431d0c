"""What must not change the answers of the model that the repository ships: invariances (CheckList style)."""

import html
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from copydesk import Page
from copydesk.predictor import Precision, Predictor, load, native_bfloat16
from tests.model.pages import BODY, HEADLINE, MENU, PAGE, page_with

ROOT = Path(__file__).parents[2]
OFFER = "<p>You have 1 free article left. Subscribe for $2 a week.</p>"
ADVERTORIAL = (
    "<aside class='sponsored-box'><p>Advertisement</p><h4>Sponsored content by Nordlys Outdoor</h4>"
    "<p>The Nordlys storm jacket keeps you dry for less than you think. Buy now for $89 "
    "at nordlys-outdoor.test</p></aside>"
)
COMMENT = "<div class='comment'><p>harbourrat</p><p>About time. My uncle lost a whole season over this.</p></div>"
BASE = page_with(COMMENT + OFFER + ADVERTORIAL)
Change = Callable[[str], str]
IN_BFLOAT16 = pytest.mark.skipif(
    not native_bfloat16(torch.device("cpu")), reason="this processor does not multiply bfloat16"
)


def swap(*pairs: tuple[str, str]) -> Change:
    """Return what replaces texts by others."""

    def change(page: str) -> str:
        for old, new in pairs:
            assert old in page
            page = page.replace(old, new)
        return page

    return change


CHANGES: dict[str, Change] = {
    "another country": swap(("Storvik", "Belmora")),
    "two other countries and another port": swap(
        ("Storvik", "Tamura"), ("Kelland", "Quistan"), ("Hvalnes", "Port Ayo")
    ),
    "another minister": swap(("Aurel Brandt", "Naledi Okoro")),
    "another writer": swap(("Ingrid Halloway", "Tomasz Wiśniewski")),
    "another paper": swap(("Tarn Valley Press", "The Meridian Post")),
    "another day and year": swap(("Tuesday", "Friday"), ("2023", "2019"), ("3 March 2026", "28 October 2021")),
    "another price": swap(("$2 a week", "€7.50 a month")),
    "another number": swap(("1 free article left", "4 free articles left")),
    "another seller": swap(("Nordlys Outdoor", "Halden Cookware"), ("Nordlys storm jacket", "Halden steel pan")),
    "straight quotes": swap(("“", '"'), ("”", '"'), ("’", "'")),
    "soft hyphens": swap(("fishing", "fish\u00ading"), ("agreement", "agree\u00adment")),
    "no-break spaces": swap(("<p>The", "<p>\u00a0The"), ("a week", "a\u00a0week")),
    "entities": swap(("“", "&ldquo;"), ("”", "&rdquo;"), ("’", "&#8217;"), ("©", "&copy;")),
    "upper-case menu": swap(("Business", "BUSINESS"), ("Subscribe</a>", "SUBSCRIBE</a>"), ("Sign in", "SIGN IN")),
    "generated class names": swap(("<p>", "<p class='css-1x2y3z'>")),
    "residue in attributes": swap(("<main>", "<main id='content' data-page='{{pageId}}'>")),
    "a container more": swap(("<main>", "<div class='wrapper'><div><main>"), ("</main>", "</main></div></div>")),
    "no semantic containers": lambda page: re.sub(r"<(/?)(?:article|main|header|aside)\b", r"<\1div", page),
    "upper-case tags": lambda page: re.sub(r"<(/?)(p|div|li|ul|h1)\b", lambda m: f"<{m[1]}{m[2].upper()}", page),
    "one line": lambda page: page.replace("\n", ""),
    "indented, CRLF": lambda page: page.replace("><", ">\r\n    <"),
    "scripts, styles and comments": swap(
        ("</h1>", "</h1><script>var paywall = {limit: 5, offer: 'Subscribe now'};</script><!-- ad slot 3 -->"),
        ("<body>", "<body><style>.paywall{display:none}</style>"),
    ),
    "icons that are no text": swap(("<time>", "<svg><title>clock</title><path d='M0 0'/></svg><time>")),
    "a title and a language": swap(("<html>", f"<html lang='en'><head><title>{HEADLINE} | Tarn Valley</title></head>")),
    "links in the text": swap(("recalled their ambassadors", "<a href='/2023/07/net'>recalled their ambassadors</a>")),
    "words in bold and italics": swap(("coastguard", "<em>coastguard</em>"), ("treaty on", "<b>treaty</b> on")),
    "tracking in links": swap(("href='/about'", "href='/about?utm_source=foot&amp;utm_medium=web'")),
}


def answers(page: Page) -> list[str]:
    return [str(section.label) for section in page.sections]


def test_at_most_2_of_100_sections_of_any_label_flip(desk: Predictor):
    before, *after = desk.predict([BASE, *(change(BASE) for change in CHANGES.values())])
    assert set(answers(before)) == {"body", "boilerplate", "paywall", "sponsored"}
    labels, flips, said = Counter(answers(before)), Counter[str](), []
    for name, page in zip(CHANGES, after, strict=True):
        assert len(page.sections) == len(before.sections), name
        changed = [
            (new.text, str(old.label), str(new.label))
            for old, new in zip(before.sections, page.sections, strict=True)
            if old.label != new.label
        ]
        flips.update(old for _, old, _ in changed)
        if changed:
            said.append(f"{name}: {changed}")

    assert len(CHANGES) >= 20
    assert all(flips[label] <= 0.02 * len(CHANGES) * count for label, count in labels.items()), "\n".join(said)


@pytest.mark.parametrize(
    "name",
    [
        "another country",
        "two other countries and another port",
        "another minister",
        "another writer",
        "straight quotes",
        "soft hyphens",
        "no-break spaces",
        "generated class names",
        "residue in attributes",
        "one line",
    ],
)
def test_names_punctuation_and_class_names_change_no_label_and_no_topic(desk: Predictor, name: str):
    before, after = desk.predict([BASE, CHANGES[name](BASE)])

    assert answers(before) == answers(after)
    assert [topic.id for topic in before.topics] == [topic.id for topic in after.topics]


def test_icon_names_glued_to_a_menu_leave_it_a_menu(desk: Predictor):
    page = BASE.replace(">World<", ">chevron-downWorld<").replace(">Sign in<", ">user-iconSign in<")

    found = {section.text: str(section.label) for section in desk.predict_one(page).sections}
    assert found["chevron-downWorld"] == found["user-iconSign in"] == "boilerplate"


def test_moving_an_advertorial_box_leaves_the_body_as_it_is(desk: Predictor):
    paragraphs = [f"<p>{text}</p>" for text in BODY]
    pages = [
        PAGE.format(
            menu=MENU, headline=HEADLINE, extra="", body="".join([*paragraphs[:at], ADVERTORIAL, *paragraphs[at:]])
        )
        for at in range(1, len(paragraphs) + 1)
    ]

    for page in desk.predict(pages):
        assert page.body.split("\n\n") == list(BODY)
        assert [str(s.label) for s in page.sections if "Nordlys" in s.text] == ["sponsored", "sponsored"]


def sample_pages() -> list[bytes]:
    """Return the English HTML pages of the sample that is for tests: no model is trained on it."""
    rows = [json.loads(line) for line in (ROOT / "data/sample/annotations.jsonl").read_text("utf-8").splitlines()]
    names = [row["page"].removeprefix("sample/") for row in rows if row["language"] == "en"]
    files = [path for name in names if (path := ROOT / "data/sample/pages" / f"{name}.html").is_file()]
    assert len(files) > 20
    return [path.read_bytes() for path in files]


def test_the_pages_of_the_sample_read_alike_as_html_and_as_text(desk: Predictor):
    pages = desk.predict(sample_pages(), kind="html")
    as_text = desk.predict([page.text for page in pages], kind="text")
    total = same = 0
    for page, other in zip(pages, as_text, strict=True):
        labels = {section.start: section.label for section in other.sections}
        total += len(page.sections)
        same += sum(labels.get(section.start) == section.label for section in page.sections)

    assert same / total >= 0.9


def test_a_page_without_its_tags_keeps_the_labels(desk: Predictor):
    """Each section is a `<div>` of its own: no tag, class or link says what it is."""
    pages = desk.predict(sample_pages(), kind="html")
    flat = ["".join(f"<div>{html.escape(section.text)}</div>" for section in page.sections) for page in pages]
    without = desk.predict(flat, kind="html")
    total = same = 0
    for page, other in zip(pages, without, strict=True):
        if len(page.sections) == len(other.sections):  # else a text was cut elsewhere
            total += len(page.sections)
            same += sum(a.label == b.label for a, b in zip(page.sections, other.sections, strict=True))

    assert total > 500
    assert same / total >= 0.9


@pytest.mark.parametrize("precision", ["auto", pytest.param("bfloat16", marks=IN_BFLOAT16)])
def test_a_page_reads_the_same_in_any_company(precision: Precision):
    desk = load(ROOT / "models" / "released", precision=precision)
    files = sorted((ROOT / "data" / "sample" / "pages").glob("*/*.html"))[::3]
    pages = [path.read_text("utf-8") for path in files]
    together = desk.predict(pages)
    remembered = desk.predict(pages[::-1])[::-1]

    for page, one, other in zip(pages, together, remembered, strict=True):
        desk.memory.clear()
        alone = desk.predict_one(page)
        for company in (one, other):
            assert answers(company) == answers(alone)
            for found, expected in zip(company.sections, alone.sections, strict=True):
                assert found.scores.model_dump() == pytest.approx(expected.scores.model_dump(), abs=2e-4)
