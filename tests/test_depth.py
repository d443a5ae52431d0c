import pytest

from copydesk.page import PageError
from copydesk.split import Limits, split

DEEP = r"nests elements more than 10,000 deep, which is the limit: check for unclosed tags, or raise max_depth"


def texts_of(source: str, *, max_depth: int) -> list[str]:
    return split(source, kind="html", limits=Limits(max_depth=max_depth)).texts()


def test_unclosed_divs_are_refused_at_once(within):
    with within(2), pytest.raises(PageError, match=DEEP):
        split("<div>" * 20_000 + "a", kind="html")


@pytest.mark.parametrize("tag", ["p", "li", "td", "dd", "br"])
def test_unclosed_elements_that_close_each_other_are_answered(tag, within):
    with within(10):
        page = split(("<table><tr>" if tag == "td" else "") + f"<{tag}>a" * 20_000, kind="html")

    assert set(page.text.split()) == {"a"}


def test_a_page_just_below_the_depth_limit_is_read():
    assert texts_of("<div>" * 90 + "a" + "</div>" * 90, max_depth=90) == ["a"]


def test_many_closed_elements_beside_each_other_are_not_deep():
    assert len(texts_of("<div><i>a</i></div>" * 200, max_depth=100)) == 200


@pytest.mark.parametrize(
    "content",
    [
        "<script>'{}'</script>",
        "<SCRIPT src=x>'{}'</script >",
        "<style>{}</style>",
        "<!-- {} -->",
    ],
)
def test_tags_that_are_never_read_add_no_depth(content):
    filled = content.format("<div>" * 200)

    assert texts_of(f"<p>a</p>{filled}<p>b</p>", max_depth=100) == ["a", "b"]


def test_void_and_self_closing_elements_of_a_drawing_add_no_depth():
    drawing = "<svg>" + "<path d='M0 0'/>" * 200 + "</svg>"

    assert texts_of(f"{drawing}{'<br>' * 200}{'<img src=x />' * 200}a", max_depth=100) == ["a"]


@pytest.mark.parametrize(
    "source",
    [
        "<div/>" * 500,  # HTML knows no self-closing div
        "<div></x>" * 500,  # an end tag that closes nothing
        "<!-->" + "<div>" * 500 + "-->",  # HTML ends this comment at once
        "<p title='<!--'>" + "<div>" * 500 + "-->",
        "<textarea><!--</textarea>" + "<div>" * 500 + "-->",
        "<p title='<script>'>" + "<div>" * 500 + "</script>",
        "<b>" * 500,
    ],
    ids=["self-closing", "strayed end tags", "empty comment", "in an attribute", "in raw text", "script", "inline"],
)
def test_no_way_of_writing_a_deep_page_escapes_the_limit(source):
    with pytest.raises(PageError, match="more than 100 deep"):
        split(f"<html>{source}", kind="html", limits=Limits(max_depth=100))


def test_formatting_that_would_be_opened_again_too_often_is_refused_at_once(within):
    opened = "".join(f"<b id={number}>" for number in range(2_000))

    with within(2), pytest.raises(PageError, match=r"opened again more than 500,000 times.*close its <b>"):
        split(f"<p>{opened}</p>{'<p>a' * 2_000}", kind="html")


@pytest.mark.parametrize(
    "source",
    ["<p><a name=x>a</p>" * 10_001, "<font size=1><p>a</p>" * 5_000, "<p><b id=1>a</b></p>" * 20_000],
    ids=["links close each other", "three equal ones are opened again", "closed"],
)
def test_formatting_that_is_hardly_opened_again_is_answered(source, within):
    with within(10):
        assert set(split(source, kind="html").texts()) == {"a"}
