"""What users may expect of the model that the repository ships: minimum functions and invariances (CheckList style).

All texts are written for these tests; nothing here is trained on.
"""

import json
from pathlib import Path

import pytest

import copydesk
from copydesk import Page
from copydesk.predictor import Predictor

ROOT = Path(__file__).parents[2]
MENU = "".join(f"<li><a href='/{word.lower()}'>{word}</a></li>" for word in "World Business Sport Opinion".split())
PAGE = """<html><body>
<header><nav><ul>{menu}<li><a href='/subscribe'>Subscribe</a></li><li><a href='/login'>Sign in</a></li></ul></nav>
</header>
<main><article>
<h1>{headline}</h1>
<p class='byline'>By Ingrid Halloway</p><time>3 March 2026</time>
{body}
{extra}
</article></main>
<footer><ul><li><a href='/about'>About us</a></li><li><a href='/advertise'>Advertise with us</a></li>
<li><a href='/privacy'>Privacy policy</a></li></ul><p>© 2026 Tarn Valley Press. All rights reserved.</p></footer>
</body></html>"""
HEADLINE = "Storvik and Kelland sign treaty on shared fishing waters"
BODY = tuple(
    " ".join(paragraph.split())
    for paragraph in """
The foreign ministers of Storvik and Kelland signed a treaty on Tuesday that ends nine years of quarrels over the
cod banks between the two countries.

Under the agreement, boats from both nations may fish the northern bank from April to September, and a joint
commission will set quotas each winter.

“Neither side got all it wanted, which is how we know it is a treaty,” Kelland’s foreign minister, Aurel Brandt,
told reporters at the signing in the port of Hvalnes.

The two governments had recalled their ambassadors in 2023, after a coastguard vessel cut the nets of a trawler.
Diplomats said that the embassies would open again within a month.

Fishermen’s unions in both countries gave the text a cautious welcome and asked for inspectors at every landing.
""".split("\n\n")
)


@pytest.fixture(scope="module")
def desk() -> Predictor:
    return copydesk.load(ROOT / "models" / "released", device="cpu")


def page_with(extra: str = "", *, headline: str = HEADLINE, body: tuple[str, ...] = BODY) -> str:
    return PAGE.format(menu=MENU, headline=headline, body="".join(f"<p>{text}</p>" for text in body), extra=extra)


def labels_of(page: Page) -> dict[str, str]:
    return {section.text: str(section.label) for section in page.sections}


def test_a_plain_article_is_read_whole(desk):
    page = desk.predict_one(page_with())

    assert page.headline == HEADLINE
    assert page.body.split("\n\n") == list(BODY)
    assert "international relations" in [topic.name for topic in page.topics]


def test_subscribe_and_advertise_in_menus_of_a_free_page_are_furniture(desk):
    page = desk.predict_one(page_with())

    furniture = [section for section in page.sections if "Subscribe" in section.text or "Advertise" in section.text]
    assert furniture
    assert {str(section.label) for section in furniture} == {"boilerplate"}
    assert {str(section.label) for section in page.sections} == {"body", "boilerplate"}


OFFERS = [
    "You have {count} free articles left this month. Subscribe for {price} a week.",
    "Subscribe to continue reading. Unlimited access for {price} a month, cancel anytime.",
    "This article is for subscribers only. Start your trial: {count} weeks for {price}.",
]


@pytest.mark.parametrize("price", ["$1", "£4.99", "€9.90", "12 kr", "Rs 199"])
@pytest.mark.parametrize("count", ["2", "three"])
def test_an_offer_is_a_paywall_whatever_its_price_currency_and_number(desk, price, count):
    texts = [offer.format(price=price, count=count) for offer in OFFERS]
    pages = desk.predict([page_with(f"<div><p>{text}</p></div>") for text in texts])

    found = [labels_of(page)[text] for page, text in zip(pages, texts, strict=True)]
    assert found.count("paywall") >= 2, dict(zip(texts, found, strict=True))


@pytest.mark.parametrize(
    "text",
    [
        "Sign up for our free newsletter and get the day’s stories each morning.",
        "Photo: Liv Sandmo / Tarn Valley Press",
        "Ingrid Halloway covers the northern seas. She joined the paper in 2014.",
        "Share this article on social media",
    ],
)
def test_furniture_beneath_an_article_is_not_body(desk, text):
    assert labels_of(desk.predict_one(page_with(f"<div><p>{text}</p></div>")))[text] == "boilerplate"


ADVERTORIAL = (
    "<aside class='sponsored-box'><p>Advertisement</p><h4>Sponsored content by Nordlys Outdoor</h4>"
    "<p>The Nordlys storm jacket keeps you dry for less than you think. Buy now for $89 "
    "at nordlys-outdoor.test</p></aside>"
)


def test_an_advertorial_box_is_sponsored_and_moving_it_leaves_the_body_as_it_is(desk):
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


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Storvik", "Belmora"),
        ("Kelland", "Quistan"),
        ("Aurel Brandt", "Naledi Okoro"),
        ("“", '"'),
        ("’", "'"),
        ("fishing", "fish\u00ading"),
        ("<p>The", "<p>\u00a0The"),
        ("<p>", "<p class='css-1x2y3z'>"),
        ("<main>", "<main id='content' data-page='{{pageId}}'>"),
    ],
)
def test_names_quotes_and_class_names_change_no_label(desk, old, new):
    html = page_with("<p>You have 1 free article left. Subscribe for $2 a week.</p>")
    before, after = desk.predict([html, html.replace(old, new)])

    assert [s.label for s in before.sections] == [s.label for s in after.sections]
    assert [t.id for t in before.topics] == [t.id for t in after.topics]


def test_the_pages_of_the_sample_read_alike_as_html_and_as_text(desk):
    annotations = [
        json.loads(line) for line in (ROOT / "data/sample/annotations.jsonl").read_text("utf-8").splitlines()
    ]
    names = [row["page"].removeprefix("sample/") for row in annotations if row["language"] == "en"]
    files = [path for name in names if (path := ROOT / "data/sample/pages" / f"{name}.html").is_file()]
    pages = desk.predict([path.read_bytes() for path in files], kind="html")
    as_text = desk.predict([page.text for page in pages], kind="text")
    total = same = 0
    for page, other in zip(pages, as_text, strict=True):
        labels = {s.start: s.label for s in other.sections}
        total += len(page.sections)
        same += sum(labels.get(s.start) == s.label for s in page.sections)

    assert len(files) > 20
    assert same / total >= 0.9
