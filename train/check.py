"""Check label files before they are trained on, and begin the annotation of a page.

Knows how to read a user's files and what to count; what is valid is decided in `train.sources`.
"""

import argparse
import gzip
import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets

from copydesk.labels import CLASSES, TopicList
from copydesk.page import PageError
from copydesk.split import RawSection, split
from train.arguments import ConfigError, load_experiment
from train.config import ArticleSource, NewsroomSource, PageSource
from train.sources import annotated_pages
from train.sources.articles import LabelledArticle, read_articles, read_topics
from train.sources.pages import AnnotatedPage, BadRow


@dataclass(slots=True)
class Findings:
    """What a label file holds."""

    title: str
    bad: list[BadRow] = field(default_factory=list)
    num_good: int = 0
    columns: tuple[str, ...] = ()
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    """For each label or topic, a count for each column."""


def check_pages(source: PageSource | NewsroomSource, topics: TopicList) -> Findings:
    """Read or compose annotated pages and count their labels and topics."""
    if isinstance(source, NewsroomSource):
        title = f"{source.newsroom}: composed pages"
    else:
        title = f"{source.annotations}: pages in {source.folder}"
    findings = Findings(title, columns=("pages", "sections"))
    findings.counts = {name: Counter() for name in (*CLASSES, *topics.slugs())}
    for page in annotated_pages(source, topics):
        if isinstance(page, BadRow):
            findings.bad.append(page)
            continue
        findings.num_good += 1
        _count_page(page, findings.counts, topics)
    return findings


def _count_page(page: AnnotatedPage, counts: dict[str, Counter[str]], topics: TopicList) -> None:
    for label, sections in Counter(page.classes).items():
        counts[CLASSES[label]].update(pages=1, sections=sections)
    for topic in topics.with_parents(page.annotation.topics or ()):
        counts[topics.topics[topics.index[topic]].slug].update(pages=1)


def check_articles(source: ArticleSource, topics: TopicList) -> Findings:
    """Read topic-labelled articles, all of them, and count what is known of each topic."""
    findings = Findings(f"{source.path}: articles", columns=("yes", "no", "unknown"))
    findings.counts = {slug: Counter() for slug in topics.slugs()}
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        lines: list[int] | None = None
        readable = source.model_copy(update={"max_tokens": None})  # a sample is taken in another order
        if source.path.endswith((".jsonl", ".jsonl.gz")) and Path(source.path).is_file():
            copy = Path(folder) / "rows.jsonl"
            lines, findings.bad = _sound_lines(source, copy)
            if not lines:
                return findings
            if findings.bad or lines[-1] != len(lines):
                readable = readable.model_copy(update={"path": str(copy)})
        for index, article in enumerate(read_articles(readable, topics)):
            if isinstance(article, BadRow):
                place = f"{source.path}:{lines[index]}" if lines else article.row
                findings.bad.append(BadRow(source.name, place, article.reason))
                continue
            findings.num_good += 1
            _count_article(article, findings.counts, topics)
    return findings


def _count_article(article: LabelledArticle, counts: dict[str, Counter[str]], topics: TopicList) -> None:
    holding, decided = set(article.topics), set(article.decided)
    for topic in topics.topics:
        known = "yes" if topic.id in holding else "no" if topic.id in decided else "unknown"
        counts[topic.slug][known] += 1


def _sound_lines(source: ArticleSource, copy: Path) -> tuple[list[int], list[BadRow]]:
    """Copy the lines that hold a JSON object, since one that does not stops the reader at no line in particular.

    Returns:
        The number of each copied line, and the lines that are no object.
    """
    lines, bad = [], []
    with copy.open("wb") as output:
        for number, line in _numbered_lines(Path(source.path)):
            try:
                if not isinstance(json.loads(line), dict):
                    raise ValueError("expected an object in braces")  # noqa: TRY004 (a fault of the file)
            except ValueError as error:
                bad.append(BadRow(source.name, f"{source.path}:{number}", f"no JSON object: {error}"))
                continue
            output.write(line.rstrip(b"\r\n") + b"\n")
            lines.append(number)
    return lines, bad


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def kind_of(path: Path) -> str:
    """Tell annotated pages from labelled articles: the first sound row of pages has spans."""
    if path.suffix == ".parquet":
        return "articles"
    for _, line in _numbered_lines(path):
        try:
            return "pages" if "spans" in json.loads(line) else "articles"
        except (ValueError, TypeError):
            continue
    return "articles"


def new_annotation(path: Path, *, folder: Path) -> tuple[list[tuple[int, int, RawSection, str]], dict[str, Any]]:
    """Begin the annotation of a page.

    Args:
        path: HTML, or plain text if it ends in .txt; .gz is unpacked.
        folder: the page source's folder, in which the page lies.

    Returns:
        Start and end of each section in the page's characters, with the section and its text; and the annotation, all
        boilerplate, to be filled in.

    Raises:
        ValueError: the page is not in the folder, or holds no text.
        PageError: it breaks a limit.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is not in the folder {folder}: name the one that the config will name with --pages")
    file = path.resolve().relative_to(folder.resolve()).as_posix()
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    stem = file.removesuffix(".gz")
    raw = split(data.decode("utf-8", "replace"), kind="text" if stem.endswith(".txt") else "html")
    texts = raw.texts()
    squeezed = ["".join(text.split()) for text in texts]
    ends = list(accumulate(map(len, squeezed)))
    if not ends:
        raise ValueError(f"{path} holds no text to label")
    name = stem.rpartition(".")[0] or stem
    annotation = {
        "page": f"{folder.resolve().name}/{name}",
        "url": "",
        "site": f"{name.partition('/')[0]}.test",
        "file": file,
        "characters": ends[-1],
        "characters_sha256": hashlib.sha256("".join(squeezed).encode()).hexdigest(),
        "html_sha256": hashlib.sha256(data).hexdigest(),
        "reviewed": False,
        "language": "en",
        "genre": "news",
        "topics": None,
        "spans": [[0, ends[-1], "boilerplate"]],
    }
    return list(zip([0, *ends], ends, raw.sections, texts, strict=False)), annotation


def _print_new(path: Path, folder: Path) -> None:
    """Print sections to stderr and the annotation to stdout, so that `>> FILE` keeps the annotation alone."""
    sections, annotation = new_annotation(path, folder=folder)
    print(f"{'':>5}{'start':>8}{'end':>8}", file=sys.stderr)
    for number, (start, end, section, text) in enumerate(sections):
        shown = " ".join(text.split())
        shown = shown if len(shown) <= 100 else f"{shown[:70]} … {shown[-27:]}"
        print(f"{number:>5}{start:>8}{end:>8}  {section.tag or 'text'}: {shown}", file=sys.stderr)
    print(json.dumps(annotation, ensure_ascii=False))


def _print_findings(findings: Findings) -> None:
    print(f"{findings.title}: {findings.num_good} good, {len(findings.bad)} bad")
    for row in findings.bad:
        print(f"  {row.row}: {row.reason}")
    if not findings.num_good:
        print("  no good row")
        return
    print(f"  {'':<26}" + "".join(f"{column:>10}" for column in findings.columns))
    for name, counts in findings.counts.items():
        print(f"  {name:<26}" + "".join(f"{counts.get(column, '-'):>10}" for column in findings.columns))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="Check label files: annotated pages (JSON lines) or topic-labelled articles (JSON lines, Parquet)."
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="a label file with the usual column names")
    parser.add_argument("--config", type=Path, metavar="FILE", help="check every source of this experiment as it says")
    parser.add_argument("--pages", type=Path, metavar="FOLDER", help="where the pages lie; else data/pages/FILE's name")
    parser.add_argument(
        "--topics", type=Path, metavar="FILE", help="the topic list; else the config's or data/topics.yaml"
    )
    parser.add_argument("--kind", choices=["pages", "articles"], help="what FILE holds; else told by its first row")
    parser.add_argument("--new", type=Path, metavar="PAGE", help="print a page's sections and an annotation to fill in")
    options = parser.parse_args(arguments)
    datasets.disable_progress_bars()
    if not (options.files or options.config or options.new):
        parser.error("name a label file, or an experiment with --config, or a page with --new")
    try:
        if options.new:
            _print_new(options.new, options.pages or options.new.parent)
            return
        sources, topics = _sources_from(options)
    except (ConfigError, ValueError, PageError, OSError) as error:
        sys.exit(f"check: {error}")
    sound = [_check(source, topics) for source in sources]
    if not all(sound):
        sys.exit(1)


def _sources_from(options: argparse.Namespace) -> tuple[list[PageSource | NewsroomSource | ArticleSource], TopicList]:
    sources: list[PageSource | NewsroomSource | ArticleSource] = []
    topics = options.topics
    if options.config:
        prepare = load_experiment(options.config).prepare
        sources += [*prepare.pages, *prepare.articles]
        topics = topics or prepare.topics
    for file in options.files:
        name = file.name.partition(".")[0]
        if (options.kind or kind_of(file)) == "pages":
            folder = options.pages or Path("data/pages") / name
            sources.append(PageSource(name=name, annotations=file, folder=folder))
        else:
            sources.append(ArticleSource(name=name, path=str(file)))
    return sources, read_topics(topics or Path("data/topics.yaml"))


def _check(source: PageSource | NewsroomSource | ArticleSource, topics: TopicList) -> bool:
    """Print what a source holds and return whether all of it is good."""
    try:
        findings = check_articles(source, topics) if isinstance(source, ArticleSource) else check_pages(source, topics)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        print(f"{source.name}: {error}")
        return False
    _print_findings(findings)
    return findings.num_good > 0 and not findings.bad


if __name__ == "__main__":
    main()
