"""One module a kind of corpus."""

from collections.abc import Iterator

from copydesk.labels import TopicList
from train.config import NewsroomSource, PageSource
from train.sources.composer import compose_pages
from train.sources.pages import AnnotatedPage, BadRow, read_pages


def annotated_pages(source: PageSource | NewsroomSource, topics: TopicList) -> Iterator[AnnotatedPage | BadRow]:
    """Read or compose the pages of a source.

    Raises:
        ValueError, OSError: a file of the source cannot be used.
    """
    if isinstance(source, NewsroomSource):
        return compose_pages(source, topics)
    return read_pages(source, topics)
