"""The files of the newsroom corpus: sites, articles and pieces of text, read and checked.

Knows front matter, Markdown, YAML and what makes a file unusable; knows nothing of how pages are mixed.
`data/newsroom/README.md` describes the files.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal, TypeVar, get_args

import jinja2
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from copydesk.labels import TopicList

Content = TypeVar("Content", bound=BaseModel)
Place = Literal["top", "badge", "above", "inline", "cut", "after", "side", "bottom"]
Wall = Literal["none", "meter", "hard", "registration", "donation", "freemium"]
PIECE_LABELS = ("paywall", "sponsored", "boilerplate")


class NewsroomError(ValueError):
    """A file of the corpus cannot be used. The message names it."""


class Facts(BaseModel):
    """What a template's front comment says of its site."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    domain: str
    city: str
    paywall: Wall
    residue: float = Field(default=0.0, ge=0, le=1)
    """Chance of unrendered template residue, if the template asks for it."""
    long: float = Field(default=0.0, ge=0, le=1)
    """Share of the pages that run long: guides, tables, round-ups, other articles of the site as chapters."""
    language: str = "en"
    """ISO 639 code; the site draws pieces of its language alone. Guides, round-ups and tables are English."""
    promoted: list[str] = ["Sponsored", "Ad", "Promoted", "Paid post", "Partner content"]
    """Labels of promoted teasers."""


class Article(BaseModel):
    """An article file: front matter and Markdown."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    headline: str
    dek: str = ""
    form: str
    topics: list[str]
    """Ids; their parents are implied."""
    author: str = ""
    published: date = Field(alias="date")
    kicker: str = ""
    caption: str = ""
    tags: list[str] = []
    slug: str
    markdown: str


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a piece: one section of the page."""

    kind: Literal["title", "text", "item", "button", "small"]
    text: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of paywall, sponsored or boilerplate text."""

    label: str
    family: str
    lines: list[Line]


@dataclass(frozen=True, slots=True)
class Family:
    """Pieces that do one thing in one way."""

    label: str
    name: str
    language: str
    places: list[str]
    pieces: list[Piece]


@dataclass(frozen=True)
class Block:
    """A block of an article as a template sees it."""

    kind: Literal["p", "h2", "ul", "quote", "table"]
    html: Markup = field(default_factory=Markup)
    items: list[Markup] = field(default_factory=list)
    rows: list[list[Markup]] = field(default_factory=list)

    @classmethod
    def heading(cls, text: str) -> "Block":
        """Return a subhead."""
        return cls("h2", html=Markup.escape(text))

    @classmethod
    def paragraph(cls, text: str) -> "Block":
        """Return a paragraph of plain text."""
        return cls("p", html=Markup.escape(text))

    @classmethod
    def strong(cls, text: str) -> "Block":
        """Return a paragraph in bold, as pages without subheads have them."""
        return cls("p", html=Markup("<strong>{}</strong>").format(text))

    @classmethod
    def bullets(cls, items: Iterable[str]) -> "Block":
        """Return a list."""
        return cls("ul", items=[Markup.escape(item) for item in items])

    @classmethod
    def table(cls, rows: Iterable[Sequence[str]]) -> "Block":
        """Return a table; its first row is the head."""
        return cls("table", rows=[[Markup.escape(cell) for cell in row] for row in rows])


_LINE_KINDS: dict[str, Literal["title", "item", "button", "small"]] = {
    "# ": "title",
    "- ": "item",
    "> ": "button",
    "~ ": "small",
}


def _lines(text: str) -> list[Line]:
    lines = []
    for raw in filter(None, map(str.strip, text.split("\n"))):
        kind = _LINE_KINDS.get(raw[:2])
        lines.append(Line(kind, raw[2:].strip()) if kind else Line("text", raw))
    return lines


def _read_family(path: Path, label: str) -> Family:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
        pieces = [Piece(label, path.stem, _lines(text)) for text in content["pieces"]]
        places, language = list(content["places"]), str(content.get("language", "en"))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise NewsroomError(f"{path}: expected `places` and `pieces`, a list of texts: {error}") from error
    if unknown := set(places) - set(get_args(Place)):
        raise NewsroomError(f"{path}: unknown places {sorted(unknown)}, expected {', '.join(get_args(Place))}")
    if empty := [i for i, piece in enumerate(pieces) if not piece.lines]:
        raise NewsroomError(f"{path}: piece {empty[0]} is empty")
    return Family(label, path.stem, language, places, pieces)


def _read_article(path: Path, topics: TopicList) -> Article:
    _, front, markdown = [*path.read_text("utf-8").split("---\n", 2), "", ""][:3]
    slugs = {topic.slug: topic.id for topic in topics.topics}
    try:
        content = yaml.safe_load(front)
        if unknown := set(content.get("topics") or ()) - set(slugs):
            raise NewsroomError(f"{path}: unknown topics {sorted(unknown)}, expected slugs of the topic list")
        content["topics"] = [slugs[slug] for slug in content.get("topics") or ()]
        return Article.model_validate(content | {"slug": path.stem, "markdown": markdown})
    except (yaml.YAMLError, AttributeError, ValidationError) as error:
        raise NewsroomError(f"{path}: the front matter cannot be read: {error}") from error


def read_folder(folder: Path, kind: type[Content]) -> list[Content]:
    """Read the YAML files of a folder, in the order of their names.

    Raises:
        NewsroomError: a file cannot be used.
    """
    contents = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            contents.append(kind.model_validate(yaml.safe_load(path.read_text("utf-8"))))
        except (yaml.YAMLError, ValidationError) as error:
            raise NewsroomError(f"{path}: {error}") from error
    return contents


_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")


def blocks_of(markdown: str) -> list[Block]:
    """Return the blocks of an article's Markdown."""
    blocks: list[Block] = []
    tokens = _MARKDOWN.parse(markdown)
    position = 0
    while position < len(tokens):
        token = tokens[position]
        end = position + 1
        if token.nesting == 1:
            while not (tokens[end].nesting == -1 and tokens[end].level == token.level):
                end += 1
            blocks.append(_block(token.type, tokens[position : end + 1]))
            end += 1
        position = end
    return blocks


def _block(kind: str, tokens: Sequence[Token]) -> Block:
    inline = [token for token in tokens if token.type == "inline"]
    rendered = [Markup(_MARKDOWN.renderer.render([token], _MARKDOWN.options, {})) for token in inline]  # noqa: S704
    if kind in {"bullet_list_open", "ordered_list_open"}:
        return Block("ul", items=rendered)
    if kind == "table_open":
        rows: list[list[Markup]] = []
        cells = iter(rendered)
        for token in tokens:
            if token.type == "tr_open":
                rows.append([])
            elif token.type in {"th_open", "td_open"}:
                rows[-1].append(next(cells))
        return Block("table", rows=rows)
    names: dict[str, Literal["h2", "quote", "p"]] = {"heading_open": "h2", "blockquote_open": "quote"}
    return Block(names.get(kind, "p"), html=Markup(" ").join(rendered))


_FACTS = re.compile(r"\{#(.*?)#\}", re.DOTALL)


class Site:
    """A fictional paper: facts, template and articles."""

    def __init__(self, path: Path, articles: list[Article], environment: jinja2.Environment) -> None:
        source = path.read_text("utf-8")
        found = _FACTS.match(source)
        try:
            self.facts = Facts.model_validate(yaml.safe_load(found[1]) if found else None)
            self.template = environment.from_string(source)
        except (yaml.YAMLError, ValidationError, jinja2.TemplateError) as error:
            raise NewsroomError(f"{path}: {error}") from error
        self.path = path
        self.articles = articles


class Newsroom:
    """The corpus, read and checked."""

    def __init__(self, folder: Path, topics: TopicList) -> None:
        """Read the files.

        Raises:
            NewsroomError: one cannot be used.
        """
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self.topics = topics
        self.sites = [
            Site(
                path,
                [_read_article(file, topics) for file in sorted((folder / "articles" / path.stem).glob("*.md"))],
                environment,
            )
            for path in sorted((folder / "sites").glob("*.html"))
        ]
        self.guides = [_read_article(file, topics) for file in sorted((folder / "guides").glob("*.md"))]
        if not self.sites:
            raise NewsroomError(f"{folder} has no site: expected sites/NAME.html and articles/NAME/SLUG.md")
        if bare := [site.path for site in self.sites if not site.articles]:
            raise NewsroomError(f"{bare[0]} has no article: expected {folder}/articles/{bare[0].stem}/SLUG.md")
        self.families = [
            _read_family(path, label) for label in PIECE_LABELS for path in sorted((folder / label).glob("*.yaml"))
        ]

    def pieces_for_templates(self, kind: Literal["comments", "teasers"], language: str) -> list[Piece]:
        """Return what templates draw themselves: the families `comments` and `teasers`, `comments-de` and so on."""
        names = {kind, f"{kind}-{language}"}
        return [
            piece
            for family in self.families
            if family.name in names and family.language == language
            for piece in family.pieces
        ]
