"""Cut a page into sections with exact offsets. The one way a page becomes sections.

Knows HTML, encodings and plain text; knows nothing of labels, tokens or models.

A page's *characters* are the text nodes of its HTML5 tree below `<body>` without those in `SKIPPED_TAGS` (for plain
text: the input), all white space removed. Sections partition them: nothing is dropped, nothing is added.
"""

import codecs
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import webencodings
from selectolax.lexbor import LexborHTMLParser

from copydesk.page import PageError

Kind = Literal["auto", "html", "text"]

SKIPPED_TAGS = frozenset(
    "script style noscript template svg head iframe object canvas math textarea select datalist".split()
)
INLINE_TAGS = frozenset(
    "a abbr acronym b bdi bdo big cite code data del dfn em font i img ins kbd label mark nobr output picture q rb rp "
    "rt ruby s samp small source span strike strong sub sup time tt u var wbr".split()
)
"""Elements that do not start a section; every other one does, unknown ones too."""
HEADING_TAGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6"))
LANDMARK_TAGS = (
    frozenset("article aside button dialog figure footer form header li main nav table".split()) | HEADING_TAGS
)
NON_NESTING_TAGS = frozenset(
    "area base br col dd dt embed hr img input li link meta option p param source tbody td tfoot th thead tr track wbr "
    "html head body".split()
)
"""Void elements, and those that an unclosed sibling closes: they add no depth."""

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
        source: HTML or plain text. Bytes are decoded by BOM, else as UTF-8, else as declared, else as sniffed.
            Lone surrogates become U+FFFD.
        kind: what the source is; `auto` looks for tags.
        limits: what the page may cost.

    Raises:
        PageError: the page breaks a limit.
    """
    limits = limits or Limits()
    size = len(source)
    if size > limits.max_bytes:
        raise PageError(f"the page has {size:,} bytes, the limit is {limits.max_bytes:,}: cut it, or raise max_bytes")
    text = decode_bytes(source) if isinstance(source, bytes) else _without_surrogates(source)
    if kind == "auto":
        kind = detect_kind(text)
    page = _split_html(text, limits) if kind == "html" else _split_text(text)
    if len(page.sections) > limits.max_sections:
        raise PageError(
            f"the page has {len(page.sections):,} sections, the limit is {limits.max_sections:,}: "
            "cut it, or raise max_sections"
        )
    return page


_TAG_LIKE = re.compile(
    r"</?(?:html|head|body|div|p|span|article|section|table|ul|ol|li|br|h[1-6]|a|meta|script|main|nav|strong|em|b|i)"
    r"(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)


def detect_kind(text: str) -> Literal["html", "text"]:
    """Tell HTML from plain text: HTML begins like a document, or has at least two tags."""
    start = text[:1_000].lstrip("\ufeff \t\r\n\f").lower()
    if start.startswith(("<!doctype html", "<html", "<head", "<body")):
        return "html"
    tags = _TAG_LIKE.finditer(text)
    return "html" if next(tags, None) and next(tags, None) else "text"


_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_DECLARED = re.compile(rb"<(?:meta|\?xml)[^>]{0,200}?(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)


def decode_bytes(data: bytes) -> str:
    """Decode by byte-order mark, else as UTF-8 if valid, else as declared, else as sniffed; never fail."""
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return _without_surrogates(data[len(mark) :].decode(encoding, "replace"))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        pass
    declared = _DECLARED.search(data[:4096])
    if declared and (named := _text_encoding(declared[1].decode("ascii", "replace"))):
        return _without_surrogates(data.decode(named, "replace"))
    return _without_surrogates(data.decode(_sniffed_encoding(data[:65_536]), "replace"))


def _text_encoding(label: str) -> str | None:
    """Return the codec of an encoding label as browsers read it; UTF-16 in a declaration is always wrong."""
    encoding = webencodings.lookup(label)
    if encoding is None or encoding.name in {"replacement", "x-user-defined"} or encoding.name.startswith("utf-16"):
        return None
    return encoding.codec_info.name


def _sniffed_encoding(data: bytes) -> str:
    from charset_normalizer import from_bytes  # slow to import, rarely needed

    guesses = list(from_bytes(data))
    if not guesses:
        return "cp1252"
    # Many single-byte encodings fit a short text: of equals the commonest one is meant.
    western = any(guess.encoding in {"cp1252", "latin_1"} and guess.chaos <= guesses[0].chaos for guess in guesses)
    return "cp1252" if western else guesses[0].encoding


_SURROGATE = re.compile("[\ud800-\udfff]")


def _without_surrogates(text: str) -> str:
    return _SURROGATE.sub("\ufffd", text)


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


_TAG_START = re.compile("/?[a-zA-Z]")
_NAME = re.compile(r"[^\s/>]*")
_QUOTE_OR_END = re.compile(r"=\s*[\"']|>")
_RAW_TEXT_TAGS = frozenset("iframe noembed noframes script style textarea title xmp".split())
_FORMATTING_TAGS = frozenset("a b big code em font i nobr s small strike strong tt u".split())


def _check_depth(html: str, max_depth: int) -> None:
    """Refuse a page that nests too deep, before the parser spends time that grows with the square of its depth."""
    if html.count("<") - html.count("</") <= max_depth:
        return
    nesting = _Nesting()
    for tag, name, closes in _tags_of(html):
        (nesting.close if closes else nesting.open)(tag, name)
        if nesting.depth > max_depth:
            raise PageError(
                f"the page nests elements more than {max_depth:,} deep, which is the limit: "
                "check for unclosed tags, or raise max_depth"
            )


class _Nesting:
    """About how deep the parser's tree is after each tag: rather too deep than not deep enough."""

    def __init__(self) -> None:
        self.depth = 0
        self._open: list[str] = []
        self._num_open: Counter[str] = Counter()
        # Apart from the others: unclosed formatting is opened again in each following block (HTML standard,
        # "reconstruct the active formatting elements").
        self._num_formatting: Counter[str] = Counter()

    def open(self, tag: str, name: str) -> None:
        if tag.endswith("/>") and (self._num_open["svg"] or self._num_open["math"]):
            return  # elsewhere the slash means nothing
        if name in _FORMATTING_TAGS:
            self._num_formatting[name] += 1
        else:
            self._open.append(name)
            self._num_open[name] += 1
        self.depth += 1

    def close(self, _: str, name: str) -> None:
        if self._num_formatting[name]:
            self._num_formatting[name] -= 1
            self.depth -= 1
        elif self._num_open[name]:
            closed = ""
            while closed != name:
                closed = self._open.pop()
                self._num_open[closed] -= 1
                self.depth -= 1


def _tags_of(html: str) -> Iterator[tuple[str, str, bool]]:
    """Yield the tags that may nest: the whole tag, its name, and whether it closes; in time linear in the length."""
    position = html.find("<")
    while 0 <= position < len(html) - 1:
        following = html[position + 1 : position + 3]
        if html.startswith("<!--", position):
            # `<!-->` and `<!--->` are whole comments.
            short = next((n for n in (5, 6) if html.startswith("<!--->"[: n - 1] + ">", position)), 0)
            end = position + short if short else _after(html, "-->", position + 4)
        elif _TAG_START.match(following):
            closes = following[0] == "/"
            name = _name_at(html, position + 1 + closes)
            end = _tag_end(html, position + 1 + closes + len(name))
            if name not in NON_NESTING_TAGS:
                yield html[position:end], name, closes
            if name in _RAW_TEXT_TAGS and not closes:
                closer = re.compile(f"</{name}(?=[\\s/>])", re.IGNORECASE).search(html, end)
                end = closer.start() if closer else len(html)
        else:
            end = position + 1
        position = html.find("<", end)


def _name_at(html: str, position: int) -> str:
    match = _NAME.match(html, position, position + 100)
    return match[0].lower() if match else ""


def _after(html: str, mark: str, start: int) -> int:
    found = html.find(mark, start)
    return found + len(mark) if found >= 0 else len(html)


def _tag_end(html: str, position: int) -> int:
    while match := _QUOTE_OR_END.search(html, position):
        if match[0] == ">":
            return match.end()
        position = _after(html, match[0][-1], match.end())
    return len(html)


ATTRIBUTE_HINTS = ("own:", "class:", "link:")
"""Prefixes of the hints that come from attributes: of the elements right around the text, of those farther out, of its
link. Hints from tags stand before them."""
MAX_OUTER_HINTS, MAX_INLINE_HINTS = 24, 16


class _Element:
    """A block element on the way down the tree, with what its sections inherit."""

    __slots__ = ("_hints", "classes", "heading", "landmarks", "parent", "path")

    def __init__(self, tag: str, classes: tuple[str, ...], parent: "_Element | None") -> None:
        self.parent = parent
        self.classes = classes
        self.path: tuple[str, ...] = (*(parent.path[-2:] if parent else ()), tag)
        self.heading: bool = tag in HEADING_TAGS or (parent is not None and parent.heading)
        outer = parent.landmarks if parent else ()
        self.landmarks: tuple[str, ...] = (*outer, tag) if tag in LANDMARK_TAGS and tag not in outer else outer
        self._hints: tuple[tuple[str, ...], tuple[str, ...]] | None = None

    def hints(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return words from tags (nearest first, then landmarks), and from attributes (own ones, then outer)."""
        if self._hints is None:
            tags = [f"{i}:{tag}" for i, tag in enumerate(reversed(self.path))]
            tags += [f"in:{tag}" for tag in self.landmarks]
            element, outer = self.parent, list[str]()
            for _ in range(6):
                if element is None or len(outer) >= MAX_OUTER_HINTS:
                    break
                outer += [ATTRIBUTE_HINTS[1] + word for word in element.classes]
                element = element.parent
            own = [ATTRIBUTE_HINTS[0] + word for word in self.classes]
            self._hints = tuple(tags), tuple(dict.fromkeys(own + outer[:MAX_OUTER_HINTS]))
        return self._hints


class _Inline(NamedTuple):
    """The inline elements around a text."""

    tags: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    link: tuple[str, ...] | None = None
    """Words of the link that the text stands in."""


_CLASS_WORD = re.compile(r"[A-Z]?[a-z]{2,}|[A-Z]{2,}")
_HINT_ATTRIBUTES = ("class", "id", "role", "itemprop", "data-testid", "data-component", "aria-label")


@lru_cache(maxsize=20_000)
def _class_words(value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.lower() for word in _CLASS_WORD.findall(value[:400])))[:12]


_ADDRESS = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//([^/?#\s]+)([^?#]*)(?:\?([^#]*))?", re.IGNORECASE)
_WORD = re.compile(r"[a-z]{3,}")
_CANONICAL = re.compile(
    r"<link\s[^>]{0,300}?rel=[\"']?canonical[^>]{0,300}?href=[\"']?https?://([^/\"'>\s]+)|"
    r"<meta\s[^>]{0,300}?og:url[^>]{0,300}?content=[\"']?https?://([^/\"'>\s]+)",
    re.IGNORECASE,
)
_LINKED_HOST = re.compile(r"<a\s[^>]{0,300}?href=[\"']?https?://([^/\"'>\s?#]+)", re.IGNORECASE)


def _site_name(html: str) -> str:
    """Return the longest part of the page's own host name, as it says itself, else of the host it links to most."""
    found = _CANONICAL.search(html, 0, 200_000)
    host = (found[1] or found[2]) if found else ""
    if not host:
        hosts = Counter(_LINKED_HOST.findall(html, 0, 500_000))
        host = hosts.most_common(1)[0][0] if hosts else ""
    return max(host.lower().split("."), key=len)


def _link_words(address: str, rel: str, site_name: str) -> tuple[str, ...]:
    """Return what a link says of the text in it: whether it leads away, where to, and under which terms."""
    address = address.strip()[:300].lower()
    words = [f"rel-{word}" for word in rel.lower().split()[:4]]
    found = _ADDRESS.match(address)
    if found:
        host, path, query = found[1], found[2], found[3] or ""
        if site_name not in host.split("."):
            words.append("external")
            words += _WORD.findall(host)[:4]
    else:
        path, _, query = address.partition("?")
    words += _WORD.findall(path.strip("/").partition("/")[0])[:3]
    words += [key for key, equals, _ in (part.partition("=") for part in query.split("&")[:6]) if equals]
    return tuple(words)


class _Writer:
    """Collects the text nodes of a section and writes sections into the page's text."""

    def __init__(self) -> None:
        self.sections: list[RawSection] = []
        self.texts: list[str] = []
        self._length = 0
        self._parts: list[str] = []
        self._inlines: dict[_Inline, None] = {}
        self._linked = 0
        self._breaks = 0

    def add(self, text: str, inline: _Inline) -> None:
        self._parts.append(text)
        if text.isspace():
            return
        self._breaks = 0
        self._inlines[inline] = None
        if inline.link is not None:
            self._linked += len("".join(text.split()))

    def break_line(self, element: _Element) -> None:
        self._parts.append("\n")
        self._breaks += 1
        if self._breaks == 2:
            self.finish_section(element)

    def finish_section(self, element: _Element) -> None:
        self._breaks = 0
        if not self._parts:
            return
        text = " ".join("".join(self._parts).split())
        linked, self._linked = self._linked, 0
        inlines, self._inlines = self._inlines, {}
        self._parts.clear()
        if not text:
            return
        offset = self._length + bool(self.texts)  # sections are joined by a line break
        link_share = linked / (len(text) - text.count(" "))
        hints = _hints(element, inlines, linked=link_share >= 0.5)
        for start, end in _pieces(text):
            self.sections.append(
                RawSection(offset + start, offset + end, ">".join(element.path), hints, link_share, element.heading)
            )
        self.texts.append(text)
        self._length = offset + len(text)


def _hints(element: _Element, inlines: Iterable[_Inline], *, linked: bool) -> tuple[str, ...]:
    tags, words = element.hints()
    inline_tags: dict[str, None] = {}
    inline_words: dict[str, None] = {}
    for inline in inlines:
        inline_tags.update(dict.fromkeys(f"with:{tag}" for tag in inline.tags))
        inline_words.update(dict.fromkeys(ATTRIBUTE_HINTS[0] + word for word in inline.words))
        if linked and inline.link:
            inline_words.update(dict.fromkeys(ATTRIBUTE_HINTS[2] + word for word in inline.link))
        if len(inline_words) > MAX_INLINE_HINTS:
            break
    return (*tags, *inline_tags, *words, *list(inline_words)[:MAX_INLINE_HINTS])


_NO_INLINE = _Inline()


def _split_html(html: str, limits: Limits) -> RawPage:
    _check_depth(html, limits.max_depth)
    body = LexborHTMLParser(html).body
    writer = _Writer()
    site_name = _site_name(html)
    # A node still to visit, with the block element and the inline elements that it stands in.
    stack = [(body.child, _Element("body", (), None), _NO_INLINE)] if body is not None else []
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
                    writer.finish_section(element)
                if (child := node.child) is not None:
                    stack.append((node.next, element, inline))
                    if is_block:
                        element = _Element(tag, _classes_of(node.attributes), element)
                    else:
                        inline = _inside(inline, tag, node.attributes, site_name)
                    node = child
                    continue
            node = node.next
        if not stack or stack[-1][1] is not element:  # a block ends here
            writer.finish_section(element)
    return RawPage("html", "\n".join(writer.texts), writer.sections)


def _inside(inline: _Inline, tag: str, attributes: dict[str, str | None], site_name: str) -> _Inline:
    tags = inline.tags if tag == "span" or len(inline.tags) > 3 else (*inline.tags, tag)
    link = inline.link
    if tag == "a":
        link = _link_words(attributes.get("href") or "", attributes.get("rel") or "", site_name)
    return _Inline(tags, (*inline.words, *_classes_of(attributes))[:MAX_INLINE_HINTS], link)


def _classes_of(attributes: dict[str, str | None]) -> tuple[str, ...]:
    return _class_words(" ".join(filter(None, map(attributes.get, _HINT_ATTRIBUTES)))) if attributes else ()
