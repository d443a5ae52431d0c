import json

import pytest
from pydantic import ValidationError

from copydesk.labels import SectionLabel
from copydesk.page import FailedPage, ModelInfo, Page, PageError, Scores, Section, Topic

PAGE = Page(
    source="a.html",
    url="https://example.org/a",
    text="Ein Tor.\nMehr “lesen” 😀",
    headline=None,
    body="Ein Tor.",
    sections=[
        Section(
            text="Ein Tor.",
            label=SectionLabel.BODY,
            score=0.9,
            scores=Scores(body=0.9, boilerplate=0.1, paywall=0.0, sponsored=0.0),
            start=0,
            end=8,
            tag="body>p",
        )
    ],
    topics=[Topic(id="medtop:15000000", name="sport", score=0.75, implied=True)],
    model=ModelInfo(name="tiny", version="0123456789ab"),
)


def test_a_page_survives_json():
    assert Page.model_validate_json(PAGE.model_dump_json()) == PAGE


def test_labels_are_plain_words_in_json():
    assert json.loads(PAGE.model_dump_json())["sections"][0]["label"] == "body"


def test_scores_have_a_field_for_each_label_in_label_order():
    assert list(Scores.model_fields) == list(SectionLabel)


def test_a_page_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        PAGE.body = ""


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("summary",), "x"),
        (("sections", 0, "label"), "headline"),
        (("sections", 0, "role"), "byline"),
        (("sections", 0, "start"), -1),
        (("sections", 0, "scores", "headline"), 0.1),
        (("model", "run"), "x"),
        (("body",), None),
    ],
)
def test_what_the_schema_does_not_know_is_refused(path, value):
    content = json.loads(PAGE.model_dump_json())
    part = content
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value

    with pytest.raises(ValidationError, match=str(path[-1])):
        Page.model_validate(content)


def test_the_schema_explains_its_fields():
    properties = Page.model_json_schema()["properties"]

    assert "start` and `end` of sections index" in properties["text"]["description"]


def test_a_failed_page_is_told_from_a_page_by_its_error():
    assert FailedPage(source=None, error="too long").model_dump() == {"source": None, "error": "too long"}


def test_a_page_error_is_a_value_error():
    assert issubclass(PageError, ValueError)
