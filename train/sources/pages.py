"""Annotated web pages: stand-off labels joined with the pages that they are about.

Knows the annotation format and where pages lie; knows nothing of splits or models.
"""

import codecs
import gzip
import hashlib
import re
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from copydesk.labels import CLASSES, TopicList
from copydesk.page import PageError
from copydesk.split import RawPage, split
from train.config import PageSource

_SPACE = re.compile(r"\s+")


class Annotation(BaseModel):
    """One line of an annotation file."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    page: str
    url: str = ""
    site: str
    file: str = ""
    characters: int
    characters_sha256: str
    language: str = "en"
    genre: Literal["news", "other"] = "news"
    topics: list[str] | None = None
    spans: list[tuple[int, int, str]]

    @model_validator(mode="after")
    def _spans_cover_the_page(self) -> "Annotation":
        edges = [0, *(stop for _, stop, _ in self.spans)]
        starts = [start for start, _, _ in self.spans]
        if starts != edges[:-1] or edges[-1] != self.characters or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"spans must run without gaps from 0 to characters={self.characters}")
        if unknown := {label for _, _, label in self.spans} - set(CLASSES):
            raise ValueError(f"unknown labels {sorted(unknown)}, expected {', '.join(CLASSES)}")
        return self


@dataclass(frozen=True, slots=True)
class AnnotatedPage:
    """A page with a class for each of its sections."""

    annotation: Annotation
    source: str
    content: str
    raw: RawPage
    classes: list[int]
    """Index in `CLASSES` of each section."""
    group: str = ""
    """What a split keeps together, where that is more than the site."""
    work: str = ""
    """The article that a composed page shows: others may show it too."""
    only_train: bool = False

    def article(self) -> tuple[str, str]:
        """Return headline and body as annotated."""
        texts = self.raw.texts()
        parts: dict[str, list[str]] = {"headline": [], "body": []}
        for text, label in zip(texts, self.classes, strict=True):
            if CLASSES[label] in parts:
                parts[CLASSES[label]].append(text)
        return "\n".join(parts["headline"]), "\n\n".join(parts["body"])


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    source: str
    row: str
    reason: str


def read_pages(source: PageSource, topics: TopicList) -> Iterator[AnnotatedPage | BadRow]:
    """Yield each annotated page, or why it cannot be used.

    Raises:
        FileNotFoundError: the annotation file is missing.
    """
    if not source.annotations.is_file():
        raise FileNotFoundError(f"page source {source.name}: there is no annotation file {source.annotations}")
    seen: set[str] = set()
    content = source.annotations.read_bytes().removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{source.annotations}:{number}"
        try:
            annotation = Annotation.model_validate_json(line.decode("utf-8"))
            if annotation.page in seen:
                raise ValueError(f"page {annotation.page} occurs twice")
            seen.add(annotation.page)
            topics.with_parents(annotation.topics or ())
            yield _join(annotation, source)
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'row'}: {e['msg']}" for e in error.errors())
            yield BadRow(source.name, place, reasons)
        except UnicodeDecodeError as error:
            yield BadRow(source.name, place, f"the line is no UTF-8 ({error}): save the file as UTF-8")
        except (ValueError, OSError, EOFError, zlib.error) as error:
            yield BadRow(source.name, place, str(error))


def _join(annotation: Annotation, source: PageSource) -> AnnotatedPage:
    content = read_page(annotation, source.folder)
    try:
        raw = split(content, kind="text" if annotation.file.endswith((".txt", ".txt.gz")) else "html")
    except PageError as error:
        raise ValueError(f"page {annotation.page}: {error}") from error
    squeezed = [_SPACE.sub("", text) for text in raw.texts()]
    found = hashlib.sha256("".join(squeezed).encode()).hexdigest()
    if found != annotation.characters_sha256:
        raise ValueError(
            f"page {annotation.page} has other characters ({sum(map(len, squeezed))}, sha256 {found[:12]}…) than were "
            f"annotated ({annotation.characters}, {annotation.characters_sha256[:12]}…): "
            "fetch the version that was annotated, or annotate this one"
        )
    return AnnotatedPage(
        annotation, source.name, content, raw, classes_of(annotation, [len(text) for text in squeezed])
    )


def read_page(annotation: Annotation, folder: Path) -> str:
    """Read the page of an annotation, decoded as annotations are: as UTF-8 with replacement.

    Raises:
        FileNotFoundError: none of the names under which it may stand is there.
    """
    name = annotation.page.partition("/")[2] or annotation.page
    for candidate in (f"{name}.html.gz", f"{name}.html", f"{name}.txt", f"{name}.txt.gz", annotation.file):
        path = folder / candidate
        if candidate and path.is_file():
            data = path.read_bytes()
            return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "replace")
    raise FileNotFoundError(f"page {annotation.page} is not in {folder}: `python -m train.fetch` fills data/pages")


def classes_of(annotation: Annotation, lengths: list[int]) -> list[int]:
    """Return for each section the class that covers most of its characters.

    Args:
        annotation: with its spans.
        lengths: characters of each section, white space apart.
    """
    stops = [stop for _, stop, _ in annotation.spans]
    classes = []
    position = 0
    for length in lengths:
        shares: Counter[str] = Counter()
        end = position + length
        index = bisect_right(stops, position)
        while position < end:
            taken = min(end, stops[index]) - position
            shares[annotation.spans[index][2]] += taken
            position += taken
            index += 1
        classes.append(CLASSES.index(shares.most_common(1)[0][0]))
    return classes
