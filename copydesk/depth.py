"""Refuse a page that nests too deep, before the parser spends time that grows with the square of its depth.

Knows tags as they stand in the source; knows nothing of sections.
"""

import re
from collections import Counter
from collections.abc import Iterator

from copydesk.page import PageError

NON_NESTING_TAGS = frozenset(
    "area base br col dd dt embed hr img input li link meta option p param source tbody td tfoot th thead tr track wbr "
    "html head body".split()
)
"""Void elements, and those that an unclosed sibling closes: they add no depth."""

_TAG_START = re.compile("/?[a-zA-Z]")
_NAME = re.compile(r"[^\s/>]*")
_QUOTE_OR_END = re.compile(r"=\s*[\"']|>")
_RAW_TEXT_TAGS = frozenset("iframe noembed noframes script style textarea title xmp".split())
_FORMATTING_TAGS = frozenset("a b big code em font i nobr s small strike strong tt u".split())


def check_depth(html: str, max_depth: int) -> None:
    """Count how deep the elements of a page nest.

    Raises:
        PageError: deeper than `max_depth`.
    """
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
