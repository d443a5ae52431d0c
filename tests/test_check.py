import gzip
import json
from pathlib import Path

import pytest

from copydesk.labels import TopicInfo, TopicList
from train.check import check_articles, check_pages, kind_of, main, new_annotation
from train.config import ArticleSource, PageSource

ROOT = Path(__file__).parents[1]
PAGE = "<body><nav><a>Home</a></nav><h1>Mayor  wins</h1><p>He won\u00a0by two.</p><p>Subscribe to read on</p></body>"
TOPICS = TopicList(
    [
        TopicInfo(id="t:1", slug="politics", name="politics"),
        TopicInfo(id="t:2", slug="polls", name="polls", parent="t:1"),
    ]
)


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def page() -> Path:
    Path("mine").mkdir()
    path = Path("mine/mayor.html")
    path.write_text(PAGE, "utf-8")
    return path


def labelled(page: Path) -> dict:
    _, annotation = new_annotation(page, folder=page.parent)
    spans = [[0, 4, "boilerplate"], [4, 13, "headline"], [13, 24, "body"], [24, 41, "paywall"]]
    return annotation | {"spans": spans, "topics": ["t:2"]}


def check_mine(*annotations: dict | str):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in annotations]
    Path("mine.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return check_pages(PageSource(name="mine", annotations=Path("mine.jsonl"), folder=Path("mine")), TOPICS)


def test_sections_of_a_new_page_are_offsets_in_its_characters(page):
    sections, annotation = new_annotation(page, folder=page.parent)

    assert [(start, end, text) for start, end, _, text in sections] == [
        (0, 4, "Home"),
        (4, 13, "Mayor wins"),
        (13, 24, "He won by two."),
        (24, 41, "Subscribe to read on"),
    ]
    assert annotation["spans"] == [[0, 41, "boilerplate"]]
    assert annotation["page"] == "mine/mayor"


@pytest.mark.parametrize("name", ["a.html", "a.htm", "a.html.gz", "sub/a.html", "a.txt", "a.b.html"])
def test_a_new_annotation_is_valid_as_it_stands(name):
    path = Path("mine", name)
    path.parent.mkdir(parents=True)
    content = b"Home\n\nMayor wins" if ".txt" in name else PAGE.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    _, annotation = new_annotation(path, folder=Path("mine"))

    findings = check_mine(annotation)
    assert (findings.num_good, findings.bad) == (1, [])


def test_a_page_outside_the_folder_is_refused(page):
    Path("other").mkdir()

    with pytest.raises(ValueError, match="not in the folder other"):
        new_annotation(page, folder=Path("other"))


def test_good_pages_are_counted_by_label_and_topic(page):
    findings = check_mine(labelled(page))

    assert findings.num_good == 1
    assert findings.counts["paywall"] == {"pages": 1, "sections": 1}
    assert findings.counts["politics"] == {"pages": 1}  # implied by polls


def test_bad_annotations_are_named_by_line(page):
    good = labelled(page)
    findings = check_mine(
        good,
        "{",
        good | {"page": "mine/absent", "file": "absent.html"},
        good | {"page": "mine/mayor2", "file": "mayor.html", "spans": [[0, 4, "boilerplate"], [5, 41, "body"]]},
        good | {"page": "mine/mayor3", "file": "mayor.html", "topics": ["t:9"]},
        good | {"page": "mine/mayor4", "file": "mayor.html", "characters_sha256": "0" * 64},
    )

    assert findings.num_good == 1
    assert [row.row for row in findings.bad] == [f"mine.jsonl:{line}" for line in (2, 3, 4, 5, 6)]
    assert "without gaps" in findings.bad[2].reason
    assert "unknown topic 't:9'" in findings.bad[3].reason


def check_rows(text: str):
    Path("rows.jsonl").write_text(text, "utf-8")
    return check_articles(ArticleSource(name="rows", path="rows.jsonl"), TOPICS)


def test_bad_articles_are_named_by_line_though_blank_and_broken_lines_stand_between():
    good = {"id": "1", "title": "Mayor wins", "text": "He won by two.", "topics": ["t:2"]}
    lines = [
        good,
        "",
        "{broken",
        good | {"id": "2", "topics": ["t:9"]},
        "[]",
        "",
        good | {"id": "3", "text": " ", "title": ""},
    ]
    findings = check_rows("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))

    assert findings.num_good == 1
    assert {row.row for row in findings.bad} == {f"rows.jsonl:{line}" for line in (3, 4, 5, 7)}
    assert findings.counts["politics"] == {"yes": 1}


def test_articles_count_what_is_unknown_apart_from_what_is_not():
    Path("rows.jsonl").write_text(json.dumps({"id": "1", "title": "A", "text": "B", "topics": []}) + "\n", "utf-8")
    source = ArticleSource(name="rows", path="rows.jsonl", decidable=["t:1"])

    assert check_articles(source, TOPICS).counts == {"politics": {"no": 1}, "polls": {"unknown": 1}}


def test_a_file_of_broken_lines_only_has_no_good_row():
    findings = check_rows("{\n")

    assert (findings.num_good, len(findings.bad)) == (0, 1)


def test_the_kind_of_a_file_is_told_by_its_first_sound_row():
    Path("a.jsonl").write_text('{broken\n{"text": "x", "topics": []}\n')
    Path("p.jsonl").write_text('\n{"page": "x", "spans": []}\n')

    assert [kind_of(Path(name)) for name in ("a.jsonl", "p.jsonl", "x.parquet")] == ["articles", "pages", "articles"]


def test_the_shipped_sample_passes(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    main(["data/sample/annotations.jsonl", "data/sample/articles.jsonl", "--pages", "data/sample/pages"])

    assert capsys.readouterr().out.count(" 0 bad") == 2


def test_the_command_ends_with_status_1_and_names_the_row(page, capsys):
    check_mine(labelled(page) | {"spans": []})

    with pytest.raises(SystemExit) as end:
        main(["mine.jsonl", "--pages", "mine", "--topics", str(ROOT / "data" / "topics.yaml")])
    assert end.value.code == 1
    assert "mine.jsonl:1" in capsys.readouterr().out


def test_the_annotation_of_a_new_page_stands_alone_on_standard_output(page, capsys):
    main(["--new", str(page)])

    printed = capsys.readouterr()
    assert json.loads(printed.out)["characters"] == 41
    assert "h1: Mayor wins" in printed.err


def test_the_command_wants_something_to_check():
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
