"""Request bodies: read within bounds, unpacked, turned into documents.

Knows content types, encodings and gzip; knows nothing of models or queues.
"""

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Literal

import webencodings
from pydantic import BaseModel, ConfigDict, Discriminator, Tag, TypeAdapter, ValidationError
from starlette.requests import Request

from copydesk.detect import BYTE_ORDER_MARKS, without_surrogates
from copydesk.page import FailedPage
from copydesk.predictor import Document
from copydesk.serve.metering import Meters
from copydesk.serve.problems import Refused, unavailable
from copydesk.serve.settings import Settings

JSON, HTML, TEXT = "application/json", "text/html", "text/plain"
LINES = ("application/x-ndjson", "application/jsonl", "application/jsonlines")
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_BLOCK = 2**16
_MARKS = tuple(mark for mark, _ in BYTE_ORDER_MARKS)
_LIKE_UTF8 = frozenset({"utf-16le", "utf-16be", "iso-2022-jp"})
"""Encodings of which most bytes are valid UTF-8, too."""


class _Given(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    url: str | None = None
    """Address of the page, handed back in the answer; it is never fetched."""


class HtmlPage(_Given):
    """A page as HTML."""

    html: str
    """The page's source."""


class TextPage(_Given):
    """A page as plain text."""

    text: str
    """The page's text, a line a section."""


def _kind_of(value: Any) -> Literal["html", "text"] | None:
    if isinstance(value, HtmlPage | TextPage):
        return "html" if isinstance(value, HtmlPage) else "text"
    kinds: list[Literal["html", "text"]] = ["html", "text"]
    found = [kind for kind in kinds if isinstance(value, dict) and kind in value]
    return found[0] if len(found) == 1 else None


GivenPage = Annotated[
    Annotated[HtmlPage, Tag("html")] | Annotated[TextPage, Tag("text")],
    Discriminator(
        _kind_of,
        custom_error_type="page",
        custom_error_message="a page is an object with either html or text, and perhaps url",
    ),
]
ONE_PAGE: TypeAdapter[HtmlPage | TextPage] = TypeAdapter(GivenPage)


@dataclass(eq=False, slots=True)
class Held:
    """Counts the bytes of all bodies in memory."""

    limit: int
    meters: Meters
    size: int = 0

    def add(self, size: int) -> None:
        """Count bytes, or fewer with a negative number.

        Raises:
            Refused: 503, there are too many.
        """
        if size > 0 and self.size + size > self.limit:
            raise unavailable(
                f"the requests under way hold more than {self.limit:,} bytes: send the request again later",
                what="bytes held",
                got=self.size + size,
                limit=self.limit,
                retry_after=1,
            )
        self.size += size
        self.meters.held.set(self.size)


def media_type(request: Request) -> tuple[str, str | None]:
    """Return a request's content type without parameters, and its charset."""
    kind, *parameters = request.headers.get("content-type", "").split(";")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            return kind.strip().lower(), value.strip().strip("\"'")
    return kind.strip().lower(), None


def unsupported(what: str, got: str, expected: str) -> Refused:
    """Return the refusal of a body of a kind that nobody reads here."""
    detail = f"the {what} is {got or 'missing'}, expected {expected}: set the header"
    return Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, detail, what=what, got=got, limit=expected)


async def unpacked(request: Request, *, limit: int | None) -> AsyncIterator[bytes]:
    """Yield a request's body, unpacked where it is gzip, in small pieces.

    Args:
        request: whose body was not read yet.
        limit: bytes of the body as it comes; None for a stream.

    Raises:
        Refused: 413 it is too long, 415 packed otherwise, 400 broken.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in {"identity", "gzip", "x-gzip", ""}:
        raise unsupported("content-encoding", encoding, "gzip or none")
    announced = request.headers.get("content-length", "")
    if limit is not None and announced.isdecimal() and int(announced) > limit:
        raise too_long(int(announced), limit)
    async for piece in _unzipped(request.stream()) if "gzip" in encoding else request.stream():
        yield piece


async def _unzipped(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    unpacker = zlib.decompressobj(_GZIP_WINDOW)
    async for chunk in chunks:
        rest, piece = chunk, b""
        while rest or len(piece) == _BLOCK:  # all input may be taken while output is left
            try:
                piece = unpacker.decompress(rest, _BLOCK)
            except zlib.error as error:
                raise _broken_gzip(str(error)) from error
            rest = unpacker.unconsumed_tail
            if unpacker.eof and unpacker.unused_data:  # another gzip member
                rest, unpacker = unpacker.unused_data, zlib.decompressobj(_GZIP_WINDOW)
            if piece:
                yield piece
                await asyncio.sleep(0)  # a bomb must not hold the event loop
    if not unpacker.eof:
        raise _broken_gzip("it ends too early")


async def read_body(request: Request, settings: Settings, held: Held, taken: list[int]) -> bytes:
    """Read a whole body.

    Args:
        request: whose body was not read yet.
        settings: how long it may be, and may take.
        held: counts what is in memory.
        taken: what was counted is appended, to be given back when the request is answered.

    Raises:
        Refused: 408 it comes too slowly, 413 it is too long, or what `unpacked` and `held` raise.
    """
    body = bytearray()
    try:
        async with asyncio.timeout(settings.read_timeout):
            async for chunk in unpacked(request, limit=settings.max_body):
                if len(body) + len(chunk) > settings.max_body:
                    raise too_long(len(body) + len(chunk), settings.max_body)
                held.add(len(chunk))
                taken.append(len(chunk))
                body += chunk
    except TimeoutError as error:
        raise Refused(
            HTTPStatus.REQUEST_TIMEOUT,
            f"the body did not arrive within {settings.read_timeout:g} s: send it faster, or in smaller requests",
            what="seconds",
            got=f"more than {settings.read_timeout:g}",
            limit=settings.read_timeout,
            headers={"connection": "close"},
        ) from error
    return bytes(body)


def too_long(got: int, limit: int) -> Refused:
    """Return the refusal of a body that is too long."""
    detail = f"the request has more than {limit:,} bytes: send fewer or smaller pages, or raise --max-body"
    # What is still to come is not read: the connection cannot be used again.
    headers = {"connection": "close"}
    return Refused(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail, what="body bytes", got=got, limit=limit, headers=headers
    )


def _broken_gzip(reason: str) -> Refused:
    return Refused(
        HTTPStatus.BAD_REQUEST, f"the body is broken gzip ({reason}): pack it again", what="content-encoding"
    )


def raw_document(body: bytes, *, kind: Literal["html", "text"], charset: str | None, url: str | None) -> Document:
    """Return a page that came as it is.

    A byte-order mark and UTF-8 are taken for what they are whatever the header says, as for files; else the header
    says what the bytes are.

    Raises:
        Refused: 415, the charset is unknown.
    """
    encoding = webencodings.lookup(charset) if charset else None
    if charset and encoding is None:
        raise unsupported("charset", charset, "an encoding that browsers know")
    if encoding is None or body.startswith(_MARKS) or (encoding.name not in _LIKE_UTF8 and _is_utf8(body)):
        return Document(body, url=url, kind=kind)
    text, _ = webencodings.decode(body, encoding)
    return Document(without_surrogates(text), url=url, kind=kind)


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def parse_pages(body: bytes) -> tuple[list[Document | FailedPage], bool]:
    """Return the pages of a JSON body, and whether they came as a list: what is no page of it has a row in its place.

    Raises:
        Refused: 400 it is no JSON, 422 it is no page and no list.
    """
    given = _parsed(body, what="body")
    if isinstance(given, list):
        return [_document_or_row(page) for page in given], True
    return [_document(given, expected=f"{EXPECTED}, or a list of such")], False


def parse_line(line: bytes) -> Document:
    """Return the page of one line of a stream.

    Raises:
        Refused: 400 it is no JSON, 422 it is no page.
    """
    return _document(_parsed(line, what="line"), expected=EXPECTED)


def _parsed(content: bytes, *, what: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refused(HTTPStatus.BAD_REQUEST, f"the {what} is no JSON: {error}", what=what) from error


def _document_or_row(given: Any) -> Document | FailedPage:
    try:
        return _document(given, expected=EXPECTED)
    except Refused as refused:
        return FailedPage(source=None, error=refused.detail)


def _document(given: Any, *, expected: str) -> Document:
    try:
        page = ONE_PAGE.validate_python(_clean(given))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, fault["loc"][1:])) or "page"  # behind the kind of the page
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        detail = f"{where}: {fault['msg']}{more}. Expected {expected}"
        raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, detail, what=where) from error
    if isinstance(page, HtmlPage):
        return Document(page.html, url=page.url, kind="html")
    return Document(page.text, url=page.url, kind="text")


def _clean(given: Any) -> Any:
    """Return what is given without lone surrogates, which JSON can hold and UTF-8 cannot."""
    if not isinstance(given, dict):
        return given
    return {
        without_surrogates(name): without_surrogates(value) if isinstance(value, str) else value
        for name, value in given.items()
    }


EXPECTED = json.dumps({"html": "<p>…</p>", "url": "https://…"}, ensure_ascii=False) + ' or {"text": "…"}'
