"""The playground in headless Chromium: what a reader sees, hears and can do."""

import json
import os
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from copydesk import detect
from copydesk.detect import detect_kind

SCREENSHOTS = os.environ.get("COPYDESK_SCREENSHOTS")
"""Folder to write pictures to, for people to look at."""
PAGE = (
    "<h1>Minister said talks</h1><p>The <script>goal</script> match.</p>"
    "<p>Subscribe &lt;b&gt;now&lt;/b&gt; \U0001f600</p><p>end</p>"
)


@pytest.fixture(scope="module")
def service(tiny_model: Path, start_service) -> Iterator:
    service = start_service(tiny_model)
    yield service
    assert service.stop() == 0


@pytest.fixture
def page(browser: Browser, service) -> Iterator[Page]:
    """Open the playground; nothing may go wrong in it, and it may ask nobody but the service."""
    context = browser.new_context(viewport={"width": 1_280, "height": 900})
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on(
        "request",
        lambda request: faults.append(request.url) if not request.url.startswith((service.url, "data:")) else None,
    )
    page.goto(service.url)
    yield page
    context.close()
    assert faults == []


def read(page: Page, source: str) -> None:
    page.get_by_label("A page, as HTML or plain text").fill(source)
    page.get_by_role("button", name="Read the page").click()
    expect(page.get_by_role("status")).to_contain_text("sections and")


def answer_of(page: Page) -> dict:
    return json.loads(page.locator("#json").text_content())


def test_a_page_is_shown_section_by_section_and_runs_nothing(page):
    read(page, PAGE)

    answer = answer_of(page)
    items = page.locator("#page > li")
    expect(items).to_have_count(len(answer["sections"]))
    assert items.locator(".words").all_text_contents() == [section["text"] for section in answer["sections"]]
    assert items.evaluate_all("items => items.map(item => item.dataset.label)") == [
        section["label"] for section in answer["sections"]
    ]
    assert page.locator("#page script, #page .words b").count() == 0


def test_colour_grows_with_confidence(page):
    read(page, PAGE)

    shown = page.locator("#page .words").evaluate_all("all => all.map(one => one.style.getPropertyValue('--sure'))")
    assert [float(value) for value in shown] == [section["score"] for section in answer_of(page)["sections"]]


def test_the_four_scores_show_on_hover_and_on_focus(page):
    read(page, PAGE)
    first, second = page.locator("#page > li").all()[:2]

    first.hover()
    expect(first.locator(".tip")).to_be_visible()
    assert [text[:4] for text in first.locator(".score").all_text_contents()] == ["body", "boil", "payw", "spon"]
    page.mouse.move(0, 0)
    second.focus()
    expect(second.locator(".tip")).to_be_visible()
    assert "Scores: body " in second.get_attribute("aria-label")


def test_a_label_can_be_hidden_and_shown_again(page):
    read(page, PAGE)
    label = answer_of(page)["sections"][0]["label"]
    hidden = page.locator(f"#page > li[data-label={label}]")

    page.locator(f"#toggles input[value={label}]").uncheck()
    assert [item.is_visible() for item in hidden.all()] == [False] * hidden.count()

    page.locator(f"#toggles input[value={label}]").check()
    assert all(item.is_visible() for item in hidden.all())


def test_topics_stand_with_scores_and_thresholds(page):
    read(page, PAGE)

    topics = answer_of(page)["topics"]
    shown = page.locator("#topics li").all_text_contents()
    assert topics
    assert len(shown) == len(topics)
    for topic, text in zip(topics, shown, strict=True):
        assert topic["name"] in text
        assert ("implied by a narrower topic" if topic["implied"] else "from 10%") in text


def test_the_clean_text_can_be_copied(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    read(page, PAGE)
    answer = answer_of(page)

    page.get_by_role("button", name="Copy the text").click()

    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == "\n\n".join(filter(None, [answer["headline"], answer["body"]]))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_each_sample_is_read_in_full(page, number):
    page.get_by_label("Sample").select_option(str(number))
    page.get_by_role("button", name="Read the page").click()
    expect(page.get_by_role("status")).to_contain_text("read as plain text" if number == 1 else "read as HTML")

    assert len(answer_of(page)["sections"]) > 10


@pytest.mark.parametrize(
    "source",
    [
        "<table><tr><td>Ferry<td>x</table><strong>ok</strong><em>z</em>",
        "\ufeff\n <BODY>goal",
        " " * 1_001 + "<html>goal",
        "<p>goal",
        "<p>goal <x>talks",
        "<pre>goal <bold>talks",
        "1 < 2 and <a > 3, <br/>4",
        "<h1\nclass='a'>goal</h1>",
        "goal\n\ntalks on <b>Monday</b>.<br>\n\nmatch",
        "<p>goal</p>\n\n<p>talks</p>\n \nmatch",
        "goal\n\n<p>talks</p>\n\nmatch",
        "goal\n\ntalks\n\nmatch <SCRIPT>x</script>",
    ],
)
def test_it_tells_html_from_text_as_the_command_does(page, source):
    assert page.evaluate("looksLikeHtml", source) == (detect_kind(source) == "html")


@pytest.mark.parametrize("name", ["TAG_LIKE", "DOCUMENT_TAG", "BLOCK_TAG"])
def test_it_knows_the_tags_that_the_command_knows(name):
    script = files("copydesk.serve").joinpath("playground.html").read_text("utf-8")

    pattern = re.search(rf"const {name} = /(.*)/g?i;", script)[1]
    assert pattern.replace(r"\/", "/") == getattr(detect, f"_{name}").pattern


def test_a_refused_page_leaves_nothing_of_the_one_before(page):
    read(page, PAGE)
    page.locator("#source").fill("x")
    page.route("**/v1/pages", lambda route: route.fulfill(status=200, body="<", content_type="application/json"))
    page.get_by_role("button", name="Read the page").click()

    expect(page.locator("#status.problem")).not_to_be_empty()
    expect(page.locator("#results")).to_be_hidden()


def test_all_is_reached_by_keyboard_alone(page):
    page.locator("#source").focus()
    page.keyboard.type("goal today")
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#page > li")).to_have_count(1)
    expect(page.locator("#page-heading")).to_be_focused()

    for _ in range(5):  # four toggles, then the first section
        page.keyboard.press("Tab")
    expect(page.locator("#page > li .tip")).to_be_visible()


def test_what_a_screen_reader_needs_is_there(page):
    read(page, PAGE)

    assert page.locator("html").get_attribute("lang") == "en"
    unnamed = page.locator("button, input, select, textarea").evaluate_all(
        "all => all.filter(one => !(one.labels?.length || one.textContent.trim() || one.ariaLabel)).map(one => one.id)"
    )
    assert unnamed == []
    assert page.locator("h1").count() == 1
    assert page.get_by_role("list").first.get_by_role("listitem").count() == len(answer_of(page)["sections"])


def contrasts(page: Page) -> list[float]:
    """Return the contrast of text to what is behind it, as WCAG counts it, for what is drawn on plain colours."""
    return page.evaluate(
        """() => {
          const channel = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
          const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
          const parse = (text) => text.match(/[\\d.]+/g).map(Number);
          const behind = (element) => {
            let layers = [];
            for (let at = element; at; at = at.parentElement) {
              const [r, g, b, a = 1] = parse(getComputedStyle(at).backgroundColor);
              layers.push([r, g, b, a]);
              if (a === 1) break;
            }
            const over = (under, [r, g, b, a]) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
            return layers.reverse().reduce(over, [255, 255, 255]);
          };
          return [...document.querySelectorAll("h1, h2, p, label, button, a:not(.skip), .tag, .words, small, legend")]
            .filter((element) => element.checkVisibility() && element.textContent.trim())
            .map((element) => {
              const both = [light(parse(getComputedStyle(element).color)), light(behind(element))];
              return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
            });
        }"""
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1_280, 390])
def test_it_reads_well_in_light_and_dark_wide_and_narrow(page, scheme, width):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.get_by_label("Sample").select_option("0")
    page.get_by_role("button", name="Read the page").click()
    expect(page.locator("#page > li").first).to_be_visible()
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/playground-{scheme}-{width}.png", full_page=True)

    assert min(contrasts(page)) >= 4.5
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_refusal_is_shown_in_words(page, service):
    page.locator("#source").fill("x")
    page.route("**/v1/pages", lambda route: route.fulfill(status=200, body="<", content_type="application/json"))
    page.get_by_role("button", name="Read the page").click()

    expect(page.locator("#status.problem")).not_to_be_empty()


def test_a_key_is_asked_for_where_the_service_needs_one(browser, service_of):
    context = browser.new_context()
    page = context.new_page()
    page.goto(service_of(keys=("secret",)).url)
    page.get_by_label("This service asks for a key").fill("secret")

    read(page, "goal today")

    expect(page.locator("#page > li")).to_have_count(1)
    context.close()
