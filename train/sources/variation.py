"""Vary the shape of composed pages: how paragraphs are cut, which tags and class names carry them.

A site has one template, but real sites have thousands. What stays the same over all of these shapes is what a model
should learn. Knows blocks and HTML; knows nothing of labels, texts or where pieces stand.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from markupsafe import Markup

from train.sources.newsroom import Block

_SENTENCES = re.compile(r"(?<=[a-z][.!?]) (?=[A-Z])")


def reshaped(blocks: Sequence[Block], random: Random) -> list[Block]:
    """Return the blocks of an article, on some pages in one-sentence paragraphs, or with lists for paragraphs."""
    draw = random.random()
    if draw < 0.1:
        return [part for block in blocks for part in _sentences(block)]
    if draw < 0.25:
        return [_as_list(block) if random.random() < 0.3 else block for block in blocks]
    return list(blocks)


def _sentences(block: Block) -> list[Block]:
    if block.kind != "p":
        return [block]
    return [replace(block, html=part) for part in _parts(block)]


def _as_list(block: Block) -> Block:
    if block.kind != "p" or len(parts := _parts(block)) < 2:
        return block
    return Block("ul", items=parts)


def _parts(block: Block) -> list[Markup]:
    if "<" in block.html:  # a sentence may end inside an element
        return [block.html]
    return [Markup(part) for part in _SENTENCES.split(str(block.html))]  # noqa: S704 (rendered from our own Markdown)


_SOUP = "article section main nav header footer aside figure figcaption".split()
_ATTRIBUTES = re.compile(r' (?:class|id|role)="[^"]*"')


def retagged(html: str, random: Random) -> str:
    """Return a page as another site might build it: other headings, `div` for other elements, no class names."""
    changes: dict[str, str] = {}
    if random.random() < 0.4:
        changes["h2"] = random.choice(["h3", "h4", "h5"])
    if random.random() < 0.15:
        changes |= dict.fromkeys(_SOUP, "div")
    if random.random() < 0.1 and len(re.findall(r"<p[\s>]", html)) == html.count("</p>"):
        changes["p"] = "div"
    for tag, other in changes.items():
        html = re.sub(rf"<(/?){tag}(?=[\s>])", rf"<\1{other}", html)
    return _ATTRIBUTES.sub("", html) if random.random() < 0.1 else html
