"""Annotations meet their pages, articles their topics; what does not fit is named, never dropped in silence."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from copydesk.labels import CLASSES, TopicInfo, TopicList
from copydesk.split import split
from train.config import ArticleSource, PageSource
from train.sources.articles import LabelledArticle, read_articles, read_topics, site_of
from train.sources.pages import AnnotatedPage, Annotation, BadRow, classes_of, read_pages

PAGE = "<body><nav>Home</nav><h1>Mayor wins</h1><p>He won by two.</p><p>Subscribe now</p></body>"
SPANS = [[0, 4, "boilerplate"], [4, 13, "headline"], [13, 24, "body"], [24, 36, "paywall"]]
MINE = PageSource(name="mine", annotations=Path("mine.jsonl"), folder=Path("mine"))
TOPICS = TopicList(
    [
        TopicInfo(id="t:1", slug="politics", name="politics"),
        TopicInfo(id="t:2", slug="polls", name="polls", parent="t:1"),
        TopicInfo(id="t:3", slug="sport", name="sport"),
    ]
)


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("mine").mkdir()
    Path("mine/mayor.html").write_text(PAGE, "utf-8")


def annotation(content: str = PAGE, **changes: Any) -> dict[str, Any]:
    characters = "".join("".join(text.split()) for text in split(content, kind="html").texts())
    return {
        "page": "mine/mayor",
        "site": "paper.example",
        "characters": len(characters),
        "characters_sha256": hashlib.sha256(characters.encode()).hexdigest(),
        "topics": ["t:2"],
        "spans": SPANS,
    } | changes


def pages_from(*annotations: dict[str, Any] | str) -> list[AnnotatedPage | BadRow]:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in annotations]
    Path("mine.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return list(read_pages(MINE, TOPICS))


def reason_of(row: dict[str, Any] | str) -> str:
    (bad,) = pages_from(row)
    assert isinstance(bad, BadRow), "the row was taken"
    assert (bad.source, bad.row) == ("mine", "mine.jsonl:1")
    return bad.reason


def test_each_section_of_a_page_has_the_class_of_its_span():
    (page,) = pages_from(annotation())

    assert page.raw.texts() == ["Home", "Mayor wins", "He won by two.", "Subscribe now"]
    assert [CLASSES[label] for label in page.classes] == ["boilerplate", "headline", "body", "paywall"]
    assert page.article() == ("Mayor wins", "He won by two.")


def test_a_section_takes_the_class_that_covers_most_of_it():
    read = Annotation.model_validate(annotation() | {"spans": [[0, 7, "body"], [7, 36, "paywall"]]})

    assert [CLASSES[label] for label in classes_of(read, [10, 10, 16])] == ["body", "paywall", "paywall"]
    assert [CLASSES[label] for label in classes_of(read, [20, 16])] == ["paywall", "paywall"]


def test_spans_that_part_one_section_in_three_are_added_up():
    spans = [[0, 4, "body"], [4, 9, "paywall"], [9, 12, "body"], [12, 36, "boilerplate"]]
    read = Annotation.model_validate(annotation() | {"spans": spans})

    assert CLASSES[classes_of(read, [12, 24])[0]] == "body"  # 4 + 3 against 5


@pytest.mark.parametrize(
    "spans",
    [
        [[0, 4, "boilerplate"], [5, 36, "body"]],
        [[0, 5, "boilerplate"], [4, 36, "body"]],
        [[1, 36, "body"]],
        [[0, 35, "body"]],
        [[0, 37, "body"]],
        [[0, 36, "body"], [36, 36, "paywall"]],
        [],
    ],
    ids=["gap", "overlap", "late start", "early end", "late end", "empty span", "none"],
)
def test_spans_that_do_not_cover_the_page_are_a_bad_row(spans):
    assert "without gaps from 0 to characters=36" in reason_of(annotation(spans=spans))


def test_a_label_of_another_vocabulary_is_a_bad_row():
    told = reason_of(annotation(spans=[[0, 4, "menu"], [4, 36, "body"]]))

    assert "unknown labels ['menu']" in told
    assert ", ".join(CLASSES) in told


def test_a_page_that_changed_since_it_was_annotated_is_a_bad_row():
    Path("mine/mayor.html").write_text(PAGE.replace("two", "ten"), "utf-8")

    told = reason_of(annotation())
    assert "mine/mayor has other characters" in told
    assert annotation()["characters_sha256"][:12] in told


def test_white_space_may_change_since_a_page_was_annotated():
    Path("mine/mayor.html").write_text(PAGE.replace(" by two", "\n  by\ttwo").replace("<p>", "\n\n<p> "), "utf-8")

    (page,) = pages_from(annotation())
    assert isinstance(page, AnnotatedPage)


def test_an_annotation_without_its_page_is_a_bad_row():
    assert "page mine/absent is not in mine" in reason_of(annotation(page="mine/absent"))


def test_an_unknown_topic_is_a_bad_row():
    assert "unknown topic 't:9'" in reason_of(annotation(topics=["t:9"]))


def test_a_row_that_lacks_fields_names_them_all():
    told = reason_of({"page": "mine/mayor", "spans": SPANS})

    for field in ("site", "characters", "characters_sha256"):
        assert f"{field}: Field required" in told


def test_a_row_that_is_no_json_is_a_bad_row():
    assert "JSON" in reason_of('{"page": ')


def test_bad_rows_do_not_stop_the_good_ones():
    rows = pages_from(annotation(), "", "{", annotation(), annotation(page="mine/absent"))

    assert [type(row).__name__ for row in rows] == ["AnnotatedPage", "BadRow", "BadRow", "BadRow"]
    assert [row.row for row in rows[1:]] == ["mine.jsonl:3", "mine.jsonl:4", "mine.jsonl:5"]
    assert "occurs twice" in rows[2].reason


def test_a_line_in_another_encoding_is_a_bad_row():
    lines = [annotation(), annotation(page="mine/Zürich"), annotation(page="mine/other", file="mayor.html")]
    encodings = ["utf-8", "latin-1", "utf-8"]
    Path("mine.jsonl").write_bytes(
        b"\n".join(
            json.dumps(row, ensure_ascii=False).encode(encoding) for row, encoding in zip(lines, encodings, strict=True)
        )
    )

    good, bad, also_good = read_pages(MINE, TOPICS)
    assert [good.annotation.page, also_good.annotation.page] == ["mine/mayor", "mine/other"]
    assert bad.row == "mine.jsonl:2"
    assert "is no UTF-8" in bad.reason


def test_a_byte_order_mark_and_line_ends_of_windows_do_no_harm():
    Path("mine.jsonl").write_text(json.dumps(annotation()) + "\r\n\r\n", "utf-8-sig")

    (page,) = read_pages(MINE, TOPICS)
    assert isinstance(page, AnnotatedPage)


@pytest.mark.parametrize("name", ["mayor.html.gz", "mayor.txt", "mayor.txt.gz", "deep/elsewhere.html"])
def test_a_page_is_found_under_each_name_that_the_data_card_lists(name):
    Path("mine/mayor.html").unlink()
    path = Path("mine", name)
    path.parent.mkdir(exist_ok=True)
    content = "\n".join(split(PAGE, kind="html").texts()) if ".txt" in name else PAGE
    path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())

    (page,) = pages_from(annotation(file=name))
    assert isinstance(page, AnnotatedPage), page
    assert page.raw.kind == ("text" if ".txt" in name else "html")


def test_a_packed_page_that_is_broken_is_a_bad_row():
    Path("mine/mayor.html").unlink()
    Path("mine/mayor.html.gz").write_bytes(gzip.compress(PAGE.encode())[:-12])

    assert reason_of(annotation())


def test_topics_that_were_not_judged_stay_unknown():
    unjudged, none = pages_from(annotation(topics=None), annotation(page="mine/other", file="mayor.html", topics=[]))

    assert unjudged.annotation.topics is None
    assert none.annotation.topics == []


def test_a_missing_annotation_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        list(read_pages(PageSource(name="mine", annotations=Path("absent.jsonl"), folder=Path("mine")), TOPICS))


GOOD = {"id": "a", "url": "https://news.paper.com/1", "title": "Mayor wins", "text": "By two.", "topics": ["t:2"]}


def write_jsonl(*rows: dict[str, Any]) -> str:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return "rows.jsonl"


def articles_from(*rows: dict[str, Any], **settings: Any) -> list[LabelledArticle | BadRow]:
    source = ArticleSource.model_validate({"name": "rows", "path": write_jsonl(*rows)} | settings)
    return list(read_articles(source, TOPICS))


def test_an_article_carries_its_topics_with_their_parents():
    (article,) = articles_from(GOOD)

    assert (article.id, article.source, article.site) == ("a", "rows", "paper.com")
    assert (article.title, article.text) == ("Mayor wins", "By two.")
    assert article.topics == ["t:1", "t:2"]
    assert article.decided == ["t:1", "t:2", "t:3"]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_json_lines_and_parquet_hold_the_same_articles(ending):
    path = Path(f"stored{ending}")
    if ending == ".parquet":
        datasets.Dataset.from_list([GOOD, GOOD | {"id": "b"}]).to_parquet(path)
    else:
        text = "".join(json.dumps(row) + "\n" for row in (GOOD, GOOD | {"id": "b"})).encode()
        path.write_bytes(gzip.compress(text) if ending.endswith(".gz") else text)

    read = list(read_articles(ArticleSource(name="rows", path=str(path)), TOPICS))
    assert read == articles_from(GOOD, GOOD | {"id": "b"})


def test_a_label_map_turns_labels_of_any_kind_into_topics():
    Path("map.yaml").write_text('"1": ["t:3"]\n2: ["t:2"]\nother: []\n', "utf-8")
    Path("map.json").write_text('{"1": ["t:3"], "2": ["t:2"], "other": []}', "utf-8")
    numbers = [{"text": "x", "label": 1}, {"text": "y", "label": 2}]
    words = [{"text": "x", "label": ["1", "2"]}, {"text": "y", "label": ["other"]}]
    columns = {"labels_column": "label", "title_column": None, "label_map": "map.yaml"}

    assert [row.topics for row in articles_from(*numbers, **columns)] == [["t:3"], ["t:1", "t:2"]]
    assert [row.topics for row in articles_from(*words, **columns)] == [["t:1", "t:2", "t:3"], []]
    assert articles_from(*words, **columns | {"label_map": "map.json"}) == articles_from(*words, **columns)


def test_a_label_that_the_map_lacks_is_a_bad_row():
    Path("map.yaml").write_text("known: [t:3]\n", "utf-8")

    good, bad = articles_from(GOOD | {"topics": ["known"]}, GOOD | {"topics": ["known", "new"]}, label_map="map.yaml")
    assert good.topics == ["t:3"]
    assert "labels ['new'] are not in the label map" in bad.reason


def test_a_label_map_to_an_unknown_topic_is_refused_at_once():
    Path("map.yaml").write_text("known: [t:9]\n", "utf-8")

    with pytest.raises(ValueError, match=r"map\.yaml maps 'known' to \['t:9'\]: unknown topic 't:9'"):
        articles_from(GOOD, label_map="map.yaml")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("- sport\n", "holds list"),
        ("", "holds NoneType"),
        ("sport:\n", "maps 'sport' to None"),
        ("sport: t:3\n", "maps 'sport' to 't:3'"),
        ("sport: [3]\n", "maps 'sport' to [3]"),
        ("sport: {a: b}\n", "maps 'sport' to {'a': 'b'}"),
        ("sport: [\n", "cannot be read"),
    ],
)
def test_a_label_map_of_another_form_is_refused_with_what_was_expected(content, reason):
    Path("map.yaml").write_text(content, "utf-8")

    with pytest.raises(
        ValueError, match=r"(?s)the label map map\.yaml .*Expected a list of topic ids for each"
    ) as refused:
        articles_from(GOOD, label_map="map.yaml")
    assert reason in str(refused.value)


def test_a_source_decides_only_what_it_can_and_what_it_says():
    (nothing,) = articles_from(GOOD | {"topics": []}, decidable=["t:3"])
    (polls,) = articles_from(GOOD, decidable=["t:3"])

    assert (nothing.topics, nothing.decided) == ([], ["t:3"])
    assert (polls.topics, polls.decided) == (["t:1", "t:2"], ["t:1", "t:2", "t:3"])


def test_an_unknown_decidable_topic_is_refused_at_once():
    with pytest.raises(ValueError, match="unknown topic 't:9'"):
        articles_from(GOOD, decidable=["t:9"])


def test_of_publishers_sections_only_the_positive_is_known():
    (article,) = articles_from(GOOD, only_positive=True)

    assert article.decided == article.topics == ["t:1", "t:2"]


@pytest.mark.parametrize(
    ("row", "settings", "site"),
    [
        ({"url": "https://www.news.paper.co.uk/1"}, {}, "paper.co.uk"),
        ({"url": "https://localhost/1"}, {}, "localhost"),
        ({"url": None, "source": "The Paper"}, {"publisher_column": "source"}, "The Paper"),
        ({"url": None, "source": "bbc"}, {"publisher_column": "source", "sites": {"bbc": "bbc.com"}}, "bbc.com"),
        ({"url": "https://bbc.co.uk/1", "source": "x"}, {"publisher_column": "source"}, "bbc.co.uk"),
        ({"url": None}, {}, "rows"),
        ({"url": "no address"}, {"sites": {"rows": "wire.example"}}, "wire.example"),
    ],
)
def test_the_site_comes_from_the_address_else_from_the_publisher(row, settings, site):
    (article,) = articles_from(GOOD | row, **settings)

    assert article.site == site


def test_the_site_of_an_address_is_its_registrable_domain():
    assert site_of("https://edition.cnn.com/a") == "cnn.com"
    assert site_of("http://127.0.0.1:8000/a") == "127.0.0.1"


def test_under_a_suffix_that_no_list_knows_the_site_is_the_last_two_labels():
    # The default rule of publicsuffix.org: else www.X and X, as the sample's pages name it, are two sites.
    assert site_of("https://harwickcourier.test/a") == "harwickcourier.test"
    assert site_of("https://www.harwickcourier.test/a") == "harwickcourier.test"


def test_rows_without_an_id_are_numbered_within_their_source():
    rows = [{key: value for key, value in GOOD.items() if key != "id"}] * 2

    assert [row.id for row in articles_from(*rows)] == ["rows-0", "rows-1"]


def test_a_source_over_its_budget_is_sampled_at_random_but_always_alike():
    rows = [GOOD | {"id": str(i), "title": "", "text": "word " * 80} for i in range(50)]  # 100 tokens each

    sample = articles_from(*rows, max_tokens=1_000)
    assert len(sample) == 10
    assert [row.id for row in sample] != [str(i) for i in range(10)]
    assert sample == articles_from(*rows, max_tokens=1_000)
    assert {row.id for row in articles_from(*rows, max_tokens=500)} < {row.id for row in sample}
    assert len(articles_from(*rows, max_tokens=1_000_000)) == 50


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text": None}, "column text holds 'None'"),
        ({"text": " ", "title": ""}, "column text holds ' '"),
        ({"topics": None}, "column topics holds None"),
        ({"topics": ["t:9"]}, "unknown topic 't:9'"),
        ({"url": "http://[::1"}, "Invalid IPv6 URL"),
    ],
)
def test_a_bad_article_is_named_by_its_row_and_the_others_are_read(change, reason):
    good, bad, also_good = articles_from(GOOD, GOOD | change, GOOD)

    assert good == also_good
    assert (bad.source, bad.row) == ("rows", "rows.jsonl row 2")
    assert reason in bad.reason


def test_a_title_that_is_no_text_is_a_bad_row():
    (bad,) = articles_from(GOOD | {"title": 1984})

    assert isinstance(bad, BadRow)


def test_missing_columns_are_named_beside_those_that_are_there():
    with pytest.raises(ValueError, match=r"lacks the columns \['body', 'section'\], it has .*'text'"):
        articles_from(GOOD, text_column="body", labels_column="section")


def test_a_missing_article_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl.*prepare\.articles=\[\]"):
        list(read_articles(ArticleSource(name="rows", path="absent.jsonl"), TOPICS))


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "rows.JSONL", "rows"])
def test_a_file_with_another_ending_is_refused_and_not_looked_for_on_the_hub(name):
    Path(name).write_text(json.dumps(GOOD), "utf-8")

    with pytest.raises(
        ValueError, match=rf"rows: {name} is no file whose name ends in \.jsonl, \.jsonl\.gz, \.parquet"
    ):
        list(read_articles(ArticleSource(name="rows", path=name), TOPICS))


def test_a_file_that_cannot_be_parsed_is_refused_with_who_names_the_row():
    Path("broken.jsonl").write_text(json.dumps(GOOD) + "\n{broken\n", "utf-8")

    with pytest.raises(ValueError, match=r"broken\.jsonl cannot be read.*train\.check"):
        list(read_articles(ArticleSource(name="rows", path="broken.jsonl"), TOPICS))


def test_the_shipped_topic_list_has_the_topics_of_the_data_card():
    topics = read_topics(Path(__file__).parents[1] / "data" / "topics.yaml")

    assert len(topics) == 28
    assert topics.with_parents(["medtop:20000638"]) == ["medtop:11000000", "medtop:20000638"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "list indices"),
        ("topics: [{id: a}]", "slug"),
        ("topics: [{id: a, slug: a, name: a, parent: b}]", "names the parent b"),
        ("topics: [{id: a, slug: a, name: a, parent: b}, {id: b, slug: b, name: b, parent: a}]", "form a circle"),
        ("topics: [{id: a, slug: a, name: a}, {id: a, slug: b, name: b}]", "occurs twice"),
        ("topics: [", "flow"),
    ],
)
def test_a_topic_list_that_cannot_be_used_says_why(content, reason):
    Path("topics.yaml").write_text(content, "utf-8")

    with pytest.raises(ValueError, match=r"topics\.yaml cannot be used") as refused:
        read_topics(Path("topics.yaml"))
    assert reason in str(refused.value)
