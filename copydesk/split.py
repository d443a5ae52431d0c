"""Cut a page into sections with exact offsets. The one way a page becomes sections.

Knows the parser's tree and plain text; knows nothing of labels, tokens or models.

A page's *characters* are the text nodes of its HTML5 tree below `<body>` without those in `SKIPPED_TAGS` (for plain
text: the input), all white space removed. Sections partition them: nothing is dropped, nothing is added.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from selectolax.lexbor import LexborDocumentOptions, LexborHTMLParser

from copydesk.depth import check_depth
from copydesk.detect import Kind, decode_bytes, detect_kind, without_surrogates
from copydesk.hints import NO_INLINE, Element, Inline, class_words_of, hints_of, inside, site_name_of
from copydesk.page import PageError

SKIPPED_TAGS = frozenset(
    "script style noscript template svg head iframe object canvas math textarea select datalist".split()
)
INLINE_TAGS = frozenset(
    "a abbr acronym b bdi bdo big cite code data del dfn em font i img ins kbd label mark nobr output picture q rb rp "
    "rt ruby s samp small source span strike strong sub sup time tt u var wbr".split()
)
"""Elements that do not start a section; every other one does, unknown ones too."""
SPACED_TAGS = frozenset("blockquote dir dl figure h1 h2 h3 h4 h5 h6 hr listing menu ol p plaintext pre ul xmp".split())
"""Elements with a blank line before and after them: a browser's own style sheet gives them a margin (HTML standard,
15.3)."""

MAX_SECTION_CHARACTERS = 1_000
"""A longer section is cut at sentence ends, so that a page that came as one line can still be cleaned."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a page may cost; above it `PageError`."""

    max_bytes: int = 20 * 2**20
    max_sections: int = 200_000
    max_depth: int = 10_000
    """Of nested elements: the parser's time grows with its square."""


class RawSection(NamedTuple):
    """A section before it is read: where it stands and what surrounds it."""

    start: int
    end: int
    tag: str | None
    """The innermost three block elements, outermost first; None for plain text."""
    hints: tuple[str, ...]
    """Words from the elements around the section: tags, landmarks, class names. Empty for plain text."""
    link_share: float
    """Share of the characters that stand in links."""
    is_heading: bool


@dataclass(frozen=True, slots=True)
class RawPage:
    """A page cut into sections: `text[s.start:s.end]` for each."""

    kind: Literal["html", "text"]
    text: str
    sections: list[RawSection]

    def texts(self) -> list[str]:
        """Return the text of each section."""
        return [self.text[section.start : section.end] for section in self.sections]


def split(source: str | bytes, *, kind: Kind = "auto", limits: Limits | None = None) -> RawPage:
    """Cut a page into sections.

    Args:
        source: HTML or plain text. Bytes are decoded by BOM, else as UTF-8 if it nearly is, else as
            declared, else as sniffed. Lone surrogates become U+FFFD.
        kind: what the source is; `auto` looks for tags.
        limits: what the page may cost.

    Raises:
        PageError: the page breaks a limit.
    """
    limits = limits or Limits()
    size = len(source) if isinstance(source, bytes) else len(source.encode("utf-8", "surrogatepass"))
    if size > limits.max_bytes:
        raise PageError(f"the page has {size:,} bytes, the limit is {limits.max_bytes:,}: cut it, or raise max_bytes")
    text = decode_bytes(source) if isinstance(source, bytes) else without_surrogates(source)
    if kind == "auto":
        kind = detect_kind(text)
    page = _split_html(text, limits) if kind == "html" else _split_text(text)
    if len(page.sections) > limits.max_sections:
        raise PageError(
            f"the page has {len(page.sections):,} sections, the limit is {limits.max_sections:,}: "
            "cut it, or raise max_sections"
        )
    return page


def _split_text(text: str) -> RawPage:
    sections = []
    start = 0
    for line in text.splitlines(keepends=True):
        for piece_start, piece_end in _pieces(line):
            sections.append(
                RawSection(start + piece_start, start + piece_end, None, (), link_share=0.0, is_heading=False)
            )
        start += len(line)
    return RawPage("text", text, sections)


# A sentence ends at a full stop, closing quotes included, before white space; East Asian ones need no space.
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*(?=\s)|[。！？]”?")
_NON_SPACE = re.compile(r"\S")


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Yield the offsets of `text` stripped, cut at sentence ends, else at spaces, where it is too long."""
    end = len(text.rstrip())
    start = len(text) - len(text.lstrip())
    while start < end:
        if end - start <= MAX_SECTION_CHARACTERS:
            yield start, end
            return
        cut = _cut(text, start, start + MAX_SECTION_CHARACTERS)
        yield start, cut
        following = _NON_SPACE.search(text, cut)
        start = following.start() if following else end


def _cut(text: str, start: int, stop: int) -> int:
    earliest = start + MAX_SECTION_CHARACTERS // 4
    cut = 0
    for match in _SENTENCE_END.finditer(text, earliest, stop + 1):  # looks one further for the space behind
        if match.end() <= stop:
            cut = match.end()
    if cut:
        return cut
    for position in range(stop, earliest, -1):
        if text[position].isspace():
            return start + len(text[start:position].rstrip())
    return stop


class _Writer:
    """Collects the text nodes of a section and writes sections into the page's text, each on a line of its own."""

    def __init__(self) -> None:
        self.sections: list[RawSection] = []
        self.lines: list[str] = []
        """The page's text, line breaks apart."""
        self._length = 0
        self._blank = False
        self._parts: list[str] = []
        self._inlines: dict[Inline, None] = {}
        self._linked = 0
        self._breaks = 0

    def add(self, text: str, inline: Inline) -> None:
        self._parts.append(text)
        if text.isspace():
            return
        self._breaks = 0
        self._inlines[inline] = None
        if inline.link is not None:
            self._linked += len("".join(text.split()))

    def break_line(self, element: Element) -> None:
        self._parts.append("\n")
        self._breaks += 1
        if self._breaks == 2:
            self.finish_section(element)
            self._blank = True

    def pass_edge(self, tag: str, element: Element) -> None:
        """Finish what stands before the start or the end of a block element of this tag."""
        self.finish_section(element)
        self._blank |= tag in SPACED_TAGS

    def finish_section(self, element: Element) -> None:
        self._breaks = 0
        if not self._parts:
            return
        text = " ".join("".join(self._parts).split())
        linked, self._linked = self._linked, 0
        inlines, self._inlines = self._inlines, {}
        self._parts.clear()
        if not text:
            return
        line_breaks = "\n" * (1 + self._blank) if self.lines else ""
        self._blank = False
        offset = self._length + len(line_breaks)
        link_share = linked / (len(text) - text.count(" "))
        hints = hints_of(element, inlines, linked=link_share >= 0.5)
        for start, end in _pieces(text):
            self.sections.append(
                RawSection(offset + start, offset + end, ">".join(element.path), hints, link_share, element.heading)
            )
        self.lines += [line_breaks, text]
        self._length = offset + len(text)


def _split_html(html: str, limits: Limits) -> RawPage:
    check_depth(html, limits.max_depth)
    page = _sections_of(html, scripting=False)
    if any(map(_is_unbalanced, _noscripts_of(html))):  # read as markup, they may take in what stands behind them
        scripted = _sections_of(html, scripting=True)
        return scripted if len(scripted.text) > len(page.text) else page
    return page


_NOSCRIPT = re.compile(r"<noscript\b[^<>]*>", re.IGNORECASE)
_NOSCRIPT_END = re.compile(r"</noscript\b", re.IGNORECASE)
_PAIRED_TAG = re.compile(
    r"<(?!(?:area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr)\b)(/?)[a-z]", re.IGNORECASE
)


def _noscripts_of(html: str) -> Iterator[str]:
    position = 0
    while (start := _NOSCRIPT.search(html, position)) and (end := _NOSCRIPT_END.search(html, start.end())):
        yield html[start.end() : end.start()]
        position = end.end()


def _is_unbalanced(content: str) -> bool:
    closers = _PAIRED_TAG.findall(content)
    return 2 * closers.count("/") != len(closers) or content.count("<!--") != content.count("-->")


def _sections_of(html: str, *, scripting: bool) -> RawPage:
    # Without events: they mirror the chosen option of a list, in time that grows with the square of its options.
    body = LexborHTMLParser(html, options=LexborDocumentOptions.WO_EVENTS, scripting=scripting).body
    writer = _Writer()
    site_name = site_name_of(html)
    # A node still to visit, with the block element and the inline elements that it stands in.
    stack = [(body.child, Element("body", (), None), NO_INLINE)] if body is not None else []
    while stack:
        node, element, inline = stack.pop()
        while node is not None:
            tag = node.tag
            if tag == "-text":
                writer.add(node.text_content or "", inline)
            elif tag == "br":
                writer.break_line(element)
            elif tag is not None and tag not in SKIPPED_TAGS and tag[0].isalpha():  # not a comment or the like
                is_block = tag not in INLINE_TAGS
                if is_block:
                    writer.pass_edge(tag, element)
                if (child := node.child) is not None:
                    stack.append((node.next, element, inline))
                    if is_block:
                        element = Element(tag, class_words_of(node.attributes), element)
                    else:
                        inline = inside(inline, tag, node.attributes, site_name)
                    node = child
                    continue
            node = node.next
        if not stack or stack[-1][1] is not element:  # a block ends here
            writer.pass_edge(element.path[-1], element)
    return RawPage("html", "".join(writer.lines), writer.sections)
