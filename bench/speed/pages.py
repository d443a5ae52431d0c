"""Pages and articles that any checkout has: composed from data/newsroom, and those of data/sample."""

from itertools import islice
from pathlib import Path

from bench.speed.setup import ROOT
from train.config import NewsroomSource, PageSource
from train.sources import annotated_pages
from train.sources.articles import read_topics
from train.sources.newsroom import Newsroom
from train.sources.pages import AnnotatedPage, BadRow

_SAMPLE = PageSource(
    name="sample",
    annotations=ROOT / "data" / "sample" / "annotations.jsonl",
    folder=ROOT / "data" / "sample" / "pages",
)
_NEWSROOM = ROOT / "data" / "newsroom"
_TOPICS = ROOT / "data" / "topics.yaml"


def read_pages(count: int) -> list[AnnotatedPage]:
    """Return HTML pages, a quarter of them from the sample as far as it goes, the others composed: always the same."""
    topics = read_topics(_TOPICS)
    sample = (page for page in annotated_pages(_SAMPLE, topics) if not isinstance(page, BadRow))
    pages = list(islice((page for page in sample if page.raw.kind == "html"), count // 4))
    newsroom = NewsroomSource(name="newsroom", newsroom=_NEWSROOM, num_pages=count - len(pages), only_train=True)
    return pages + [page for page in annotated_pages(newsroom, topics) if not isinstance(page, BadRow)]


def write_pages(folder: Path, count: int) -> None:
    """Write pages into a folder, an HTML file each."""
    folder.mkdir()
    for number, page in enumerate(read_pages(count)):
        (folder / f"{number:06}.html").write_text(page.content, "utf-8")


def read_long_articles(count: int) -> list[tuple[str, list[str]]]:
    """Return articles of more than 512 tokens, each with its topics: one of the newsroom and the next of its site."""
    newsroom = Newsroom(_NEWSROOM, read_topics(_TOPICS))
    found = []
    for number in range(count):
        articles = newsroom.sites[number % len(newsroom.sites)].articles
        place = number // len(newsroom.sites)
        first, second = (articles[(place + i) % len(articles)] for i in range(2))
        found.append((f"{first.headline}\n{first.markdown}\n{second.markdown}", first.topics))
    return found
