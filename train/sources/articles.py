"""Topic-labelled articles: JSON lines, Parquet or a hub data set, with a label map.

Knows columns, label maps and what a source can decide; knows nothing of splits or models.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import datasets
import pyarrow as pa
import tldextract
import yaml

from copydesk.labels import TopicInfo, TopicList
from train.config import ArticleSource
from train.sources.pages import BadRow

_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
_MAP_FORM = 'Expected a list of topic ids for each label, as in sport: ["medtop:15000000"], [] where it means no topic'


@dataclass(frozen=True, slots=True)
class LabelledArticle:
    """An article with the topics that are known of it."""

    id: str
    source: str
    site: str
    title: str
    text: str
    language: str
    topics: list[str]
    """Ids of those that hold, parents included."""
    decided: list[str]
    """Ids of those of which it is known whether they hold."""
    weak: bool


def read_topics(path: Path) -> TopicList:
    """Read a topic list, a YAML list of entries with id, slug, name, parent and definition.

    Raises:
        ValueError: it is no such list; the message says what is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
        return TopicList(TopicInfo.model_validate(entry) for entry in content["topics"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the topic list {path} cannot be used: {error}. data/topics.yaml shows its form") from error


def read_articles(source: ArticleSource, topics: TopicList) -> Iterator[LabelledArticle | BadRow]:
    """Yield each article, or why it cannot be used.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file has another ending, a column is missing, or the label map cannot be used.
    """
    rows = _rows(source)
    needed = {source.text_column, source.labels_column} | ({source.title_column} if source.title_column else set())
    if missing := needed - set(rows.column_names):
        raise ValueError(
            f"article source {source.name} lacks the columns {sorted(missing)}, it has {sorted(rows.column_names)}: "
            "name them in the config"
        )
    label_map = _label_map(source, topics)
    decidable = [topic.id for topic in topics.topics] if source.decidable == "all" else list(source.decidable)
    topics.with_parents(decidable)
    order = list(range(len(rows)))
    if source.max_tokens is not None:
        random.Random(source.name).shuffle(order)  # noqa: S311 (a sample, no secret)
    budget = source.max_tokens or float("inf")
    for index in order:
        if budget <= 0:
            return
        row = rows[index]
        try:
            article = _article(row, index, source=source, topics=topics, label_map=label_map, decidable=decidable)
        except ValueError as error:
            yield BadRow(source.name, f"{source.path} row {index + 1}", str(error))
            continue
        budget -= (len(article.title) + len(article.text)) / 4
        yield article


def _rows(source: ArticleSource) -> datasets.Dataset:
    path = Path(source.path)
    if source.path.endswith(_ENDINGS):
        if not path.is_file():
            raise FileNotFoundError(
                f"article source {source.name}: there is no file {path}: fetch it, or leave the source out with "
                "`--set prepare.articles=[]`"
            )
        read = datasets.Dataset.from_parquet if path.suffix == ".parquet" else datasets.Dataset.from_json
        try:
            return read(str(path))
        except (datasets.exceptions.DatasetGenerationError, RuntimeError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"article source {source.name}: {path} cannot be read ({error}): "
                "`python -m train.check` names the broken rows"
            ) from error
    if path.exists():
        raise ValueError(
            f"article source {source.name}: {path} is no file whose name ends in {', '.join(_ENDINGS)}: "
            "convert it to one of these"
        )
    return datasets.load_dataset(source.path, source.hub_config, split=source.hub_split)


def _label_map(source: ArticleSource, topics: TopicList) -> dict[str, list[str]] | None:
    if source.label_map is None:
        return None
    path = source.label_map
    try:
        content = path.read_text("utf-8")
        mapped = json.loads(content) if path.suffix == ".json" else yaml.safe_load(content)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"the label map {path} cannot be read: {error}. {_MAP_FORM}") from error
    if not isinstance(mapped, dict):
        raise ValueError(f"the label map {path} holds {type(mapped).__name__}. {_MAP_FORM}")  # noqa: TRY004 (a fault of the file)
    topics_of: dict[str, list[str]] = {}
    for label, ids in mapped.items():
        if not isinstance(ids, list) or not all(isinstance(topic, str) for topic in ids):
            raise ValueError(f"the label map {path} maps {str(label)!r} to {ids!r}. {_MAP_FORM}")
        try:
            topics_of[str(label)] = topics.with_parents(ids)
        except ValueError as error:
            raise ValueError(f"the label map {path} maps {str(label)!r} to {ids!r}: {error}") from error
    return topics_of


def _article(
    row: dict[str, Any],
    index: int,
    *,
    source: ArticleSource,
    topics: TopicList,
    label_map: dict[str, list[str]] | None,
    decidable: list[str],
) -> LabelledArticle:
    text = row[source.text_column]
    title = row.get(source.title_column or "") or ""
    if not isinstance(title, str):
        raise ValueError(f"column {source.title_column} holds {title!r}, expected the article's title")  # noqa: TRY004
    if not isinstance(text, str) or not (text.strip() or title.strip()):
        raise ValueError(f"column {source.text_column} holds {str(text)[:40]!r}, expected the article's text")
    labels = row[source.labels_column]
    if labels is None or not isinstance(labels, str | int | list):
        raise ValueError(f"column {source.labels_column} holds {labels!r}, expected a label or a list of labels")
    labels = [str(label) for label in (labels if isinstance(labels, list) else [labels])]
    if label_map is not None:
        if unmapped := sorted(set(labels) - set(label_map)):
            raise ValueError(f"labels {unmapped} are not in the label map: map each, to [] where it means no topic")
        labels = [topic for label in labels for topic in label_map[label]]
    holding = topics.with_parents(labels)
    decided = holding if source.only_positive else sorted({*decidable, *holding}, key=topics.index.__getitem__)
    identity = (
        str(row[source.id_column]) if source.id_column and row.get(source.id_column) else f"{source.name}-{index}"
    )
    return LabelledArticle(
        id=identity,
        source=source.name,
        site=_site(row, source),
        title=title,
        text=text,
        language=source.language,
        topics=holding,
        decided=decided,
        weak=source.weak,
    )


def _site(row: dict[str, Any], source: ArticleSource) -> str:
    url = row.get(source.url_column or "") or ""
    if urlsplit(url).hostname:
        return site_of(url)
    publisher = str(row.get(source.publisher_column or "") or source.name)
    return source.sites.get(publisher, publisher)


@cache
def _extract() -> tldextract.TLDExtract:
    return tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)  # the list that it ships, never the network


def site_of(url: str) -> str:
    """Return the registrable domain of an address, else its host."""
    parts = _extract()(url)
    if parts.top_domain_under_public_suffix or parts.ipv4:
        return parts.top_domain_under_public_suffix or parts.ipv4
    return ".".join((urlsplit(url).hostname or url).split(".")[-2:])
