"""No article twice, no site on two sides, the same splits every time."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import pytest

from copydesk.labels import CLASSES
from copydesk.split import split
from train.config import Experiment, Prepare
from train.prepare import (
    ALWAYS_TRAIN,
    ARTICLE_FEATURES,
    PAGE_FEATURES,
    SPLITS,
    LeakageError,
    Row,
    assign_splits,
    drop_duplicates,
    find_leaks,
    prepare,
)
from train.rows import load_rows
from train.sources.articles import LabelledArticle
from train.sources.pages import AnnotatedPage, Annotation

TOPICS = """
topics:
- {id: "t:1", slug: politics, name: politics}
- {id: "t:2", slug: polls, name: polls, parent: "t:1"}
- {id: "t:3", slug: sport, name: sport}
"""


def words(start: int, count: int = 60) -> str:
    """Return running text in which no word comes twice."""
    return " ".join(f"word{i}" for i in range(start, start + count))


def article(identity: str, text: str, *, site: str = "paper.com", weak: bool = False) -> Row:
    item = LabelledArticle(
        id=identity, source="rows", site=site, title="", text=text, language="en", topics=[], decided=[], weak=weak
    )
    return Row(item, site, text)


def page(identity: str, text: str, *, site: str = "paper.com", label: str = "body", source: str = "mine") -> Row:
    annotation = Annotation.model_construct(page=identity, site=site, language="en", genre="news", topics=[], url="")
    raw = split(text, kind="text")
    return Row(AnnotatedPage(annotation, source, text, raw, [CLASSES.index(label)] * len(raw.sections)), site, text)


def kept_of(*rows: Row, similarity: float = 0.8) -> list[str]:
    return [row.id for row in drop_duplicates(rows, similarity=similarity)[0]]


def test_of_the_same_article_twice_the_first_is_kept():
    kept, duplicates = drop_duplicates(
        [article("a", words(0)), article("b", words(100)), article("c", words(0).upper())], similarity=0.8
    )

    assert [row.id for row in kept] == ["a", "b"]
    assert duplicates == [("c", "a")]


def test_an_article_with_a_few_other_words_is_the_same_article():
    # 96 of the 104 5-grams that either has are in both
    assert kept_of(article("a", words(0, 104)), article("b", words(4, 104))) == ["a"]


def test_an_article_that_shares_half_of_its_words_is_another_one():
    assert kept_of(article("a", words(0, 100)), article("b", words(50, 100))) == ["a", "b"]


def test_the_similarity_decides_exactly():
    # 92 shared 5-grams of 108: 0.852
    rows = article("a", words(0, 104)), article("b", words(8, 104))

    assert kept_of(*rows, similarity=0.85) == ["a"]
    assert kept_of(*rows, similarity=0.86) == ["a", "b"]


def test_no_pair_just_above_the_limit_is_missed():
    # 89 shared 5-grams of 111: 0.802
    starts = range(0, 40_000, 400)
    rows = [article(f"{name}{i}", words(i + 11 * (name == "b"), 104)) for name in "ab" for i in starts]

    assert kept_of(*rows) == [f"a{i}" for i in starts]


def test_short_texts_are_the_same_only_where_all_words_are():
    rows = [article("a", "Mayor wins"), article("b", "mayor WINS!"), article("c", "Mayor loses")]

    assert kept_of(*rows) == ["a", "c"]


def test_a_judged_article_wins_over_a_weak_one_wherever_it_stands():
    weak, judged = article("weak", words(0), weak=True), article("judged", words(0))

    assert kept_of(weak, judged) == kept_of(judged, weak) == ["judged"]


def test_a_page_wins_over_an_article():
    assert kept_of(article("judged", words(0)), page("page", words(0))) == ["page"]


def test_rows_keep_their_order():
    assert kept_of(article("b", words(0), weak=True), article("a", words(100)), page("c", words(200))) == [
        "b",
        "a",
        "c",
    ]


def settings(**changes: Any) -> Prepare:
    return Prepare.model_validate(
        {"topics": "topics.yaml", "pages": [], "test_fraction": 0.2, "num_folds": 4, "large_site_rows": 20} | changes
    )


def many_sites(count: int = 40, rows_each: int = 3) -> list[Row]:
    return [
        page(f"{site}-{i}", words(1_000 * site + 100 * i), site=f"site{site}.com", label=("body", "paywall")[site % 2])
        for site in range(count)
        for i in range(rows_each)
    ]


def places(rows: list[Row]) -> dict[str, tuple[str, int]]:
    return {row.id: (row.split, row.fold) for row in rows}


def test_every_site_stands_in_one_split_and_one_fold():
    rows = many_sites()
    assign_splits(rows, settings=settings())

    where: dict[str, set] = {}
    for row in rows:
        where.setdefault(row.site, set()).add((row.split, row.fold))
    assert all(len(found) == 1 for found in where.values())


def test_pages_and_articles_of_one_site_stand_together():
    rows = many_sites(20) + [article(f"a{i}", words(50_000 + 100 * i), site=f"site{i}.com") for i in range(20)]
    assign_splits(rows, settings=settings())

    split_of_site = {row.site: row.split for row in rows[:60]}
    assert all(row.split == split_of_site[row.site] for row in rows[60:])


def test_folds_part_all_but_test_and_fold_zero_is_validation():
    rows = many_sites()
    assign_splits(rows, settings=settings())

    assert {row.fold for row in rows if row.split == "test"} == {ALWAYS_TRAIN}
    assert {row.fold for row in rows if row.split == "validation"} == {0}
    assert {row.fold for row in rows if row.split == "train"} == {1, 2, 3}


def test_splits_have_about_the_shares_asked_for():
    rows = many_sites(100, 2)
    assign_splits(rows, settings=settings())

    shares = {name: sum(row.split == name for row in rows) / len(rows) for name in SPLITS}
    assert shares == pytest.approx({"train": 0.6, "validation": 0.2, "test": 0.2}, abs=0.03)


def test_each_split_has_its_share_of_pages_with_paywall_text():
    rows = many_sites()
    assign_splits(rows, settings=settings())

    for name in SPLITS:
        chosen = [CLASSES.index("paywall") in row.item.classes for row in rows if row.split == name]
        assert sum(chosen) / len(chosen) == pytest.approx(0.5, abs=0.15)


def test_a_large_site_is_always_trained_on():
    rows = many_sites(10) + [article(f"wire-{i}", words(90_000 + 100 * i), site="wire.com") for i in range(21)]
    for seed in range(3):
        assign_splits(rows, settings=settings(seed=seed))
        assert {(row.split, row.fold) for row in rows if row.site == "wire.com"} == {("train", ALWAYS_TRAIN)}


def test_splits_depend_on_the_seed_and_on_nothing_else():
    first, again, shuffled, other = many_sites(), many_sites(), many_sites()[::-1], many_sites()
    assign_splits(first, settings=settings())
    assign_splits(again, settings=settings())
    assign_splits(shuffled, settings=settings())
    assign_splits(other, settings=settings(seed=1))

    assert places(first) == places(again) == places(shuffled)
    assert places(first) != places(other)


def placed(row: Row, split_name: str) -> Row:
    row.split = split_name
    return row


def test_clean_splits_have_no_leak():
    rows = many_sites()
    assign_splits(rows, settings=settings())

    assert find_leaks(rows, similarity=0.8) == []


def test_a_site_in_two_splits_is_a_leak():
    rows = [placed(article("a", words(0)), "train"), placed(article("b", words(100)), "test")]

    assert find_leaks(rows, similarity=0.8) == ["site paper.com is in test and train"]


def test_an_article_in_two_splits_is_a_leak():
    rows = [
        placed(article("a", words(0, 104), site="a.com"), "train"),
        placed(article("b", words(4, 104), site="b.com"), "test"),
    ]

    assert find_leaks(rows, similarity=0.8) == ["b (test) is a near-duplicate of a (train)"]


def test_a_leak_is_found_though_a_copy_in_its_own_split_stands_before():
    # b is like a and like c, but a and c are less alike than the limit.
    rows = [
        placed(article("a", words(0, 104), site="a.com"), "train"),
        placed(article("b", words(8, 104), site="b.com"), "train"),
        placed(article("c", words(16, 104), site="c.com"), "test"),
    ]

    assert find_leaks(rows, similarity=0.8) == ["c (test) is a near-duplicate of b (train)"]


def annotate(name: str, text: str, *, site: str, topics: list[str] | None = None, folder: str = "mine") -> None:
    Path(folder).mkdir(exist_ok=True)
    Path(folder, f"{name}.txt").write_text(f"Menu\n{text}\n", "utf-8")
    characters = "Menu" + "".join(text.split())
    row = {
        "page": f"{folder}/{name}",
        "site": site,
        "file": f"{name}.txt",
        "characters": len(characters),
        "characters_sha256": sha256(characters.encode()).hexdigest(),
        "topics": topics,
        "spans": [[0, 4, "boilerplate"], [4, len(characters), "body"]],
    }
    with Path(f"{folder}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write pages of twelve sites, articles of twelve more, and one of each kind of fault."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("topics.yaml").write_text(TOPICS, "utf-8")
    for i in range(12):
        annotate(f"page{i}", words(1_000 * i), site=f"site{i}.com", topics=(["t:2"], [], None)[i % 3])
    rows = [
        {
            "id": f"a{i}",
            "url": f"https://wire{i}.com/x",
            "title": "T",
            "text": words(50_000 + 1_000 * i),
            "topics": ["t:3"],
        }
        for i in range(12)
    ]
    rows.append(rows[0] | {"id": "copy", "url": "https://other.com/x"})
    rows.append(rows[0] | {"id": "bad", "text": words(900_000), "topics": ["t:9"]})
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    with Path("mine.jsonl").open("a", encoding="utf-8") as file:
        file.write("{\n")


def experiment(**changes: Any) -> Experiment:
    return Experiment.model_validate(
        {
            "name": "tiny",
            "prepare": {
                "topics": "topics.yaml",
                "pages": [{"name": "mine", "annotations": "mine.jsonl", "folder": "mine"}],
                "articles": [{"name": "rows", "path": "rows.jsonl"}],
                "test_fraction": 0.2,
                "num_folds": 4,
            }
            | changes,
            "fit": {"kind": "baseline"},
        }
    )


@pytest.mark.usefixtures("sources")
def test_the_report_counts_what_was_read_kept_and_set_aside():
    report = prepare(experiment())

    assert report == json.loads(Path("data/prepared/tiny/report.json").read_text("utf-8"))
    assert sum(counts["pages"] for counts in report["splits"].values()) == 12
    assert sum(counts["articles"] for counts in report["splits"].values()) == 12
    assert sum(counts["sites"] for counts in report["splits"].values()) == 24
    assert sum(counts["sections"]["body"] for counts in report["splits"].values()) == 12
    assert sum(counts["pages_with"]["boilerplate"] for counts in report["splits"].values()) == 12
    assert sum(counts["topics"]["sport"] for counts in report["splits"].values()) == 12
    assert sum(counts["topics"]["politics"] for counts in report["splits"].values()) == 4  # implied by polls
    assert report["folds"]["0"] == report["splits"]["validation"]
    assert report["quarantined"] == {"mine": 1, "rows": 1}
    assert [entry["row"] for entry in report["quarantine"]] == ["mine.jsonl:13", "rows.jsonl row 14"]
    assert report["duplicates"] == [{"dropped": "copy", "kept": "a0"}]
    assert report["leaks"] == []


@pytest.mark.usefixtures("sources")
def test_splits_are_written_with_the_columns_that_training_reads():
    prepare(experiment())

    for name in SPLITS:
        pages, articles = (load_rows(experiment().prepared, kind, name) for kind in ("pages", "articles"))
        assert pages.features == PAGE_FEATURES
        assert articles.features == ARTICLE_FEATURES
        assert (len(pages), len(articles)) != (0, 0)
    row = pages[0]
    index = int(row["id"].removeprefix("mine/page"))
    assert row["content"] == f"Menu\n{words(1_000 * index)}\n"
    assert row["classes"] == [CLASSES.index("boilerplate"), CLASSES.index("body")]
    assert row["topics"] == (["t:1", "t:2"], [], [])[index % 3]
    assert row["topics_known"] == (index % 3 != 2)


@pytest.mark.usefixtures("sources")
def test_preparing_twice_writes_the_same_bytes():
    def files() -> dict[str, bytes]:
        prepare(experiment())
        return {path.as_posix(): path.read_bytes() for path in sorted(Path("data/prepared/tiny").rglob("*.*"))}

    assert files() == files()


@pytest.mark.usefixtures("sources")
def test_aliases_and_mapped_publishers_keep_one_publisher_in_one_split():
    rows = [
        {"id": f"b{i}", "source": f"Paper {i}", "title": "T", "text": words(500_000 + 1_000 * i), "topics": []}
        for i in range(12)
    ]
    Path("publishers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    publishers = {
        "name": "publishers",
        "path": "publishers.jsonl",
        "publisher_column": "source",
        "sites": {f"Paper {i}": f"site{i}.com" for i in range(12)},
    }
    changed = experiment(
        articles=[{"name": "rows", "path": "rows.jsonl"}, publishers],
        site_aliases={f"wire{i}.com": f"site{i}.com" for i in range(12)},
    )

    report = prepare(changed)
    assert sum(counts["sites"] for counts in report["splits"].values()) == 12
    for name in SPLITS:
        sites = {row["site"] for kind in ("pages", "articles") for row in load_rows(changed.prepared, kind, name)}
        pages = {row["id"].removeprefix("mine/page") for row in load_rows(changed.prepared, "pages", name)}
        articles = [row["id"] for row in load_rows(changed.prepared, "articles", name)]
        assert sites == {f"site{i}.com" for i in pages}
        assert {identity[1:] for identity in articles} == pages
        assert len(articles) == 2 * len(pages)


@pytest.mark.usefixtures("sources")
def test_a_planted_leak_stops_the_stage_after_the_report_is_written(monkeypatch: pytest.MonkeyPatch):
    def split_badly(rows: list[Row], *, settings: Prepare) -> None:
        assign_splits(rows, settings=settings)
        rows[0].site = rows[1].site = "one.com"
        rows[0].split, rows[1].split = "train", "test"

    monkeypatch.setattr("train.prepare.assign_splits", split_badly)
    with pytest.raises(LeakageError, match=r"1 leak\(s\) across splits, the first: site one\.com is in test and train"):
        prepare(experiment())
    assert len(json.loads(Path("data/prepared/tiny/report.json").read_text("utf-8"))["leaks"]) == 1


@pytest.mark.usefixtures("sources")
def test_nothing_but_bad_pages_is_refused_with_the_first_reasons():
    Path("mine.jsonl").write_text("{\n", "utf-8")

    with pytest.raises(ValueError, match=r"no annotated page can be used \(2 bad rows: .*JSON"):
        prepare(experiment())


@pytest.mark.usefixtures("sources")
def test_articles_may_be_left_out():
    report = prepare(experiment(articles=[]))

    assert sum(counts["articles"] for counts in report["splits"].values()) == 0
    assert len(load_rows(experiment().prepared, "articles", "train")) == 0


@pytest.mark.usefixtures("sources")
def test_a_source_may_measure_and_not_train():
    prepare(experiment())
    whole = {split: load_rows(experiment().prepared, "pages", split)["id"] for split in SPLITS}
    report = prepare(
        experiment(
            pages=[{"name": "mine", "annotations": "mine.jsonl", "folder": "mine", "only_evaluate": True}],
        )
    )

    assert report["splits"]["train"]["pages"] == 0
    assert report["splits"]["train"]["articles"] > 0
    for split_name in ("validation", "test"):
        assert list(load_rows(experiment().prepared, "pages", split_name)["id"]) == list(whole[split_name])
