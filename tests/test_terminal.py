import re
from io import StringIO

import pytest
from rich.console import Console

from copydesk.page import FailedPage, ModelInfo, Page, Scores, Section, Topic
from copydesk.terminal import show_pages


def page_of(text: str, *, label: str = "body", role: str | None = None) -> Page:
    scores = Scores(body=1, boilerplate=0, paywall=0, sponsored=0)
    section = Section(text=text, label=label, role=role, score=1, scores=scores, start=0, end=len(text))
    topics = [
        Topic(id="medtop:20000638", name="international relations", score=0.934),
        Topic(id="medtop:11000000", name="politics", score=0.934, implied=True),
    ]
    info = ModelInfo(name="tiny", version="0")
    return Page(source="p.html", text=text, headline=None, body=text, sections=[section], topics=topics, model=info)


def shown(*pages: Page | FailedPage, terminal: bool, width: int = 80) -> str:
    stream = StringIO()
    color = "standard" if terminal else None
    show_pages(pages, Console(file=stream, force_terminal=terminal, color_system=color, width=width, highlight=False))
    return stream.getvalue()


def test_text_keeps_each_section_on_one_line_where_nobody_watches():
    assert "body         " + "word " * 99 + "end\n" in shown(page_of("word " * 99 + "end"), terminal=False)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_text_wraps_beside_the_margin_in_a_terminal(width, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown(page_of("word " * 99), terminal=True, width=width))

    lines = [line for line in plain.splitlines() if line.endswith("word")]
    assert max(map(len, lines)) <= min(width, 100)
    assert all(line.startswith(" " * 13 + "word") for line in lines[1:])


def test_topics_show_their_score_and_whether_they_are_implied():
    text = shown(page_of("x"), terminal=False)

    assert "topics       0.93  international relations  medtop:20000638\n" in text
    assert "             0.93  politics  medtop:11000000  implied by a narrower topic\n" in text


def test_a_headline_is_bold_and_boilerplate_dim_without_colour_too(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")

    text = shown(page_of("News", role="headline"), page_of("Share", label="boilerplate"), terminal=True)

    assert "\x1b[1mNews\x1b[0m" in text
    assert "\x1b[2mShare\x1b[0m" in text
    assert "\x1b[3" not in text.replace("\x1b[2;3m", "")


def test_a_page_cannot_talk_to_the_terminal():
    page = page_of("a\x1b]0;owned\x07b\x9b31mc \u202egnp [red]markup[/red]\nnext")

    text = shown(page, FailedPage(source="\x1b[2J.html", error="x\x1b"), terminal=False)

    assert "[red]markup[/red] next" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
