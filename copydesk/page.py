"""Page, Section, Topic: the vocabulary of the project, and the one output schema.

Knows the shape of an answer; knows nothing of how it comes about.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from copydesk.labels import SectionLabel


class PageError(ValueError):
    """A page cannot be read: it breaks a limit. The message says which, and how to raise it."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Scores(_Model):
    """Calibrated probability of each label; they add up to 1."""

    body: float
    boilerplate: float
    paywall: float
    sponsored: float


class Section(_Model):
    """A labelled stretch of the page: `page.text[start:end] == text`."""

    text: str
    label: SectionLabel
    role: Literal["headline"] | None = None
    """`headline` for the article's own headline and standfirst, which are labelled body."""
    score: float
    """Probability of `label`."""
    scores: Scores
    start: int = Field(ge=0)
    """First character in the page's text, counted in Unicode code points."""
    end: int = Field(ge=0)
    """One past the last character."""
    tag: str | None = None
    """The innermost HTML elements around the section, outermost first, e.g. `article>div>p`; null for plain text."""


class Topic(_Model):
    """A topic of the article."""

    id: str
    """IPTC Media Topics code, e.g. `medtop:20000638`."""
    name: str
    score: float
    """Calibrated probability."""
    implied: bool = False
    """True where the topic is here only because a narrower one is."""


class ModelInfo(_Model):
    """The model that made a prediction."""

    name: str
    version: str


class Page(_Model):
    """A page, read: the answer of `predict`, and one line of `--format jsonl`."""

    source: str | None = None
    """Where the page came from: a path as given or found, or null."""
    url: str | None = None
    text: str
    """The whole page's text, which `start` and `end` of sections index: blocks of HTML on lines of their own, with a
    blank line where a browser leaves a margin; for plain-text input the input itself."""
    headline: str | None
    """Headline and standfirst, one a line; null where the page has none."""
    body: str
    """The clean article without its headline, paragraphs joined by a blank line."""
    sections: list[Section]
    topics: list[Topic]
    model: ModelInfo


class FailedPage(_Model):
    """The row written in place of a page that could not be read."""

    source: str | None
    error: str
