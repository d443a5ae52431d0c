"""Find pages and read them: files, folders, patterns, standard input, compressed or not.

Knows paths, gzip and order; knows nothing of what stands on a page, nor of how answers are written.
"""

import glob
import gzip
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
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
    for match in sorted(glob.glob(path, recursive=True)):
        found.update({_sort_key(page): page for page in _expand(match)})
    return list(found.values())


def _pages_in(folder: str) -> list[str | FailedPage]:
    found: list[str | FailedPage] = []

    def note(error: OSError) -> None:
        reason = f"cannot be listed ({error.strerror}): check its permissions"
        found.append(FailedPage(source=source_name(error.filename), error=reason))

    for parent, _, names in os.walk(folder, onerror=note):
        paths = (os.path.join(parent, name) for name in names if name.lower().endswith(PAGE_SUFFIXES))
        found += [path for path in paths if os.path.isfile(path) or not os.path.exists(path)]  # no pipe: it would wait
    return sorted(found, key=_sort_key)


def _sort_key(page: str | FailedPage) -> str:
    return page if isinstance(page, str) else page.source or ""


def _nothing_in(path: str) -> str:
    if os.path.isdir(path):
        return f"the folder {source_name(path)} holds no page: expected files named {', '.join(PAGE_SUFFIXES)}"
    return f"nothing matches {source_name(path)}: check the path"
