import html
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from selectolax.lexbor import LexborHTMLParser

from copydesk.detect import decode_bytes
from copydesk.hints import MAX_OUTER_HINTS
from copydesk.page import PageError
from copydesk.split import Limits, split

GENERATED = settings(
    max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
HIDDEN = "script style noscript template svg head iframe object canvas math textarea select datalist".split()
BLOCKS = "div p article section h1 h3 ul li table tr td blockquote pre form custom-tag details".split()
INLINES = "a b span em i strong font label time small code u".split()
SNIPPETS = "a|to be. |é|日本。| |\n|\t|\xa0|\u2028|\x1c|\x85|&amp;|&#0;|\u200b".split("|")


def characters(source: str) -> str:
    """Read a page's characters as data/README.md defines them."""
    return max((characters_of(LexborHTMLParser(source, scripting=scripting)) for scripting in (False, True)), key=len)


def characters_of(tree: LexborHTMLParser) -> str:
    found, stack = [], [tree.body]
    while stack:
        node = stack.pop()
        if node is None or node.tag in HIDDEN:
            continue
        if node.tag == "-text":
            found.append(bare(node.text_content or ""))
            continue
        children, child = [], node.child
        while child is not None:
            children.append(child)
            child = child.next
        stack.extend(reversed(children))
    return "".join(found)


def bare(text: str) -> str:
    return re.sub(r"\s", "", text)


def assert_partition(page, expected: str) -> None:
    texts = page.texts()
    assert bare("".join(texts)) == expected
    assert bare(page.text) == expected
    end = 0
    for section, text in zip(page.sections, texts, strict=True):
        assert end <= section.start < section.end
        assert text == text.strip() != ""
        assert len(text) <= 1_000
        assert bare(page.text[end : section.start]) == ""
        end = section.end


def words(**limits) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(SNIPPETS), **limits).map("".join)


def element(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    def written(tag: str, attributes: str, content: list[str], *, closed: bool) -> str:
        return f"<{tag}{attributes}>{''.join(content)}" + (f"</{tag}>" if closed else "")

    return st.builds(
        written,
        st.sampled_from(BLOCKS + INLINES) | st.sampled_from(HIDDEN),
        st.sampled_from(["", " class='lead adBox'", " hidden", " style='display:none'", " id=x role=main", " /"]),
        st.lists(children, max_size=5),
        closed=st.integers(0, 4).map(bool),
    )


LEAVES = (
    words(max_size=12)
    | st.sampled_from(["<br>", "<br/>", "<hr>", "<img alt='x'>", "<!-- a -->", "<!--", "-->", "<![CDATA[x]]>"])
    | st.sampled_from(["</p>", "</div>", "</body>", "</html>", "<body class=x>", "<frameset>", "<title>t</title>"])
    | st.integers(300, 1_500).map(lambda count: "ab " * (count // 3))
    | st.integers(990, 1_010).map(lambda count: "b" * count)
)
MARKUP = st.lists(st.recursive(LEAVES, element, max_leaves=25), max_size=6).map("".join)
ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates too


@GENERATED
@given(MARKUP)
def test_sections_partition_the_characters_of_any_html_tree(source):
    page = split(source, kind="html")

    assert page.kind == "html"
    assert_partition(page, characters(source))


@GENERATED
@given(st.text(ANY_CHARACTER, max_size=200) | st.lists(MARKUP | st.text(ANY_CHARACTER), max_size=5).map("".join))
def test_sections_partition_any_text_that_is_read_as_html(source):
    valid = re.sub("[\ud800-\udfff]", "\ufffd", source)

    assert_partition(split(source, kind="html"), characters(valid))


@GENERATED
@given(st.text(ANY_CHARACTER) | words(min_size=300, max_size=1_500) | MARKUP)
def test_plain_text_comes_back_unchanged_and_its_sections_partition_it(source):
    page = split(source, kind="text")

    assert page.text == re.sub("[\ud800-\udfff]", "\ufffd", source)
    assert_partition(page, bare(page.text))


@GENERATED
@given(
    st.binary(max_size=200)
    | st.lists(
        st.binary(max_size=4) | st.sampled_from([b"<p>", b"</p>", b"<div>", b"<meta charset=koi8-r>", b"\xe9", b"caf"]),
        max_size=20,
    ).map(b"".join)
)
def test_sections_partition_any_bytes(source):
    page = split(source)
    text = decode_bytes(source)

    assert_partition(page, characters(text) if page.kind == "html" else bare(text))


@GENERATED
@given(MARKUP)
def test_the_text_of_an_html_page_splits_into_the_same_sections(source):
    page = split(source, kind="html")

    for rendered in (page.text, page.text.replace("\n", "\r\n\r\n")):
        assert split(rendered, kind="text").texts() == page.texts()


def texts_of(source: str, **options) -> list[str]:
    return split(source, kind="html", **options).texts()


@pytest.mark.parametrize("tag", BLOCKS)
def test_a_block_starts_and_ends_a_section(tag):
    tables = {
        "tr": "<table><tr><td>in</td></tr></table>",
        "td": "<table><td>in</table>",
        "table": "<table><caption>in</table>",
    }

    assert texts_of(f"<div>before{tables.get(tag, f'<{tag}>in</{tag}>')}after</div>") == ["before", "in", "after"]


@pytest.mark.parametrize("tag", INLINES)
def test_an_inline_element_stays_in_its_section(tag):
    assert texts_of(f"<p>be<{tag}>for</{tag}>e</p>") == ["before"]


def test_white_space_is_collapsed_inside_a_section():
    assert texts_of("<p>\n  to <b> be </b>\t\xa0or\n</p>") == ["to be or"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a<br>b", ["a b"]),
        ("a<br><br>b", ["a", "b"]),
        ("a<br> \n <br>b", ["a", "b"]),
        ("a<br/><br/><br/>b", ["a", "b"]),
        ("a<br>x<br>b", ["a x b"]),
        ("a<br><b><br></b>b", ["a", "b"]),
        ("a<br><!-- x --><br>b", ["a", "b"]),
        ("<p>a<br></p><p><br>b</p>", ["a", "b"]),
    ],
)
def test_two_line_breaks_in_a_row_end_a_section_and_one_does_not(source, expected):
    assert texts_of(source) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("<div>a</div><div>b</div>", "a\nb"),
        ("<p>a<p>b", "a\n\nb"),
        ("<div>a</div><h2>b</h2><div>c</div>", "a\n\nb\n\nc"),
        ("a<ul><li>b<li>c</ul>d", "a\n\nb\nc\n\nd"),
        ("a<hr>b<br><br>c", "a\n\nb\n\nc"),
        ("<p></p>a<p> </p>b<div></div>c<p></p>", "a\n\nb\nc"),
    ],
)
def test_a_blank_line_stands_where_a_browser_leaves_a_margin(source, expected):
    assert split(source, kind="html").text == expected


def test_comments_split_nothing_and_are_not_read():
    assert texts_of("<p>to<!-- not --> be<!----></p>") == ["to be"]


@pytest.mark.parametrize("tag", [tag for tag in HIDDEN if tag != "head"])
def test_the_content_of_a_skipped_element_is_not_read(tag):
    assert texts_of(f"<p>a</p><{tag}>x</{tag}><p>b</p>") == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    ["<iframe src=x />", "<p>Switch scripts on", "<div><img src=x>", "<style>p {}", "<!-- x"],
    ids=["self-closed", "paragraph", "division", "style", "comment"],
)
def test_an_unclosed_element_in_a_noscript_takes_nothing_with_it(content):
    page = f"<html><body><noscript>{content}</noscript><h1>Ferry sails</h1><p>It sailed.</p></body></html>"

    assert texts_of(page) == ["Ferry sails", "It sailed."]


def test_a_list_of_many_options_is_parsed_at_once(within):
    with within(5):
        assert texts_of(f"<select>{'<option>x' * 40_000}</select><p>a</p>") == ["a"]


def test_neither_title_nor_anything_else_in_the_head_is_read():
    assert texts_of("<html><head><title>t</title><style>s</style></head><body>a</body></html>") == ["a"]


@pytest.mark.parametrize(
    "source",
    ["<p hidden>a</p>", "<p style='display:none'>a</p>", "<p aria-hidden=true>a</p>", "<details><p>a</p></details>"],
)
def test_what_a_browser_would_not_show_is_read_like_all_else(source):
    assert texts_of(source) == ["a"]


def test_text_after_the_end_of_the_document_is_read():
    assert texts_of("<html><body><p>a</p></body></html>b") == ["a", "b"]


@pytest.mark.parametrize("source", ["", " \n ", "<p></p>", "<br><br>", "<style>x</style>", "<!-- x -->", "<frameset>"])
def test_a_page_without_characters_has_no_sections(source):
    page = split(source, kind="html")

    assert (page.text, page.sections) == ("", [])


@pytest.mark.parametrize(
    ("source", "share"),
    [
        ("<p>to be</p>", 0.0),
        ("<p><a>to be</a></p>", 1.0),
        ("<p>to <a>be</a></p>", 0.5),
        ("<p>to <a><b>b</b>e</a></p>", 0.5),
        ("<p>to <a>b<a>e</a></a></p>", 0.5),
        ("<a><div>to be</div></a>", 1.0),
        ("<a>to<b>b<a>e</a></b></a>", 1.0),
    ],
)
def test_the_link_share_counts_each_linked_character_once_and_no_white_space(source, share):
    assert [section.link_share for section in split(source, kind="html").sections] == [share]


def test_links_of_one_section_do_not_count_for_the_next():
    sections = split("<p><a>to</a></p><p>be</p><div><a><p>or</p></a>not</div>", kind="html").sections

    assert [section.link_share for section in sections] == [1.0, 0.0, 1.0, 0.0]


def test_headings_and_all_inside_them_are_headings():
    sections = split("<h1>a<div>b</div></h1><p>c</p><h6><b>d</b></h6><header>e</header>", kind="html").sections

    assert [section.is_heading for section in sections] == [True, True, False, True, False]


def test_the_tag_names_the_innermost_three_blocks():
    page = split("<article><section><div>a<p>b <i>c</i></p></div></section></article>d", kind="html")

    assert [section.tag for section in page.sections] == ["article>section>div", "section>div>p", "body"]


def test_hints_are_tags_then_landmarks_then_own_class_words_then_those_around():
    source = (
        "<main class='pageMain'><aside id='side' class='x promo-Box'>"
        "<p class='lead' role='note' data-testid='SUB'>a</p></aside></main>"
    )

    (section,) = split(source, kind="html").sections

    assert section.hints == (
        *("0:p", "1:aside", "2:main", "in:main", "in:aside"),
        *("own:lead", "own:note", "own:sub", "class:promo", "class:box", "class:side", "class:page", "class:main"),
    )


def test_hints_are_few_however_many_classes_there_are():
    names = " ".join(f"{a}{b}" for a in "abcdefgh" for b in "qrstuvwx")
    (section,) = split(f"<div class='{names}'>" * 30 + "a", kind="html").sections

    assert len(section.hints) <= 3 + 1 + 12 + MAX_OUTER_HINTS


def test_inline_elements_around_a_text_add_their_tags_and_class_words():
    (section,) = split("<p><span class='badge--premium'><b>Plus</b></span> a</p>", kind="html").sections

    assert section.hints == ("0:p", "1:body", "with:b", "own:badge", "own:premium")


def link_hints(page: str) -> list[list[str]]:
    sections = split(page, kind="html").sections
    return [[hint for hint in section.hints if hint.startswith("link:")] for section in sections]


@pytest.mark.parametrize(
    ("link", "hints"),
    [
        ("href='/plus/offer?utm_source=menu&x'", ["plus", "utm_source"]),
        ("href='https://www.harbour.test/jobs'", ["jobs"]),
        ("href='//shop.harbour.test/'", []),
        (
            "href='https://ads.barnacle.test/c/1' rel='sponsored noopener'",
            "rel-sponsored rel-noopener external ads barnacle test".split(),
        ),
        ("href='mailto:a@harbour.test'", ["mailto", "harbour", "test"]),
        ("href", []),
        ("href='https://[::1'", ["external"]),
    ],
)
def test_a_linked_section_says_where_its_link_leads(link, hints):
    page = f"<link rel=canonical href='https://www.harbour.test/a'><p><a {link}>to be</a> or</p>"

    assert link_hints(page) == [["link:" + hint for hint in hints]]


def test_a_link_in_running_text_says_nothing_of_the_section():
    assert link_hints("<p>To be or not to <a href='https://barnacle.test'>be</a></p>") == [[]]


def test_without_an_address_of_its_own_a_page_belongs_to_the_site_that_it_links_to_most():
    page = "<p><a href='http://harbour.test/a'>a</a></p>" * 2 + "<p><a href='http://barnacle.test'>a</a></p>"

    assert ["external" in " ".join(hints) for hints in link_hints(page)] == [False, False, True]


@pytest.mark.parametrize(
    ("host", "own", "other"),
    [
        ("www.cod.test", "edition.cod.test", "www.barnacle.test"),
        ("www.cod.co.uk", "news.cod.co.uk", "www.eel.co.uk"),
        ("cod.co", "www.cod.co", "eel.co"),
        ("www.cod.test:8080", "cod.test", "cods.test"),
    ],
)
@pytest.mark.parametrize(
    "head", ["<link href='https://{}/a' rel='canonical'>", "<meta content=http://{} property=og:url>"]
)
def test_a_site_is_known_by_what_it_registered_however_short(head, host, own, other):
    page = f"{head.format(host)}<p><a href='https://{own}/x'>a</a></p><p><a href='https://{other}/x'>b</a></p>"

    assert ["link:external" in hints for hints in link_hints(page)] == [False, True]


def test_a_page_that_names_no_host_for_its_own_links_is_of_none_of_those_it_links_to():
    page = "<p><a href='/a'>a</a></p>" * 2 + "<p><a href='http://barnacle.test'>b</a></p>"

    assert ["link:external" in hints for hints in link_hints(page)] == [False, False, True]


def test_plain_text_has_neither_tags_nor_hints():
    (section,) = split("a", kind="text").sections

    assert (section.tag, section.hints, section.link_share, section.is_heading) == (None, (), 0.0, False)


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r", "\n\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_each_line_of_plain_text_is_a_section(line_break):
    assert split(f"to be{line_break} or not ", kind="text").texts() == ["to be", "or not"]


def test_markup_is_only_text_where_the_page_is_said_to_be_text():
    assert split("<p>a</p><p>b</p>", kind="text").texts() == ["<p>a</p><p>b</p>"]


def lengths(source: str) -> list[int]:
    return [len(text) for text in split(source, kind="text").texts()]


def test_a_section_of_a_thousand_characters_is_whole_and_a_longer_one_is_cut():
    assert lengths("x" * 1_000) == [1_000]
    assert lengths("x" * 1_001) == [1_000, 1]


def test_a_long_section_is_cut_behind_the_last_sentence_that_fits():
    first, second = "a" * 599 + ".", 'b" ' + "b" * 395 + '."'
    assert len(first) + len(second) == 1_000

    assert split(f"{first} {second} {first}", kind="text").texts() == [first, second, first]
    assert split(f"{first}{second} {first}", kind="text").texts() == [first + second, first]


def test_a_long_section_without_sentences_is_cut_between_words():
    assert lengths("word " * 300) == [999, 499]


def test_a_full_stop_inside_a_number_ends_no_sentence():
    assert lengths("1.5" * 400) == [1_000, 200]


def test_a_sentence_too_near_the_start_is_no_place_to_cut():
    assert lengths("a. " + "b" * 1_200)[0] > 250


def test_east_asian_sentences_need_no_space_behind_them():
    sentence = "日" * 599 + "。"

    assert split(sentence * 3, kind="text").texts() == [sentence] * 3


def test_all_pieces_of_a_long_element_say_where_it_stands():
    page = split(f"<main><h2>{'word ' * 500}</h2></main>", kind="html")

    assert len(page.sections) == 3
    assert {section[2:] for section in page.sections} == {page.sections[0][2:]}
    assert page.sections[0].tag == "body>main>h2"


def test_a_long_run_of_white_space_inside_a_line_is_no_section():
    assert split("a" + " " * 5_000 + "b" + "\t" * 5_000, kind="text").texts() == ["a", "b"]


def test_broken_utf8_in_a_page_that_declares_it_costs_only_the_broken_characters():
    assert split("<meta charset=utf-8><p>Größe".encode() + b"\xff\xfe x</p><p>").texts() == ["Größe\ufffd\ufffd x"]


def test_nul_bytes_neither_end_nor_break_a_page():
    assert split(b"a\0b\nc").texts() == ["a\0b", "c"]
    assert split(b"<p>a\0b</p><p>c</p>").texts() == ["ab", "c"]


def test_lone_surrogates_become_replacement_characters():
    assert split("a\ud800\nb", kind="text").text == "a\ufffd\nb"
    assert split("<p title='\udfff'>a\udfff</p>", kind="html").text == "a\ufffd"
    assert split("&#xD800;a", kind="html").text == "\ufffda"


@pytest.mark.parametrize("source", [b"<p>a</p><p>b</p>", "<p>a</p><p>b</p>", "<p>ä</p><p>b</p"])
def test_a_page_of_exactly_the_limits_is_read(source):
    limits = Limits(max_bytes=16, max_sections=2)

    assert len(split(source, limits=limits).sections) == 2


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(max_bytes=15), r"the page has 16 bytes, the limit is 15: cut it, or raise max_bytes"),
        (Limits(max_sections=1), r"the page has 2 sections, the limit is 1: cut it, or raise max_sections"),
    ],
)
def test_a_page_above_a_limit_is_refused_with_what_to_do(limits, message):
    with pytest.raises(PageError, match=message):
        split(b"<p>a</p><p>b</p>", limits=limits)


@pytest.mark.parametrize("unit", ["<a", "<a ", "<!--", "<script>", "<a b='", "</", "<", "<p<", "<![CDATA[", "&", "<br"])
def test_anything_left_unclosed_is_answered_or_refused_within_a_sane_time(unit, within):
    source = "<html><p>a</p>" + unit * 12_000

    with within(1):
        try:
            page = split(source, kind="html")
        except PageError:
            return
    assert_partition(page, characters(source))


@pytest.mark.parametrize(
    "source", ["<p>a<b", "<p>a<!-- b", "<p>a<script>b", "<p>a<textarea>b", "<p>a<b x='c", "<p>a</p", "<div><p>a<table>"]
)
def test_a_page_that_breaks_off_keeps_what_came_before(source):
    assert texts_of(source) == ["a"]


def test_entities_are_characters_and_no_markup():
    source = html.escape("<p>a</p>")

    assert texts_of(f"<p>{source}</p>") == ["<p>a</p>"]
