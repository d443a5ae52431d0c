"""Refuse a page that nests too deep, before the parser spends time that grows with the square of its depth.

So is one refused that leaves formatting open: the parser opens it again in each block that follows.

Knows tags as they stand in the source; knows nothing of sections.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from copydesk.page import PageError

VOID_TAGS = frozenset("area base br col embed hr img input link meta param source track wbr".split())
UNNESTED_TAGS = frozenset("body dd dt head html li option p tbody td tfoot th thead tr".split())
"""Those that an unclosed sibling closes: they add no depth."""

MAX_REOPENED = 500_000
"""Elements of formatting that the parser may open again: about 400 bytes of memory and 2 microseconds each."""

_TAG_START = re.compile("/?[a-zA-Z]")
_NAME = re.compile(r"[^\s/>]*")
_QUOTE_OR_END = re.compile(r"=\s*[\"']|>")
_RAW_TEXT_TAGS = frozenset("iframe noembed noframes script style textarea title xmp".split())
_FORMATTING_TAGS = frozenset("a b big code em font i nobr s small strike strong tt u".split())
_CLOSED_BY_THE_NEXT = frozenset(("a", "nobr"))
_FORMATTING_START = re.compile(r"<(?:b|big|code|em|font|i|s|small|strike|strong|tt|u)[\s/>]", re.IGNORECASE)


def check_depth(html: str, max_depth: int) -> None:
    """Count how deep the elements of a page nest, and what is opened again.

    Raises:
        PageError: deeper than `max_depth`, or more than `MAX_REOPENED` are opened again.
    """
    num_tags = html.count("<")
    may_be_deep = num_tags - html.count("</") > max_depth
    if not may_be_deep and len(_FORMATTING_START.findall(html)) * num_tags <= MAX_REOPENED:
        return
    nesting = _Nesting()
    for tag, name, closes in _tags_of(html):
        (nesting.close if closes else nesting.open)(tag, name)
        if nesting.depth > max_depth:
            raise PageError(
                f"the page nests elements more than {max_depth:,} deep, which is the limit: "
                "check for unclosed tags, or raise max_depth"
            )
        if nesting.num_reopened > MAX_REOPENED:
            raise PageError(
                f"the page leaves formatting open, which would be opened again more than {MAX_REOPENED:,} times, "
                "which is the limit: close its <b>, <font> and the like, or cut it"
            )


class _Nesting:
    """About how deep the parser's tree is after each tag: rather too deep than not deep enough."""

    def __init__(self) -> None:
        self.depth = 0
        self.num_reopened = 0
        """Formatting that stood open at the starts of blocks: rather too much than not enough."""
        self._open: list[str] = []
        self._num_open: Counter[str] = Counter()
        # Apart from the others: unclosed formatting is opened again in each following block, of equal elements three
        # (HTML standard, "reconstruct the active formatting elements", "the Noah's Ark clause").
        self._formatting: defaultdict[str, list[str]] = defaultdict(list)
        self._num_equal: Counter[str] = Counter()
        self._num_active = 0

    def open(self, tag: str, name: str) -> None:
        if tag.endswith("/>") and (self._num_open["svg"] or self._num_open["math"]):
            return  # elsewhere the slash means nothing
        if name in _FORMATTING_TAGS:
            if name in _CLOSED_BY_THE_NEXT and self._formatting[name]:
                self.close(tag, name)
            self._formatting[name].append(tag)
            self._num_equal[tag] += 1
            self._num_active += self._num_equal[tag] <= 3
        else:
            self.num_reopened += self._num_active
            if name in UNNESTED_TAGS:
                return
            self._open.append(name)
            self._num_open[name] += 1
        self.depth += 1

    def close(self, _: str, name: str) -> None:
        if self._formatting[name]:
            tag = self._formatting[name].pop()
            self._num_active -= self._num_equal[tag] <= 3
            self._num_equal[tag] -= 1
            self.depth -= 1
        elif self._num_open[name]:
            closed = ""
            while closed != name:
                closed = self._open.pop()
                self._num_open[closed] -= 1
                self.depth -= 1


def _tags_of(html: str) -> Iterator[tuple[str, str, bool]]:
    """Yield tags but void ones: the whole tag, its name, and whether it closes; in time linear in the length."""
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
            if name not in VOID_TAGS:
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
