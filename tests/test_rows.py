"""Prepared rows are encoded with their targets, pages again as cleaned texts."""

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from copydesk.encode import Encoding, TextEncoder
from copydesk.labels import CLASSES, TopicInfo, TopicList
from copydesk.split import split
from train.rows import choose_hints, cleaned_copies, encode_rows, gold_article, load_rows, resplit

BODY, BOILERPLATE = CLASSES.index("body"), CLASSES.index("boilerplate")
PAGE = "<nav>Menu</nav><h1>Talks</h1><p>The minister said so.</p><p>The match.</p>"
TOPICS = TopicList(
    [
        TopicInfo(id="t:1", slug="politics", name="politics"),
        TopicInfo(id="t:2", slug="sport", name="sport"),
    ]
)


def page_row(**changes: Any) -> dict[str, Any]:
    return {
        "id": "p",
        "source": "mine",
        "site": "paper.com",
        "fold": 2,
        "kind": "html",
        "content": PAGE,
        "classes": [CLASSES.index(name) for name in ("boilerplate", "headline", "body", "body")],
        "topics": ["t:2"],
        "topics_known": True,
    } | changes


@pytest.fixture
def encoder(tiny_encoder) -> TextEncoder:
    return TextEncoder(Tokenizer.from_file(str(tiny_encoder / "tokenizer.json")), Encoding(max_article_tokens=64), [])


def test_a_page_whose_topics_are_known_teaches_them_as_an_article(encoder):
    article_row = {
        "id": "a",
        "site": "b.com",
        "fold": 1,
        "title": "Talks",
        "text": "Talks",
        "topics": [],
        "decided": ["t:1"],
    }
    pages, articles = encode_rows([page_row()], [article_row], encoder=encoder, topics=TOPICS)

    assert pages[0].classes.tolist() == page_row()["classes"]
    assert [(article.id, article.fold) for article in articles] == [("p", 2), ("a", 1)]
    assert [article.holds.tolist() for article in articles] == [[0, 1], [0, 0]]
    assert [article.decided.tolist() for article in articles] == [[1, 1], [1, 0]]
    assert articles[0].tokens == encoder.encode_articles([gold_article(split(PAGE), page_row()["classes"])])[0]


def test_a_page_without_known_topics_or_without_an_article_teaches_none(encoder):
    unknown = page_row(topics=[], topics_known=False)
    menu = page_row(classes=[BOILERPLATE] * 4)

    assert encode_rows([unknown, menu], [], encoder=encoder, topics=TOPICS)[1] == []


def test_the_article_of_a_page_is_its_headline_then_its_body():
    assert gold_article(split(PAGE), page_row()["classes"]) == "Talks\nThe minister said so.\nThe match."
    assert gold_article(split(PAGE), [BODY, BOILERPLATE, BODY, CLASSES.index("headline")]) == (
        "The match.\nMenu\nThe minister said so."
    )


def test_a_page_that_is_split_otherwise_than_when_it_was_prepared_is_refused():
    with pytest.raises(
        ValueError, match=r"page p has 4 sections, it was prepared with 3: run `python -m train\.prepare`"
    ):
        resplit(page_row(classes=[BODY] * 3))


def test_rows_of_a_stage_that_has_not_run_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run `python -m train\.prepare`"):
        load_rows(tmp_path, "pages", "train")


def test_hints_are_what_enough_sites_use():
    rows = [
        page_row(site=f"{name}.com", content=f"<p class='lead {name}'>a</p>", classes=[BOILERPLATE]) for name in "abc"
    ]
    rows += [page_row(site="a.com", content="<div class=box>a</div>", classes=[BOILERPLATE])] * 3

    assert choose_hints(rows, min_sites=3) == ["0:p", "1:body", "own:lead"]
    assert set(choose_hints(rows, min_sites=1)) >= {"0:div", "own:box"}


def test_cleaned_copies_hold_what_matters_as_text_and_at_times_only_its_beginning(encoder):
    row = page_row(
        content="".join(f"<p>{word}</p>" for word in ["Menu"] * 40 + ["Talks"] + ["The minister."] * 20 + ["Offer"]),
        classes=[BOILERPLATE] * 40 + [CLASSES.index("headline")] + [BODY] * 20 + [CLASSES.index("paywall")],
    )
    copies = list(cleaned_copies([row] * 400, encoder=encoder, random=np.random.default_rng(0)))

    assert all(page.cleaned and page.encoded.hint_ids.size == 0 and page.id == "p" for page in copies)
    assert all(len(page.classes) == len(page.encoded) for page in copies)
    assert np.mean([(page.classes != BOILERPLATE).all() for page in copies]) == pytest.approx(0.6, abs=0.1)
    assert max((page.classes == BOILERPLATE).sum() for page in copies) <= 10
    whole = [page for page in copies if page.classes[-1] == CLASSES.index("paywall")]
    assert len(whole) / 400 == pytest.approx(0.5, abs=0.07)
    assert {len(page.classes) for page in copies if len(page.classes) < 13} == set(range(1, 13))


def test_a_page_without_an_article_has_no_cleaned_copy(encoder):
    menu = page_row(classes=[BOILERPLATE] * 4)

    assert list(cleaned_copies([menu] * 20, encoder=encoder, random=np.random.default_rng(0))) == []
