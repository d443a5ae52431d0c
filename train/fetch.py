"""Fill `data/pages` and `data/articles` with what the annotations are about, each file checked by its sha256.

Knows repositories, commits, folders and checksums; knows nothing of what pages and labels mean. Reads
`data/sources.yaml`. A page that is there already is left alone; one that cannot be had is named, never replaced.
"""

import argparse
import gzip
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from train.config import Part

log = logging.getLogger(__name__)

SHA256 = r"^[0-9a-f]{64}$"


class FetchError(ValueError):
    """A source cannot be fetched at all."""


class PageRepository(Part):
    """Pages in a public git repository, and the annotations that are about them."""

    repository: str
    """Address that git can fetch from."""
    commit: str = Field(pattern=r"^[0-9a-f]{40}$")
    """The version that was annotated."""
    licence: str
    """Of the repository."""
    terms: str
    """What the licence covers, in a line."""
    annotations: Path
    """JSON lines: `page`, `file` (its path in the repository) and `html_sha256` are read."""
    annotations_sha256: str = Field(pattern=SHA256)
    """Of the annotation file, so that annotations and commit are frozen as a pair."""
    folder: Path
    """Filled with NAME.html.gz for each annotated page SOURCE/NAME."""


class ArticleFile(Part):
    """Articles that cannot be downloaded: copied from a local folder, where somebody has them."""

    file: Path
    """Where the articles go."""
    sha256: str = Field(pattern=SHA256)
    """Of the unpacked bytes."""
    licence: str
    """`none`: no right to pass the texts on."""
    terms: str
    """Whose the texts and the labels are, in a line."""
    found_as: list[str]
    """Paths below a local folder at which the file is looked for, in order."""


class Sources(Part):
    """All that can be fetched, by name."""

    pages: dict[str, PageRepository]
    articles: dict[str, ArticleFile] = {}


class WantedPage(BaseModel):
    """What an annotation says of the file that it is about."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    page: str
    file: str
    html_sha256: str = Field(pattern=SHA256)

    @field_validator("page")
    @classmethod
    def _stays_in_its_folder(cls, page: str) -> str:
        name = PurePosixPath(page.partition("/")[2] or page)
        if name.is_absolute() or ".." in name.parts or not name.parts:
            raise ValueError(f"expected SOURCE/NAME, got {page!r}")
        return page

    @property
    def name(self) -> str:
        """Path of the page within its source."""
        return self.page.partition("/")[2] or self.page


def read_sources(path: Path) -> Sources:
    """Read the list of sources.

    Raises:
        FetchError: it cannot be read, or is no such list.
    """
    try:
        return Sources.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise FetchError(
            f"the list of sources {path} cannot be used: {error}. data/sources.yaml shows its form"
        ) from error


def fetch(sources: Sources, *, only: Iterable[str] = (), folder: Path | None = None) -> list[str]:
    """Fill every source and return what could not be had, a line each.

    Args:
        sources: where everything comes from and goes.
        only: names of sources; none: all.
        folder: a local folder to take files from instead of cloning.

    Raises:
        FetchError: a name is in no list, or the folder is not there.
    """
    known = [*sources.pages, *sources.articles]
    chosen = set(only) or set(known)
    if unknown := chosen - set(known):
        raise FetchError(f"unknown source {', '.join(sorted(unknown))}, expected one of {', '.join(known)}")
    if folder is not None and not folder.is_dir():
        raise FetchError(f"there is no folder {folder}: --from takes one that holds SOURCE/NAME.html.gz")
    faults = []
    for name, source in sources.pages.items():
        if name in chosen:
            try:
                faults += _fetch_pages(name, source, folder)
            except FetchError as error:
                faults.append(f"{name}: {error}")
    for name, articles in sources.articles.items():
        if name in chosen:
            faults += _fetch_articles(name, articles, folder)
    return faults


def _fetch_pages(name: str, source: PageRepository, folder: Path | None) -> list[str]:
    wanted = read_wanted(source)
    missing = [page for page in wanted if _sha256_of(_target(source, page)) != page.html_sha256]
    if not missing:
        log.info("%s: all %d pages are there, nothing to do", name, len(wanted))
        return []
    found = _from_folder(folder, name, missing) if folder else _from_repository(source, missing)
    faults = []
    for page, data, reason in found:
        if data is not None and (got := hashlib.sha256(data).hexdigest()) != page.html_sha256:
            faults.append(f"{page.page}: expected sha256 {page.html_sha256}, got {got} from {reason}")
        elif data is not None:
            _write(_target(source, page), data)
        else:
            faults.append(f"{page.page}: {reason}")
    num_written = len(missing) - len(faults)
    log.info("%s: %d of %d pages written, %d could not be had", name, num_written, len(wanted), len(faults))
    return faults


def read_wanted(source: PageRepository) -> list[WantedPage]:
    """Read which pages the annotations of a source are about.

    Raises:
        FetchError: the annotation file is missing, is not the one that belongs to the commit, or has a faulty line.
    """
    try:
        content = source.annotations.read_bytes()
    except OSError as error:
        raise FetchError(f"cannot read the annotations {source.annotations}: {error.strerror}") from error
    if (got := hashlib.sha256(content).hexdigest()) != source.annotations_sha256:
        raise FetchError(
            f"{source.annotations} has sha256 {got}, expected {source.annotations_sha256}: take back the change, or, "
            "if it is meant, write the new checksum into the list of sources"
        )
    try:
        return [WantedPage.model_validate_json(line) for line in content.split(b"\n") if line.strip()]
    except ValidationError as error:
        raise FetchError(f"{source.annotations} has a faulty line: {error}") from error


def _fetch_articles(name: str, source: ArticleFile, folder: Path | None) -> list[str]:
    if _sha256_of(source.file) == source.sha256:
        log.info("%s: %s is there, nothing to do", name, source.file)
        return []
    copies = [folder / path for path in source.found_as if (folder / path).is_file()] if folder else []
    if copies:
        data = _unpacked(copies[0])
        if data is None or (got := hashlib.sha256(data).hexdigest()) != source.sha256:
            got = "a broken gzip file" if data is None else got
            return [f"{name}: expected sha256 {source.sha256}, got {got} from {copies[0]}"]
        _write(source.file, data)
        log.info("%s: %s written", name, source.file)
        return []
    if source.file.exists():
        got = _sha256_of(source.file) or "a broken gzip file"
        return [f"{name}: {source.file}: expected sha256 {source.sha256}, got {got}: move it away, or restore it"]
    log.warning(
        "%s: not there, and this source has no public download. Terms: %s If you have a copy: `--from FOLDER`, with %s "
        "in FOLDER. Without it, configs/pages.yaml can be trained by `--set prepare.articles=[]`",
        name,
        source.terms,
        " or ".join(source.found_as),
    )
    return []


Found = tuple[WantedPage, bytes | None, str]
"""A page, its unpacked bytes, and where they come from; or None and why there are none."""


def _from_folder(folder: Path, name: str, pages: list[WantedPage]) -> Iterator[Found]:
    places = [place for place in (folder / name, folder / "pages" / name) if place.is_dir()]
    if not places:
        raise FetchError(
            f"neither {folder / name} nor {folder / 'pages' / name} is there: lay {name}/NAME.html.gz out so"
        )
    for page in pages:
        path = places[0] / f"{page.name}.html.gz"
        if not path.is_file():
            yield page, None, f"{path} is not there"
        else:
            data = _unpacked(path)
            yield page, data, str(path) if data is not None else f"{path} is no sound gzip file"


def _from_repository(source: PageRepository, pages: list[WantedPage]) -> Iterator[Found]:
    with tempfile.TemporaryDirectory(prefix="fetch-") as folder:
        clone = Path(folder)
        lacks_files = _fetch_commit(source, clone)
        listing = _git(clone, "ls-tree", "-r", "-z", source.commit).decode("utf-8", "surrogateescape")
        entries = [entry.partition("\t") for entry in listing.split("\0") if entry]
        blobs = {path: info.split()[2] for info, _, path in entries}
        if lacks_files:
            _fetch_blobs(clone, sorted({blobs[page.file] for page in pages if page.file in blobs}))
        contents = _contents(clone, [blobs.get(page.file) for page in pages])
        for page, data in zip(pages, contents, strict=True):
            place = f"{page.file} at {source.repository} {source.commit[:12]}"
            if data is None:
                yield page, None, f"{place} is not there"
                continue
            page_bytes = _gunzip(data) if page.file.endswith(".gz") else data
            yield page, page_bytes, place if page_bytes is not None else f"{place} is no sound gzip file"


def _fetch_commit(source: PageRepository, clone: Path) -> bool:
    """Fetch one commit without its files, else one commit, else the history; return whether files may be missing."""
    _git(clone, "init", "--quiet")
    _git(clone, "remote", "add", "origin", source.repository)
    try:
        _git(clone, "ls-remote", "--quiet", "origin", "HEAD")
    except FetchError as error:
        raise FetchError(
            f"{source.repository} cannot be reached ({error}): check the network, or fill from a local copy with "
            "`python -m train.fetch --from FOLDER`"
        ) from error
    attempts = [
        ("--depth=1", "--no-tags", "--filter=blob:none", "origin", source.commit),
        ("--depth=1", "--no-tags", "--no-filter", "origin", source.commit),
        ("--tags", "--no-filter", "origin", "+refs/heads/*:refs/remotes/origin/*"),
    ]
    for number, attempt in enumerate(attempts):
        try:
            _git(clone, "fetch", "--quiet", *attempt)
            _git(clone, "cat-file", "-e", f"{source.commit}^{{tree}}")
            return number == 0
        except FetchError as error:
            reason = error
    raise FetchError(
        f"{source.repository} does not give commit {source.commit} ({reason}): correct the commit in the list of "
        "sources, or fill from a local copy with `python -m train.fetch --from FOLDER`"
    )


def _fetch_blobs(clone: Path, blobs: list[str]) -> None:
    """Get files in one go: left alone, git asks for each apart."""
    options = ("--quiet", "--no-tags", "--no-write-fetch-head", "--filter=blob:none", "--stdin", "origin")
    try:
        _git(clone, "-c", "fetch.negotiationAlgorithm=noop", "fetch", *options, stdin="".join(f"{b}\n" for b in blobs))
    except FetchError as error:
        log.warning("the server does not give many files at once (%s): fetching one by one", error)


def _contents(clone: Path, blobs: list[str | None]) -> Iterator[bytes | None]:
    """Yield the bytes of each file, as git stores them; None for those that are not there."""
    command = ["git", "-C", str(clone), "cat-file", "--batch"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment()) as process:
        if process.stdin is None or process.stdout is None:
            raise FetchError("git cat-file has no pipes")
        for blob in blobs:
            if blob is None:
                yield None
                continue
            process.stdin.write(f"{blob}\n".encode())
            process.stdin.flush()
            header = process.stdout.readline().split()
            if not header:
                raise FetchError("git ended early: the connection was lost; run the command again")
            if header[-1] == b"missing":
                yield None
                continue
            yield process.stdout.read(int(header[2]))
            process.stdout.read(1)  # the line break behind each


def _environment() -> dict[str, str]:
    """Ask for no password, and forget the repository that a git hook may have named."""
    kept = {
        key: value for key, value in os.environ.items() if key not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    }
    return kept | {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


def _git(clone: Path, *arguments: str, stdin: str = "") -> bytes:
    try:
        done = subprocess.run(
            ["git", "-C", str(clone), *arguments],
            input=stdin.encode(),
            capture_output=True,
            check=False,
            env=_environment(),
        )
    except FileNotFoundError as error:
        raise FetchError("git is not installed: install it, or fill from a local copy with --from FOLDER") from error
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise FetchError(lines[0] if lines else f"git {arguments[0]} ended with status {done.returncode}")
    return done.stdout


def _target(source: PageRepository, page: WantedPage) -> Path:
    return source.folder / f"{page.name}.html.gz"


def _sha256_of(path: Path) -> str | None:
    """Return the checksum of what is packed in a file; None where there is no file, or a broken one."""
    data = _unpacked(path) if path.is_file() else None
    return None if data is None else hashlib.sha256(data).hexdigest()


def _unpacked(path: Path) -> bytes | None:
    return _gunzip(path.read_bytes())


def _gunzip(data: bytes) -> bytes | None:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return None


def _write(path: Path, data: bytes) -> None:
    """Pack into a file that is there whole or not at all; the same data makes the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(gzip.compress(data, mtime=0))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the stage from the command line."""
    parser = argparse.ArgumentParser(
        description="Fill data/pages and data/articles with what the annotations are about."
    )
    parser.add_argument(
        "--sources", type=Path, default=Path("data/sources.yaml"), metavar="FILE", help="the list of sources"
    )
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="one source; repeatable")
    parser.add_argument(
        "--from",
        dest="folder",
        type=Path,
        metavar="FOLDER",
        help="take SOURCE/NAME.html.gz (or pages/SOURCE/…) and the article files from here instead of cloning",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="fetch: %(message)s")
    try:
        faults = fetch(read_sources(options.sources), only=options.only, folder=options.folder)
    except FetchError as error:
        sys.exit(f"fetch: {error}")
    for fault in faults:
        log.error("%s", fault)
    if faults:
        sys.exit(f"fetch: {len(faults)} fault(s), listed above")


if __name__ == "__main__":
    main()
