"""Mix sites, articles and pieces of the newsroom corpus into whole pages with exact labels, from a seed.

Knows what stands on a page, where and how often; knows nothing of files, splits or models.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from random import Random
from typing import Any, get_args

import jinja2
from markupsafe import Markup
from selectolax.lexbor import LexborHTMLParser, LexborNode

from copydesk.labels import CLASSES, TopicList
from copydesk.split import SKIPPED_TAGS, split
from train.config import NewsroomSource
from train.sources.material import NUM_GROUPS, Material, read_material
from train.sources.newsroom import (
    Article,
    Block,
    Family,
    Line,
    Newsroom,
    NewsroomError,
    Piece,
    Place,
    Site,
    blocks_of,
)
from train.sources.pages import AnnotatedPage, Annotation, classes_of
from train.sources.roundups import blocks_of_roundup
from train.sources.tables import blocks_of_table
from train.sources.variation import reshaped, retagged


def compose_pages(source: NewsroomSource, topics: TopicList) -> Iterator[AnnotatedPage]:
    """Compose the pages that a config asks for.

    Raises:
        NewsroomError: a file of the corpus cannot be used.
    """
    newsroom = Newsroom(source.newsroom, topics)
    everything = read_material(newsroom, source.newsroom)
    sites = [
        (place % NUM_GROUPS, site)
        for place, site in enumerate(newsroom.sites)
        if source.languages is None or site.facts.language in source.languages
    ]
    if not sites:
        known = sorted({site.facts.language for site in newsroom.sites})
        raise NewsroomError(f"{source.newsroom} has no site in {source.languages}, expected some of {known}")
    for number in range(source.num_pages):
        copy, place = divmod(number, len(sites))
        group, site = sites[place]
        material = everything if source.only_train else everything.of_group(group)
        composer = Composer(newsroom, site, material.of_language(site.facts.language), seed=source.seed, copy=copy)
        html, spans = composer.page()
        raw = split(html, kind="html")
        squeezed = [_SPACE.sub("", text) for text in raw.texts()]
        annotation = composer.annotation(f"{source.name}/{composer.name}", "".join(squeezed), spans)
        yield AnnotatedPage(
            annotation,
            source.name,
            html,
            raw,
            classes_of(annotation, [len(text) for text in squeezed]),
            group="" if source.only_train else f"{source.name}-{group}",
            work=f"{source.name}/{composer.work}",
            only_train=source.only_train,
        )


WALLED, ADVERTISED = 0.5, 0.48
"""Share of the pages of papers with a paywall that show one, and of all pages that show advertising: on the real
newsroom pages two in five have paywall text, nearly half sponsored text."""
GUIDED = 0.4
"""Share of long pages that show a guide in place of the site's article."""
MAX_CHAPTERS = 8
"""Articles that follow the first one on a long page."""
TABLED = 0.35
"""Share of the other long pages that hold data tables."""
ROUNDED_UP = 0.6
"""Share of what is left of them that holds a round-up."""

_DOUBLED_ARTICLE = re.compile(r"\b[Tt]he (?=\[\[paper)")
_LABEL = re.compile(r' data-label="[a-z]*"')
_SPACE = re.compile(r"\s+")


class Composer:
    """Composes one page."""

    def __init__(
        self,
        newsroom: Newsroom,
        site: Site,
        material: Material,
        *,
        seed: int,
        copy: int,
    ) -> None:
        """Plan a page.

        Args:
            newsroom: the corpus.
            site: whose page it is.
            material: from which the site draws.
            seed: of all that is drawn.
            copy: which of the site's pages; each shows the next of its articles.
        """
        self.newsroom, self.site, self.material = newsroom, site, material
        self.random = Random(f"{seed}:{site.facts.domain}:{copy}")  # noqa: S311 (a sample, no secret)
        article = site.articles[copy % len(site.articles)]
        self.name = f"{site.path.stem}/{article.slug}-{copy}"
        self.work = f"{site.path.stem}/{article.slug}"
        """Names the text that the page shows: pages of one text are no duplicates of each other."""
        published = article.published + timedelta(days=self.random.randrange(-400, 400))
        self.is_long = self.random.random() < site.facts.long
        if self.is_long and material.guides and self.random.random() < GUIDED:
            guide = self.random.choice(material.guides)
            self.work, self.is_long = f"guides/{guide.slug}", False
            shown = {"headline", "dek", "form", "topics", "slug", "markdown"}
            article = article.model_copy(update=guide.model_dump(include=shown))
        self.article = article.model_copy(update={"published": published})
        self.blocks = reshaped(self._blocks(), self.random)
        self.planned: dict[str, list[Piece]] = {place: [] for place in get_args(Place)}
        self.inline: dict[int, list[Piece]] = {}
        self._inline_calls = 0
        self.absent: list[str] = []
        """Labels that the page does not have: what its template holds of them is taken out."""
        self.badge = ""
        self.promoted: list[str] = []
        self._plan()

    def _blocks(self) -> list[Block]:
        """Return the article; on a long page with tables, a round-up after its opening, or others as chapters."""
        blocks = blocks_of(self.article.markdown)
        if not self.is_long:
            return blocks
        tables, roundups = self.material.tables, self.material.roundups
        if tables and self.random.random() < TABLED:
            opening = self.random.randint(1, len(blocks))
            drawn = self.random.sample(tables, min(self.random.choice([1, 1, 2, 3, 4]), len(tables)))
            within = [block for table in drawn for block in blocks_of_table(table, self.random)]
            return blocks[:opening] + within + blocks[opening:]
        if roundups and self.random.random() < ROUNDED_UP:
            blocks = blocks[: self.random.randint(1, 3)]
            count = min(self.random.choice([1, 1, 1, 2, 3]), len(roundups))
            for roundup in self.random.sample(roundups, count):
                blocks += blocks_of_roundup(roundup, self.random)
            return blocks
        others = [article for article in self.site.articles if article.slug != self.article.slug]
        for article in self.random.sample(others, min(self.random.randint(1, MAX_CHAPTERS), len(others))):
            blocks += [Block("h2", html=Markup.escape(article.headline)), *blocks_of(article.markdown)]
        return blocks

    # What stands on the page. Frequencies are those of the real newsroom pages.

    def _plan(self) -> None:
        if self.site.facts.paywall != "none" and self.random.random() < WALLED:
            self._plan_paywall()
        else:
            self.absent.append("paywall")
        if self.random.random() < ADVERTISED:
            self._plan_sponsored()
        else:
            self.absent.append("sponsored")
        for _ in range(self.random.randint(4, 14)):
            self._add(self._family("boilerplate"))

    def _family(self, label: str, places: Sequence[str] = ()) -> Family | None:
        fitting = [
            family
            for family in self.material.families
            if family.label == label and (not places or set(places) & set(family.places))
        ]
        return self.random.choice(fitting) if fitting else None

    def _add(self, family: Family | None, *, place: str = "", times: int = 1) -> None:
        if family is None:
            return
        if not place:
            place = self.random.choice([p for p in family.places if p != "badge"] or ["above"])
        piece = self._filled(self.random.choice(family.pieces))
        for _ in range(times):
            if place == "inline" and len(self.blocks) > 1:
                self.inline.setdefault(self.random.randrange(len(self.blocks) - 1), []).append(piece)
            else:
                self.planned[place].append(piece)

    def _plan_paywall(self) -> None:
        draw = self.random.random
        if self.site.facts.paywall in {"hard", "meter", "registration", "freemium"} and draw() < 0.45:
            self._cut_article()
            self._add(self._family("paywall", ["cut", "after"]), place="cut")
        else:
            self._add(
                self._family("paywall", ["after", "inline", "cut"]),
                place=self.random.choice(["after", "after", "inline"]),
            )
        if draw() < 0.3:
            self._add(self._family("paywall", ["top"]), place="top")
        if draw() < 0.3:
            family = self._family("paywall", ["bottom"])
            for _ in range(self.random.choice([1, 1, 2, 3])):
                self._add(family, place="bottom")
        if draw() < 0.2:
            self._add(self._family("paywall", ["side"]), place="side")
        if draw() < 0.35 and (family := self._family("paywall", ["badge"])):
            self.badge = self._filled(self.random.choice(family.pieces)).lines[0].text
            if draw() < 0.5:
                self._add(family, place="above")

    def _cut_article(self) -> None:
        self.blocks = self.blocks[: self.random.randint(1, max(1, min(6, len(self.blocks) - 1)))]
        last = self.blocks[-1]
        words = str(last.html).split(" ")
        if last.kind == "p" and len(words) > 12 and "<" not in last.html and self.random.random() < 0.5:
            kept = " ".join(words[: self.random.randint(6, len(words) - 1)])
            self.blocks[-1] = Block("p", html=Markup(kept + self.random.choice(["…", "...", "", " …"])))  # noqa: S704

    def _plan_sponsored(self) -> None:
        draw = self.random.random
        if draw() < 0.6:
            family = self._family("sponsored", ["inline"])
            times = self.random.choice([1, 1, 2, 3, 5]) * (1 + len(self.blocks) // 40)
            self._add(family, place="inline", times=times)
        if draw() < 0.35:
            for _ in range(self.random.choice([1, 1, 2])):
                self._add(self._family("sponsored", ["after", "bottom"]))
        if draw() < 0.3:
            for _ in range(self.random.choice([1, 2, 3])):
                self._add(self._family("sponsored", ["side"]), place="side")
        if draw() < 0.2:
            self._add(self._family("sponsored", ["top"]), place="top")
        if draw() < 0.2:
            self.promoted = self.random.sample(self.site.facts.promoted, 1)

    def _filled(self, piece: Piece) -> Piece:
        facts = self.site.facts
        lines = []
        for line in piece.lines:
            text = _DOUBLED_ARTICLE.sub("", line.text) if facts.name.startswith("The ") else line.text
            text = text.replace("[[paper]]", facts.name).replace("[[domain]]", facts.domain)
            lines.append(Line(line.kind, text.replace("[[city]]", facts.city)))
        return Piece(piece.label, piece.family, lines)

    # What a template may call.

    def at(self, place: str) -> list[Piece]:
        """Return the pieces that stand at a place; `inline` is another place at each call."""
        if place == "inline":
            self._inline_calls += 1
            return self.inline.get(self._inline_calls - 1, [])
        return self.planned[place]

    def chance(self, probability: float) -> bool:
        """Return true with this probability."""
        return self.random.random() < probability

    def pick(self, items: Sequence[Any], count: int) -> list[Any]:
        """Return some of the items, in order."""
        chosen = sorted(self.random.sample(range(len(items)), min(count, len(items))))
        return [items[i] for i in chosen]

    def teasers(self, count: int) -> list[dict[str, Any]]:
        """Return teasers of other articles, some of them promoted ones."""
        own = [article for article in self.site.articles if article.slug != self.article.slug]
        others = self.newsroom.pieces_for_templates("teasers", self.site.facts.language)
        found = []
        for _ in range(count):
            badge = self.badge if self.badge and self.random.random() < 0.4 else ""
            teaser: dict[str, Any] = {"kicker": "", "author": "", "badge": badge, "ad": ""}
            teaser["date"] = self.article.published - timedelta(days=self.random.randrange(0, 9))
            if self.promoted and self.random.random() < 0.2 and (ad := self._family("sponsored", ["after", "bottom"])):
                texts = [line.text for line in self._filled(self.random.choice(ad.pieces)).lines]
                teaser |= {"headline": self.random.choice(texts), "dek": "", "ad": self.promoted[0], "badge": ""}
            elif own and self.random.random() < 0.35:
                article = self.random.choice(own)
                teaser |= {"headline": article.headline, "dek": article.dek, "kicker": article.kicker}
                teaser["author"] = article.author
            elif others:
                lines = self._filled(self.random.choice(others)).lines
                teaser |= {"headline": lines[0].text, "dek": " ".join(line.text for line in lines[1:])}
            else:
                continue
            found.append(teaser)
        return found

    def comments(self, count: int) -> list[dict[str, Any]]:
        """Return comments of readers."""
        return [
            {
                "author": self.random.choice(_NICKNAMES) + str(self.random.choice(["", "", 7, 62, 1951, "_x"])),
                "when": f"{self.random.randint(1, 23)} {self.random.choice(['hours', 'h', 'hrs', 'days'])} ago",
                "text": " ".join(line.text for line in piece.lines),
                "likes": self.random.randint(0, 90),
            }
            for piece in self.pick(self.newsroom.pieces_for_templates("comments", self.site.facts.language), count)
        ]

    def page(self) -> tuple[str, list[tuple[int, int, str]]]:
        """Render the page; return its HTML and its label spans.

        Raises:
            NewsroomError: the template cannot be rendered.
        """
        try:
            labelled = self.site.template.render(
                article=_View(self.article, self.blocks),
                site=self.site.facts,
                at=self.at,
                chance=self.chance,
                pick=self.pick,
                teasers=self.teasers,
                comments=self.comments,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise NewsroomError(
                f"{self.site.path}, article {self.article.slug}: {type(error).__name__}: {error}"
            ) from error
        labelled = retagged(labelled, self.random)
        if self.absent:
            tree = LexborHTMLParser(labelled)
            for label in self.absent:
                for node in tree.css(f"[data-label={label}]"):
                    node.decompose()
            labelled = tree.html or ""
        return _LABEL.sub("", labelled), spans_of(labelled)

    def annotation(self, page: str, characters: str, spans: list[tuple[int, int, str]]) -> Annotation:
        """Return what an annotation file would say of the page."""
        site = self.site.facts
        return Annotation(
            page=page,
            url=f"https://www.{site.domain}/{self.article.published:%Y/%m}/{self.article.slug}",
            site=site.domain,
            characters=len(characters),
            characters_sha256=hashlib.sha256(characters.encode()).hexdigest(),
            language=site.language,
            topics=list(self.newsroom.topics.with_parents(self.article.topics)),
            spans=spans,
        )


_NICKNAMES = (
    "Oldharbour Ned Mrs_Pickering tallis Bramblewick JoWinter readerfromhull K_Asante dustbowl Ferryman quietcarriage "
    "Lindqvist PatM NotARobot Gran_of_six velodrome HarshaD Onlooker Marten_K saltmarsh anon Piet_vdM crankshaft"
).split()


class _View:
    """An article as templates see it."""

    def __init__(self, article: Article, blocks: list[Block]) -> None:
        self.headline, self.dek, self.form = article.headline, article.dek, article.form
        self.author, self.date, self.kicker = article.author, article.published, article.kicker
        self.caption, self.tags, self.blocks = article.caption, article.tags, blocks


def spans_of(labelled: str) -> list[tuple[int, int, str]]:
    """Return the label spans over the characters of a page whose elements bear `data-label`.

    Raises:
        NewsroomError: an unknown label.
    """
    spans: list[tuple[int, int, str]] = []
    position = 0
    stack: list[tuple[LexborNode | None, str]] = [(LexborHTMLParser(labelled).body, "boilerplate")]
    while stack:
        node, label = stack.pop()
        if node is None or node.tag in SKIPPED_TAGS:
            continue
        if node.tag == "-text":
            length = len(_SPACE.sub("", node.text_content or ""))
            if length and spans and spans[-1][2] == label:
                spans[-1] = (spans[-1][0], position + length, label)
            elif length:
                spans.append((position, position + length, label))
            position += length
            continue
        label = (node.attributes or {}).get("data-label") or label
        if label not in CLASSES:
            raise NewsroomError(f"data-label is {label!r}, expected one of {', '.join(CLASSES)}")
        children = []
        child = node.child
        while child is not None:
            children.append((child, label))
            child = child.next
        stack.extend(reversed(children))
    return spans
