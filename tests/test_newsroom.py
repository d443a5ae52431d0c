"""Composed pages: labels exact, the same from a seed, families and sites never on two sides of a split."""

from collections import Counter
from pathlib import Path
from random import Random

import pytest
import yaml

from copydesk.labels import CLASSES
from copydesk.split import split
from train.arguments import load_experiment
from train.config import NewsroomSource
from train.prepare import Row, assign_splits, drop_duplicates, find_leaks
from train.sources.articles import read_topics
from train.sources.composer import compose_pages, spans_of
from train.sources.material import NUM_GROUPS
from train.sources.newsroom import Newsroom, NewsroomError, blocks_of
from train.sources.roundups import Roundup, blocks_of_roundup
from train.sources.tables import MAX_CELLS, Table, blocks_of_table
from train.sources.variation import reshaped, retagged

ROOT = Path(__file__).parent.parent
TOPICS = read_topics(ROOT / "data" / "topics.yaml")
CORPUS = ROOT / "data" / "newsroom"

SITE = """{#
name: The Gullwick Post
domain: gullwickpost.test
city: Gullwick
paywall: meter
#}
<html><body><nav><a href="/">Home</a> <a href="/join">Subscribe</a></nav>
{% macro show(piece) %}<div class="x" data-label="{{ piece.label }}">{% for line in piece.lines %}<p
>{{ line.text }}</p>{% endfor %}</div>{% endmacro %}
{% for place in ["top", "above", "cut", "after", "side", "bottom"] %}
{% for piece in at(place) %}{{ show(piece) }}{% endfor %}{% endfor %}
<h1 data-label="headline">{{ article.headline }}</h1>
{% for block in article.blocks %}<p data-label="body">{{ block.html }}</p>
{% for piece in at("inline") %}{{ show(piece) }}{% endfor %}{% endfor %}
<p data-label="paywall">Our own offer</p><p data-label="sponsored">Our own sponsor</p>
{% for teaser in teasers(2) %}<p{% if teaser.ad %} data-label="sponsored"{% endif %}
>{{ teaser.headline }}</p>{% endfor %}
{% for comment in comments(1) %}<p>{{ comment.text }}</p>{% endfor %}
</body></html>
"""
ARTICLE = """---
headline: Talks & tides
form: wire report
topics: [international_relations]
author: Runa Halvorsen
date: 2026-02-18
---
First *paragraph* of the report.

Second paragraph, <b>not</b> bold.
"""


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Write a corpus of two sites, one article each, and six families of each kind."""
    for name in ("gullwick", "harwick"):
        (tmp_path / "articles" / name).mkdir(parents=True)
        (tmp_path / "articles" / name / "talks.md").write_text(ARTICLE)
        (tmp_path / "sites").mkdir(exist_ok=True)
        (tmp_path / "sites" / f"{name}.html").write_text(SITE.replace("gullwickpost", f"{name}post"))
    for label in ("paywall", "sponsored", "boilerplate"):
        (tmp_path / label).mkdir()
        for i in range(NUM_GROUPS):
            piece = f"- |\n  # {label} {i} of [[paper]]\n  > Go\n"
            places = "[top, above, inline, cut, after, side, bottom]"
            (tmp_path / label / f"{label}-{i}.yaml").write_text(f"places: {places}\npieces:\n{piece}")
    for name, text in (("comments", "A comment"), ("teasers", "# A teaser")):
        (tmp_path / "boilerplate" / f"{name}.yaml").write_text(f"places: []\npieces:\n- '{text}'\n")
    return tmp_path


def composed(folder: Path, count: int = 40, **settings) -> list:
    source = NewsroomSource(name="newsroom", newsroom=folder, num_pages=count, **settings)
    return list(compose_pages(source, TOPICS))


def test_each_section_bears_the_label_that_its_template_or_its_piece_gives_it(corpus):
    expected = {
        "Talks & tides": "headline",
        "First paragraph of the report.": "body",
        "Second paragraph, <b>not</b> bold.": "body",
        "Our own offer": "paywall",
        "Our own sponsor": "sponsored",
        "Home Subscribe": "boilerplate",
        "A comment": "boilerplate",
    }
    found: dict[str, set[str]] = {}
    for page in composed(corpus):
        for text, label in zip(page.raw.texts(), page.classes, strict=True):
            found.setdefault(text, set()).add(str(CLASSES[label]))

    assert {text: found[text] for text in expected} == {text: {label} for text, label in expected.items()}
    pieces = {text: labels for text, labels in found.items() if " of The Gullwick Post" in text}
    assert len(pieces) == 10  # all families of boilerplate, two of six of the others
    assert all(labels == {text.split()[0]} for text, labels in pieces.items())


def test_a_page_without_paywall_or_advertising_has_nothing_of_its_template_either(corpus):
    kinds = Counter(
        tuple(sorted({str(CLASSES[label]) for label in page.classes} & {"paywall", "sponsored"}))
        for page in composed(corpus, 200)
    )

    assert set(kinds) == {(), ("paywall",), ("sponsored",), ("paywall", "sponsored")}
    assert 70 < kinds["paywall",] + kinds["paywall", "sponsored"] < 130
    assert 66 < kinds["sponsored",] + kinds["paywall", "sponsored"] < 126


def test_the_same_seed_composes_the_same_pages_and_another_one_others(corpus):
    first, again, other = ([page.content for page in composed(corpus, 12, seed=seed)] for seed in (1, 1, 2))

    assert first == again
    assert first != other


def test_the_label_attributes_are_taken_out(corpus):
    assert not any("data-label" in page.content for page in composed(corpus))


def test_each_group_of_sites_has_families_of_its_own(corpus):
    families: dict[str, set[str]] = {}
    for page in composed(corpus, 100):
        texts = [text for text in page.raw.texts() if text.startswith(("paywall", "sponsored"))]
        families.setdefault(page.group, set()).update(texts)

    assert len(families) == 2
    assert not set.intersection(*families.values())


def test_pages_that_only_train_draw_from_all_families(corpus):
    pages = composed(corpus, 100, only_train=True)
    texts = {text for page in pages for text in page.raw.texts() if text.startswith("paywall")}

    assert len(texts) == NUM_GROUPS
    assert all(page.only_train and not page.group for page in pages)


def rows_of(pages: list) -> list[Row]:
    return [Row(page, page.annotation.site, "\n".join(page.article())) for page in pages]


def test_compositions_of_one_article_are_no_duplicates_of_each_other(corpus):
    (corpus / "articles" / "harwick" / "talks.md").write_text(
        ARTICLE.replace("First", "Other").replace("Talks", "Rows")
    )
    rows = rows_of(composed(corpus, 8))

    assert len(drop_duplicates(rows, similarity=0.8)[0]) == 8


def test_the_article_of_another_site_is_a_duplicate(corpus):
    for site in (corpus / "sites").iterdir():
        site.write_text(site.read_text().replace("paywall: meter", "paywall: none"))  # nothing is cut off
    kept, duplicates = drop_duplicates(rows_of(composed(corpus, 8)), similarity=0.8)

    assert len({row.site for row in kept}) == 1
    assert duplicates


def test_the_shipped_corpus_splits_without_a_leak_and_every_split_holds_paywalls_and_advertising():
    settings = load_experiment(ROOT / "configs" / "pages.yaml").prepare
    rows = rows_of(composed(CORPUS, 100))
    assign_splits(rows, settings=settings)

    assert find_leaks(rows, similarity=0.8) == []
    for name in ("train", "validation", "test"):
        found = {str(CLASSES[label]) for row in rows if row.split == name for label in row.item.classes}
        assert found == set(map(str, CLASSES))


def test_the_shipped_corpus_keeps_its_promises():
    newsroom = Newsroom(CORPUS, TOPICS)
    pieces = Counter(family.label for family in newsroom.families for _ in family.pieces)
    families = Counter(family.label for family in newsroom.families)
    articles = [article for site in newsroom.sites for article in site.articles]
    topics = Counter(topic for article in articles for topic in TOPICS.with_parents(article.topics))

    assert len(newsroom.sites) >= 20
    assert len(articles) >= 200
    assert pieces["paywall"] >= 300
    assert families["paywall"] >= 40
    assert pieces["sponsored"] >= 300
    assert pieces["boilerplate"] >= 600
    assert min(topics[topic.id] for topic in TOPICS.topics) >= 8
    assert all(150 <= len(article.markdown.split()) <= 950 for article in articles)
    assert all(900 <= len(guide.markdown.split()) <= 2_400 for guide in newsroom.guides)
    for language in {site.facts.language for site in newsroom.sites}:
        own = {family.label for family in newsroom.families if family.language == language and family.places}
        assert own == {"paywall", "sponsored", "boilerplate"}, language


def test_every_template_shows_the_whole_article():
    for page in composed(CORPUS, 50):
        labels = {str(CLASSES[label]) for label in page.classes}
        assert labels >= {"headline", "body", "boilerplate"}, page.annotation.page
        assert 90 <= len(page.classes) <= 1_000, page.annotation.page


ROUNDUP = """subject: kites
title: The two best kites
intro: [We flew them all.]
entries:
- name: Larkling
  best_for: Best in a breeze
  text: [It lifts at once.]
  facts: {Price: "$12"}
  pros: [Light]
  cons: [Loud]
- {name: Gannet, text: [It needs wind.], facts: {Price: "$30"}}
faq: [{q: "Where to fly?", a: Away from wires.}]
closing: [That is all.]
"""


TABLE = """
subject: tides
titles: [High water day by day]
intro: [Measured at the pier.]
head: Pier
first: [North, South]
second: [" Pier", " Mole"]
ranked: true
count: [3, 4]
columns:
  Height: {low: 1, high: 9, show: "{:.1f} m"}
  Kind: {choices: [spring, neap]}
notes: [Provisional.]
"""


def test_a_site_draws_what_is_of_its_language(corpus):
    site = corpus / "sites" / "harwick.html"
    site.write_text(site.read_text().replace("domain:", "language: de\npromoted: [Anzeige]\ndomain:"))
    for i in range(NUM_GROUPS):
        text = f"language: de\nplaces: [after]\npieces: [Werbung {i}]\n"
        (corpus / "sponsored" / f"werbung-{i}-de.yaml").write_text(text)
    (corpus / "boilerplate" / "comments-de.yaml").write_text("language: de\nplaces: []\npieces: [Stimmt]\n")
    (corpus / "guides").mkdir()
    (corpus / "guides" / "calm.md").write_text(GUIDE)
    texts: dict[str, set[str]] = {}
    for page in composed(corpus, 80, only_train=True):
        texts.setdefault(page.annotation.language, set()).update(page.raw.texts())

    assert texts.keys() == {"en", "de"}
    assert texts["de"] >= {"Stimmt", "Werbung 0", "Werbung 5"}
    assert not {text for text in texts["de"] if " of The Gullwick Post" in text or text == "A comment"}
    assert not texts["en"] & {"Stimmt", "Werbung 0"}
    assert {page.annotation.language for page in composed(corpus, 6, languages=["de"])} == {"de"}
    with pytest.raises(NewsroomError, match=r"no site in \['fr'\], expected some of \['de', 'en'\]"):
        composed(corpus, 4, languages=["fr"])


GUIDE = """---
headline: Kites for a calm day
form: guide
topics: [lifestyle]
date: 2026-01-01
---
Wait for the evening.
"""


def test_a_long_page_is_body_throughout_be_it_tables_chapters_or_a_round_up(corpus):
    (corpus / "roundups").mkdir()
    (corpus / "roundups" / "kites.yaml").write_text(ROUNDUP)
    (corpus / "tables").mkdir()
    (corpus / "tables" / "tides.yaml").write_text(TABLE)
    site = corpus / "sites" / "gullwick.html"
    site.write_text(site.read_text().replace("paywall: meter", "paywall: none\nlong: 1"))
    second = ARTICLE.replace("First", "Another").replace("Talks", "More talks")
    (corpus / "articles" / "gullwick" / "more.md").write_text(second)
    expected = {"It lifts at once.", "The two best kites", "More talks & tides", "Another paragraph of the report."}
    expected |= {"High water day by day", "spring"}
    found: dict[str, set[str]] = {}
    for page in composed(corpus, 60, only_train=True):
        if page.annotation.site == "gullwickpost.test":
            for text, label in zip(page.raw.texts(), page.classes, strict=True):
                found.setdefault(text, set()).add(str(CLASSES[label]))

    assert found.keys() >= expected
    assert all("body" in found[text] for text in expected)


def test_some_long_pages_show_a_guide_under_its_own_headline_and_topics(corpus):
    (corpus / "guides").mkdir()
    (corpus / "guides" / "calm.md").write_text(GUIDE)
    site = corpus / "sites" / "gullwick.html"
    site.write_text(site.read_text().replace("paywall: meter", "paywall: none\nlong: 1"))
    pages = composed(corpus, 60, only_train=True)
    guides = [page for page in pages if "Wait for the evening." in page.raw.texts()]

    assert 5 < len(guides) < 25
    for page in guides:
        labels = {text: str(CLASSES[label]) for text, label in zip(page.raw.texts(), page.classes, strict=True)}
        assert labels["Kites for a calm day"] == "headline"
        assert labels["Wait for the evening."] == "body"
        assert "First paragraph of the report." not in labels
        assert page.annotation.topics == ["medtop:10000000"]
    assert {page.work for page in guides} == {"newsroom/guides/calm"}
    assert drop_duplicates(rows_of(guides), similarity=0.8)[1] == []


def test_round_ups_take_many_shapes_but_keep_every_word():
    roundup = Roundup.model_validate(yaml.safe_load(ROUNDUP))
    shapes = [blocks_of_roundup(roundup, Random(seed)) for seed in range(40)]

    texts = [
        " ".join(map(str, [block.html, *block.items, *(cell for row in block.rows for cell in row)]))
        for blocks in shapes
        for block in blocks
    ]
    assert {block.kind for blocks in shapes for block in blocks} == {"p", "h2", "ul", "table"}
    assert all(any(word in text for text in texts) for word in ("Larkling", "$30", "Loud", "Away from wires.", "all."))
    assert len({len(blocks) for blocks in shapes}) > 5


def test_tables_take_many_shapes_and_show_other_numbers_each_time():
    table = Table.model_validate(yaml.safe_load(TABLE))
    shapes = [blocks_of_table(table, Random(seed)) for seed in range(40)]

    def texts(blocks: list) -> list[str]:
        return [
            str(text)
            for block in blocks
            for text in ([*block.items, *(cell for row in block.rows for cell in row)] or [block.html])
        ]

    assert {block.kind for blocks in shapes for block in blocks} == {"p", "h2", "ul", "table"}
    assert len({tuple(texts(blocks)) for blocks in shapes}) == 40
    assert all(any("Mole" in text or "Pier" in text for text in texts(blocks)) for blocks in shapes)
    assert all(any(" m" in text for text in texts(blocks)) for blocks in shapes)
    series = Table.model_validate(yaml.safe_load(TABLE) | {"months": True, "count": [900, 900], "ranked": False})
    sizes = {len(texts(blocks_of_table(series, Random(seed)))) for seed in range(20)}
    assert all(MAX_CELLS / 4 < size <= 2 * MAX_CELLS for size in sizes)


def test_reshaped_articles_keep_their_words():
    blocks = blocks_of("One went up. Two came down. *Three* stayed.\n\nFour left at noon. Five did not.\n\n- six")
    shapes = [reshaped(blocks, Random(seed)) for seed in range(60)]

    def words(shape: list) -> str:
        return " ".join(str(part) for block in shape for part in (block.items or [block.html]))

    assert {words(shape) for shape in shapes} == {words(blocks)}
    assert {len(shape) for shape in shapes} == {3, 4}
    assert any(shape[1].kind == "ul" for shape in shapes)


def test_retagged_pages_keep_their_text_and_labels():
    html = '<body><nav class="x">a</nav><h2 data-label="body">b</h2><p data-label="body">c</p><pre>d</pre></body>'
    pages = {retagged(html, Random(seed)) for seed in range(200)}

    assert {tuple(spans_of(page)) for page in pages} == {((0, 1, "boilerplate"), (1, 3, "body"), (3, 4, "boilerplate"))}
    assert len(pages) > 8
    assert any("<h4" in page for page in pages)
    assert any('<div data-label="body">c</div>' in page for page in pages)


def test_blocks_of_markdown():
    blocks = blocks_of("a *b*\n\n## c\n\n- d\n- e\n\n1. f\n\n> g\n\n| h | i |\n|---|---|\n| j | k |\n")

    assert [block.kind for block in blocks] == ["p", "h2", "ul", "ul", "quote", "table"]
    assert [str(blocks[i].html) for i in (0, 1, 4)] == ["a <em>b</em>", "c", "g"]
    assert blocks[2].items == ["d", "e"]
    assert blocks[5].rows == [["h", "i"], ["j", "k"]]


def test_spans_cover_the_characters_that_the_splitter_sees():
    html = "<body>a<p data-label='body'>b c<script>x</script><b data-label='paywall'>d</b></p> e</body>"

    assert spans_of(html) == [(0, 1, "boilerplate"), (1, 3, "body"), (3, 4, "paywall"), (4, 5, "boilerplate")]
    assert sum(len(text.replace(" ", "")) for text in split(html, kind="html").texts()) == 5


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("sites/gullwick.html", "<html></html>", "sites/gullwick.html"),
        ("sites/gullwick.html", SITE.replace("meter", "toll"), "paywall"),
        ("sites/gullwick.html", SITE.replace("{% endmacro %}", ""), "gullwick.html"),
        ("sites/gullwick.html", SITE.replace("article.headline", "article.title"), "gullwick.html, article talks"),
        ("sites/gullwick.html", SITE.replace('"headline"', '"heading"'), "data-label is 'heading'"),
        ("articles/gullwick/talks.md", "no front matter", "talks.md"),
        ("articles/gullwick/talks.md", ARTICLE.replace("international_relations", "gossip"), "unknown topics"),
        ("articles/gullwick/talks.md", ARTICLE.replace("headline", "title"), "headline"),
        ("guides/calm.md", GUIDE.replace("form: guide", ""), "calm.md"),
        ("roundups/kites.yaml", ROUNDUP.replace("title", "heading"), "kites.yaml"),
        (
            "tables/tides.yaml",
            TABLE.replace("first: [North, South]", ""),
            r"(?s)tides\.yaml: .*it has neither months nor first",
        ),
        ("tables/tides.yaml", TABLE.replace("{:.1f} m", "{:d} m"), "tides.yaml"),
        ("tables/tides.yaml", TABLE.replace("[3, 4]", "[4, 3]"), "count is .4, 3."),
        ("paywall/paywall-0.yaml", "pieces: [a]", "paywall-0.yaml: expected `places` and `pieces`"),
        ("paywall/paywall-0.yaml", "places: [under]\npieces: [a]", "unknown places"),
        ("paywall/paywall-0.yaml", "places: [top]\npieces: ['']", "piece 0 is empty"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(corpus, file, content, message):
    (corpus / file).parent.mkdir(exist_ok=True)
    (corpus / file).write_text(content)

    with pytest.raises(NewsroomError, match=message):
        composed(corpus, 4)


def test_a_corpus_without_sites_is_refused(tmp_path):
    with pytest.raises(NewsroomError, match="no site"):
        composed(tmp_path)
