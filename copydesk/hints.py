"""What the elements around a text say of it: tags, class names, links. These words are the page encoder's hints.

Knows elements and attributes; knows nothing of texts or offsets.
"""

import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

HEADING_TAGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6"))
LANDMARK_TAGS = (
    frozenset("article aside button dialog figure footer form header li main nav table".split()) | HEADING_TAGS
)

ATTRIBUTE_HINTS = ("own:", "class:", "link:")
"""Prefixes of the hints that come from attributes: of the elements right around the text, of those farther out, of its
link. Hints from tags stand before them."""
MAX_OUTER_HINTS, MAX_INLINE_HINTS = 24, 16


class Element:
    """A block element on the way down the tree, with what its sections inherit."""

    __slots__ = ("_hints", "classes", "heading", "landmarks", "parent", "path")

    def __init__(self, tag: str, classes: tuple[str, ...], parent: "Element | None") -> None:
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


class Inline(NamedTuple):
    """The inline elements around a text."""

    tags: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    link: tuple[str, ...] | None = None
    """Words of the link that the text stands in."""


NO_INLINE = Inline()


_CLASS_WORD = re.compile(r"[A-Z]?[a-z]{2,}|[A-Z]{2,}")
_HINT_ATTRIBUTES = ("class", "id", "role", "itemprop", "data-testid", "data-component", "aria-label")


@lru_cache(maxsize=8_192)
def _class_words(value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.lower() for word in _CLASS_WORD.findall(value[:400])))[:12]


_ADDRESS = re.compile(r"(?:[a-z][a-z0-9+.-]*:)?//([^/?#\s]+)([^?#]*)(?:\?([^#]*))?", re.IGNORECASE)
_WORD = re.compile(r"[a-z]{3,}")
_OWN_HOST = re.compile(
    r"<(?:link|meta)\s(?=[^>]{0,600}?(?:rel=[\"']?canonical|og:url))[^>]{0,600}?(?:href|content)=[\"']?https?://([^/\"'>\s]+)",
    re.IGNORECASE,
)
_LINKED_HOST = re.compile(r"<a\s[^>]{0,300}?href=[\"']?(?:https?://([^/\"'>\s?#]+))?", re.IGNORECASE)
_SHARED_LABELS = frozenset("ac co com edu go gov ne net or org".split())
"""Second labels below which countries register sites, as in `example.co.uk`."""


def site_name_of(html: str) -> str:
    """Return the registered part of the page's own host name, as it says itself, else of the host it links to most.

    A page that says nothing and mostly links without a host has no name: its links to any host lead away.
    """
    found = _OWN_HOST.search(html, 0, 200_000)
    if found:
        return _registered_label(found[1])
    names = Counter(map(_registered_label, _LINKED_HOST.findall(html, 0, 500_000)))
    return names.most_common(1)[0][0] if names else ""


@lru_cache(maxsize=8_192)
def _registered_label(host: str) -> str:
    labels = host.lower().partition(":")[0].split(".")
    shared = len(labels) > 2 and len(labels[-1]) == 2 and labels[-2] in _SHARED_LABELS
    return labels[-3 if shared else -2] if len(labels) > 1 else labels[0]


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


def hints_of(element: Element, inlines: Iterable[Inline], *, linked: bool) -> tuple[str, ...]:
    """Return the hints of a section: from tags, then from attributes.

    Args:
        element: the block in which it stands.
        inlines: what its texts stand in.
        linked: it is a link, so that the link's address speaks of it.
    """
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


def inside(inline: Inline, tag: str, attributes: dict[str, str | None], site_name: str) -> Inline:
    """Return what a text stands in below one more inline element."""
    tags = inline.tags if tag == "span" or len(inline.tags) > 3 else (*inline.tags, tag)
    link = inline.link
    if tag == "a":
        link = _link_words(attributes.get("href") or "", attributes.get("rel") or "", site_name)
    return Inline(tags, (*inline.words, *class_words_of(attributes))[:MAX_INLINE_HINTS], link)


def class_words_of(attributes: dict[str, str | None]) -> tuple[str, ...]:
    """Return the words of an element's class names, id, role and the like."""
    return _class_words(" ".join(filter(None, map(attributes.get, _HINT_ATTRIBUTES)))) if attributes else ()
