"""Find pages and read them: files, folders, patterns, standard input, compressed or not.

Knows paths, gzip and order; knows nothing of what stands on a page, nor of how answers are written.
"""

import glob
import gzip
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from copydesk.detect import Kind
from copydesk.page import FailedPage, Page

if TYPE_CHECKING:  # torch takes a second to import, and an error in a path should show at once
    from copydesk.predictor import Document, Predictor

STDIN = "-"
PAGE_SUFFIXES = tuple(f".{kind}{packed}" for kind in ("html", "htm", "txt") for packed in ("", ".gz"))
"""What a folder is searched for; a file named by itself may be called anything."""

_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_SLACK = 2**16
"""Bytes by which a packed page may be longer than an unpacked one: headers, and text that does not compress."""
_BLOCK = 2**20


class InputError(ValueError):
    """A page cannot be found, opened or unpacked. The message says why, and what to do."""


def find_pages(paths: Sequence[str]) -> list[str | FailedPage]:
    """Find the pages that paths name, in the order given, each folder and pattern sorted.

    Links to folders are followed; a folder or a pattern reads each real folder once.

    Args:
        paths: files, folders, patterns, or `-`. What exists under its literal name is no pattern.

    Returns:
        Paths, and in the place of a folder that cannot be listed or of a pattern without a match what went wrong.

    Raises:
        InputError: nothing matches at all, or `-` stands there twice.
    """
    if paths.count(STDIN) > 1:
        raise InputError("`-` is named twice, but standard input can be read once: name it once")
    found: list[str | FailedPage] = []
    any_match = False
    for path in paths:
        matches = _expand(path)
        any_match = any_match or bool(matches)
        found += matches or [FailedPage(source=source_name(path), error=_nothing_in(path))]
    if not any_match:
        raise InputError("; ".join(failed.error for failed in found if isinstance(failed, FailedPage)))
    return found


def source_name(path: str) -> str:
    """Return a path as it is written in answers: a name that is no UTF-8 cannot stand in JSON."""
    return os.fsencode(path).decode("utf-8", "replace")


def read_bytes(path: str, *, max_bytes: int) -> bytes:
    """Read a file or standard input, unpacked if it is gzip by name or by its first bytes.

    Args:
        path: of the file, or `-`.
        max_bytes: the most that a page may have; hardly more is ever read or unpacked.

    Raises:
        InputError: it cannot be read or unpacked, or is longer.
    """
    if path == STDIN and sys.stdin is None:
        raise InputError("standard input is closed: pipe a page into it, or name a file")
    try:
        if path == STDIN:
            data = _read_up_to(sys.stdin.buffer, max_bytes + _GZIP_SLACK)
        else:
            with Path(path).open("rb") as file:
                data = _read_up_to(file, max_bytes + _GZIP_SLACK)
        if data.startswith(_GZIP_MAGIC) or path.endswith(".gz"):
            if not data:
                raise EOFError("it is empty")
            with gzip.open(BytesIO(data)) as packed:
                data = _read_up_to(packed, max_bytes + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"broken gzip ({error}): fetch or pack the page again") from error
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error}): check the path and its permissions") from error
    if len(data) > max_bytes:
        raise InputError(
            f"the page has more than {max_bytes:,} bytes, which is the limit: cut it, or raise --max-bytes"
        )
    return data


def predict_pages(
    predictor: "Predictor", sources: Iterable[str | FailedPage], *, kind: Kind = "auto"
) -> Iterator[Page | FailedPage]:
    """Read pages as they come and yield a row for each, in order, whatever goes wrong with any of them.

    Args:
        predictor: that reads them.
        sources: from `find_pages`.
        kind: what the pages are.
    """
    return predictor.stream(_documents(sources, kind=kind, max_bytes=predictor.limits.max_bytes))


def _documents(sources: Iterable[str | FailedPage], *, kind: Kind, max_bytes: int) -> "Iterator[Document | FailedPage]":
    from copydesk.predictor import Document

    for source in sources:
        if isinstance(source, FailedPage):
            yield source
            continue
        name = source_name(source)
        try:
            yield Document(read_bytes(source, max_bytes=max_bytes), source=name, kind=kind)
        except InputError as error:
            yield FailedPage(source=name, error=str(error))


def _read_up_to(file: BinaryIO | gzip.GzipFile, count: int) -> bytes:
    data = bytearray()
    while len(data) < count and (block := file.read(min(_BLOCK, count - len(data)))):
        data += block
    return bytes(data)


def _expand(path: str) -> list[str | FailedPage]:
    if os.path.isdir(path):
        return _pages_in(path)
    if not glob.has_magic(path) or os.path.lexists(path):
        return [path]
    found: dict[str, str | FailedPage] = {}
    for page in sorted((page for match in _matches(path) for page in _expand(match)), key=_sort_key):
        folder, name = os.path.split(_sort_key(page))
        place = os.path.join(os.path.realpath(folder), name)
        if place not in found or place == os.path.abspath(_sort_key(page)):  # rather its own name than that of a link
            found[place] = page
    return sorted(found.values(), key=_sort_key)


def _matches(pattern: str) -> list[str]:
    """Return what a pattern matches; below `**`, where `glob` runs round in loops of links, each real folder once."""
    parts = pattern.split("/")
    if "**" not in parts:
        return glob.glob(pattern)
    i = parts.index("**")
    rest = "/".join(parts[i + 1 :] or "*")
    tops = glob.glob("/".join([*parts[:i], ""])) if i else ["./"]
    folders = (folder for top in tops for folder, _ in _walk(top, hidden=False))
    matches = [match for folder in folders for match in _matches(os.path.join(glob.escape(folder), rest))]
    return matches if i else [match.removeprefix("./") for match in matches]


def _pages_in(folder: str) -> list[str | FailedPage]:
    found: list[str | FailedPage] = []

    def note(error: OSError) -> None:
        reason = f"cannot be listed ({error.strerror}): check its permissions"
        found.append(FailedPage(source=source_name(error.filename), error=reason))

    for parent, names in _walk(folder, onerror=note):
        paths = (os.path.join(parent, name) for name in names if name.lower().endswith(PAGE_SUFFIXES))
        found += [path for path in paths if os.path.isfile(path) or not os.path.exists(path)]  # no pipe: it would wait
    return sorted(found, key=_sort_key)


def _walk(
    top: str, *, hidden: bool = True, onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yield each real folder once, with the names of its files, and folders before links to them."""
    seen: set[str] = set()
    starts = [top]
    for start in starts:  # grows
        for parent, folders, names in os.walk(start, onerror=onerror):
            real = os.path.realpath(parent)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if hidden or not name.startswith(".")]
            starts += sorted(path for name in folders if os.path.islink(path := os.path.join(parent, name)))
            yield parent, names


def _sort_key(page: str | FailedPage) -> str:
    return page if isinstance(page, str) else page.source or ""


def _nothing_in(path: str) -> str:
    if os.path.isdir(path):
        return f"the folder {source_name(path)} holds no page: expected files named {', '.join(PAGE_SUFFIXES)}"
    return f"nothing matches {source_name(path)}: check the path"
