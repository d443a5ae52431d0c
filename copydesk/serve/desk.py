"""The service's state, and how it answers: one request's pages, or a stream of them.

Knows deadlines, clients that leave and the end of service; knows nothing of routes or of how pages are read.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

from starlette.requests import ClientDisconnect, Request

from copydesk.page import FailedPage, Page, PageError
from copydesk.predictor import Document, Predictor
from copydesk.serve.batching import Batcher, BrokenPageError, BusyError
from copydesk.serve.bodies import Held, parse_line, too_long, unpacked
from copydesk.serve.metering import Meters
from copydesk.serve.problems import Refused, busy, unavailable
from copydesk.serve.settings import Settings

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

_TIMED_OUT = "timed out"
_LIMIT = re.compile(r"raise (max_\w+)")


class Desk:
    """Answers requests with one model at a time."""

    def __init__(self, predictor: Predictor, settings: Settings) -> None:
        self.settings = settings
        self.meters = Meters()
        self.held = Held(settings.max_held, self.meters)
        self.batcher = Batcher(
            predictor,
            self.meters,
            batch_tokens=settings.batch_tokens,
            max_waiting=settings.max_waiting,
            lanes=settings.lanes,
        )
        self.closing = asyncio.Event()
        """Set when the service is about to end: it finishes what it accepted."""
        self.meters.name_model(predictor.info)

    @property
    def predictor(self) -> Predictor:
        """The model that reads pages that come now."""
        return self.batcher.predictor

    def use(self, predictor: Predictor) -> None:
        """Read with another model from now on; pages under way keep theirs."""
        self.batcher.predictor = predictor
        self.meters.name_model(predictor.info)

    async def read(self, documents: Sequence[Document | FailedPage]) -> list[Page | FailedPage | BaseException]:
        """Read the pages of a request.

        Args:
            documents: pages, and in their places rows for what is none, which are passed on.

        Returns:
            For each its page, or what became of it: `PageError`, `BrokenPageError`.

        Raises:
            Refused: 422 too many pages, 429 no room, 503 too late.
        """
        limit = self.settings.max_pages
        if len(documents) > limit:
            detail = f"the request has {len(documents):,} pages, the limit is {limit:,}: send several, or a stream"
            raise Refused(422, detail, what="pages", got=len(documents), limit=limit)
        readable = [document for document in documents if isinstance(document, Document)]
        try:
            tasks = self.batcher.accept(readable)
        except BusyError:
            waiting = self.batcher.num_waiting
            raise busy(
                f"{waiting:,} pages are waiting and the queue holds {self.settings.max_waiting:,}: send it again later",
                what="waiting pages",
                got=waiting + len(readable),
                limit=self.settings.max_waiting,
                retry_after=self.batcher.pace.retry_after(waiting),
            ) from None
        try:
            async with asyncio.timeout(self.settings.timeout):
                answers = iter(await asyncio.gather(*tasks, return_exceptions=True))
        except TimeoutError:
            self._count(_TIMED_OUT, len(readable))
            raise self._too_late() from None
        except asyncio.CancelledError:
            self._count("dropped", len(readable))
            raise
        finally:
            for task in tasks:
                task.cancel()
        rows = [next(answers) if isinstance(document, Document) else document for document in documents]
        for row in rows:
            self._count_answer(row)
        return [_with_option(row) if isinstance(row, PageError) else row for row in rows]

    def _too_late(self) -> Refused:
        return unavailable(
            f"no answer within {self.settings.timeout:g} s: send it again later, or smaller pages",
            what="seconds",
            got=f"more than {self.settings.timeout:g}",
            limit=self.settings.timeout,
            retry_after=self.batcher.pace.retry_after(self.batcher.num_waiting),
        )

    def _count(self, outcome: str, pages: int = 1) -> None:
        self.meters.pages.labels(outcome).inc(pages)

    def _count_answer(self, answer: Page | FailedPage | BaseException) -> None:
        if isinstance(answer, Page):
            self.meters.count_page(answer)
        else:
            self._count("refused" if isinstance(answer, PageError | FailedPage) else "failed")

    async def stream(self, request: Request) -> AsyncIterator[Page | FailedPage]:
        """Read a stream of JSON lines and yield a row for each, in order, while more lines come.

        A line is read while fewer than `stream_window` pages of the stream wait, so that it cannot fill the queue.
        """
        rows: asyncio.Queue[_Line | FailedPage | None] = asyncio.Queue(self.settings.stream_window)
        reader = asyncio.create_task(self._take_lines(request, rows))
        try:
            while True:
                row = await _first(rows.get(), reader)
                if row is None:
                    return
                yield row if isinstance(row, FailedPage) else await self._row_of(row)
        finally:
            reader.cancel()
            with suppress(asyncio.CancelledError, ClientDisconnect):
                await reader
            while not rows.empty():
                left = rows.get_nowait()
                if isinstance(left, _Line):
                    left.page.cancel()
                    self._count("dropped")

    async def _take_lines(self, request: Request, rows: "asyncio.Queue[_Line | FailedPage | None]") -> None:
        """Put a task for each line into the queue, and at last None; then wait until the client leaves."""
        number = 0
        try:
            async for line in self._lines(request):
                number += 1
                if line.strip():
                    await rows.put(await self._start(line, number))
        except Refused as refused:
            await rows.put(FailedPage(source=None, error=f"after line {number}: {refused.detail}"))
        await rows.put(None)
        while (await request.receive())["type"] != "http.disconnect":
            pass
        raise ClientDisconnect

    async def _start(self, line: bytes, number: int) -> "_Line | FailedPage":
        try:
            document = parse_line(line)
        except Refused as refused:
            self._count("refused")
            return FailedPage(source=None, error=f"line {number}: {refused.detail}")
        await self.batcher.wait_for_room()
        (task,) = self.batcher.accept([document])
        return _Line(number, task)

    async def _row_of(self, line: "_Line") -> Page | FailedPage:
        try:
            async with asyncio.timeout(self.settings.timeout):
                page = await line.page
        except TimeoutError:
            self._count(_TIMED_OUT)
            return FailedPage(source=None, error=f"line {line.number}: {self._too_late().detail}")
        except (PageError, BrokenPageError) as error:
            self._count_answer(error)
            reason = _with_option(error) if isinstance(error, PageError) else error
            return FailedPage(source=None, error=f"line {line.number}: {reason}")
        self._count_answer(page)
        return page

    async def _lines(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the lines of a body as they come.

        Raises:
            Refused: one is too long, none came for too long, or the service is about to end.
        """
        buffer = bytearray()
        pieces = aiter(unpacked(request, limit=None))
        deadline = self._line_deadline()
        while (piece := await self._next_piece(pieces, deadline)) is not None:
            start = len(buffer)
            buffer += piece
            if buffer.find(b"\n", start) >= 0:
                *lines, rest = bytes(buffer).split(b"\n")
                for line in lines:
                    yield line
                buffer = bytearray(rest)
                deadline = self._line_deadline()
            if len(buffer) > self.settings.max_body:
                raise too_long(len(buffer), self.settings.max_body)
        if buffer:
            yield bytes(buffer)

    def _line_deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.settings.read_timeout

    async def _next_piece(self, pieces: AsyncIterator[bytes], deadline: float) -> bytes | None:
        async def next_piece() -> bytes | None:
            return await anext(pieces, None)

        try:
            async with asyncio.timeout_at(deadline):
                return await unless(self.closing.wait(), next_piece())
        except TimeoutError:
            raise Refused(408, f"no line came for {self.settings.read_timeout:g} s: send the rest again") from None
        except StoppedError:
            raise unavailable("the service is about to end: send the rest again", retry_after=1) from None


class _Line(NamedTuple):
    """A line of a stream whose page is read."""

    number: int
    page: asyncio.Task[Page]


def _with_option(error: PageError) -> PageError:
    """Name the service's option where the reason names the limit."""
    reason = str(error).replace("raise max_bytes", "raise max_page")
    return PageError(_LIMIT.sub(lambda found: f"raise --{found[1].replace('_', '-')}", reason))


class StoppedError(Exception):
    """Something happened that ends the wait for an answer."""


async def unless(event: Awaitable[object], work: Awaitable[Answer]) -> Answer:
    """Return the result of `work`.

    Raises:
        StoppedError: `event` came first; `work` was cancelled.
    """
    doing, other = asyncio.ensure_future(work), asyncio.ensure_future(event)
    try:
        await asyncio.wait({doing, other}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise StoppedError
    finally:
        for task in (doing, other):
            task.cancel()
        await asyncio.gather(doing, other, return_exceptions=True)


async def gone(request: Request) -> None:
    """Return when the client has left; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _first(wanted: Awaitable[Answer], reader: asyncio.Task[None]) -> Answer:
    """Return what is wanted, or raise what ended the reader."""
    getting = asyncio.ensure_future(wanted)
    try:
        await asyncio.wait({getting, reader}, return_when=asyncio.FIRST_COMPLETED)
        if getting.done():
            return getting.result()
        reader.result()
        raise ClientDisconnect
    finally:
        getting.cancel()
