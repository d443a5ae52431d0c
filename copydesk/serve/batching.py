"""Pages of many requests, read together: split off the event loop, packed into batches by tokens.

Knows queues, threads and budgets; knows nothing of HTTP. Everything but `prepare` and `read_batch` of the predictor
runs on the event loop, so that no lock is needed.

The page that waited longest goes first, and takes along whoever still fits. A page above the budget goes alone, and
after it those within the budget go first: so a small page waits for one huge page at most. Huge pages are also split
in a thread of their own.

Several batches may be read at once, in lanes that share the processor's threads: what one does in Python, the network
of another one fills.
"""

import asyncio
import logging
import math
import time
from bisect import insort
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from copydesk.page import FailedPage, Page, PageError
from copydesk.predictor import Document, Predictor, PreparedPage
from copydesk.serve.metering import Meters

log = logging.getLogger(__name__)
Result = TypeVar("Result")

HUGE_CHARACTERS = 2**18
"""Size from which a page is split in the lane of the huge ones."""
SPLITTERS = 2
_MAX_RETRY_AFTER = 60


class BusyError(Exception):
    """The queue has no room."""


class BrokenPageError(Exception):
    """A page broke the splitter or the model. The message says how."""


@dataclass(eq=False, slots=True)
class _Waiting:
    since: float
    predictor: Predictor  # that prepared the page: after a reload another one would not understand its tokens
    prepared: PreparedPage
    answer: asyncio.Future[Page]


@dataclass(slots=True)
class Pace:
    """How long a page takes at present, to tell others when to come again."""

    seconds_a_page: float = 0.1

    def note(self, *, pages: int, seconds: float) -> None:
        """Take a batch into account."""
        self.seconds_a_page += 0.2 * (seconds / pages - self.seconds_a_page)

    def retry_after(self, pages: int) -> int:
        """Return the seconds until so many pages are through, at least 1."""
        return min(_MAX_RETRY_AFTER, max(1, math.ceil(pages * self.seconds_a_page)))


@dataclass(eq=False)
class Batcher:
    """Reads pages with one predictor for everybody. `start` it on the event loop that uses it, `close` it there."""

    predictor: Predictor
    """Takes pages from now on; assign another one at any time, pages under way keep theirs."""
    meters: Meters
    batch_tokens: int
    max_waiting: int
    lanes: int = 1
    """Batches that are read at once."""
    pace: Pace = field(default_factory=Pace)
    num_waiting: int = 0
    """Pages accepted and not yet answered."""

    def start(self) -> None:
        """Begin to read."""
        self._ready: list[_Waiting] = []
        self._last_was_huge = False
        self._wake, self._left = asyncio.Event(), asyncio.Event()
        self._model = ThreadPoolExecutor(self.lanes, "model")
        self._free = asyncio.Semaphore(self.lanes)
        self._reading: set[asyncio.Task[None]] = set()
        self._jobs: set[Future[Any]] = set()
        self._threads = torch.get_num_threads()
        self._splitters = ThreadPoolExecutor(SPLITTERS, "split")
        self._huge_splitter = ThreadPoolExecutor(1, "split-huge")
        self._running = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop reading; what is still waiting is never answered."""
        for task in (self._running, *self._reading):
            task.cancel()
        await asyncio.gather(self._running, *self._reading, return_exceptions=True)
        for executor in (self._splitters, self._huge_splitter, self._model):
            executor.shutdown(wait=False, cancel_futures=True)

    @property
    def is_computing(self) -> bool:
        """Whether a thread splits or reads pages, perhaps for nobody any more."""
        return any(job.running() for job in list(self._jobs))

    @property
    def room(self) -> int:
        """Pages that may still be accepted."""
        return self.max_waiting - self.num_waiting

    async def wait_for_room(self) -> None:
        """Wait until a page may be accepted."""
        while self.room < 1:
            self._left.clear()
            await self._left.wait()

    def accept(self, documents: Sequence[Document]) -> list[asyncio.Task[Page]]:
        """Take pages into the queue, all or none.

        Returns:
            A task for each; cancelled, its page leaves the queue. It raises `PageError` where the page breaks a
            limit, `BrokenPageError` where it breaks the splitter or the model.

        Raises:
            BusyError: there is no room for all of them.
        """
        if len(documents) > self.room:
            raise BusyError
        self._count(len(documents))
        tasks = [asyncio.create_task(self._read(document)) for document in documents]
        for task in tasks:
            task.add_done_callback(self._leave)
        return tasks

    def _leave(self, task: asyncio.Task[Page]) -> None:
        self._count(-1)
        self._left.set()
        if not task.cancelled():
            task.exception()  # else asyncio complains of those for which nobody waits any more

    def _count(self, pages: int) -> None:
        self.num_waiting += pages
        self.meters.waiting.set(self.num_waiting)

    async def _read(self, document: Document) -> Page:
        since, predictor = time.monotonic(), self.predictor
        lane = self._huge_splitter if len(document.content) >= HUGE_CHARACTERS else self._splitters
        try:
            prepared = await self._in_thread(lane, predictor.prepare, document)
        except PageError:
            raise
        except Exception as error:
            log.exception("a page broke the splitter")
            raise BrokenPageError(f"the page could not be split ({type(error).__name__}): report the page") from error
        waiting = _Waiting(since, predictor, prepared, asyncio.get_running_loop().create_future())
        insort(self._ready, waiting, key=lambda other: other.since)
        self._wake.set()
        try:
            return await waiting.answer
        finally:
            if waiting in self._ready:  # timed out, or nobody waits for it any more
                self._ready.remove(waiting)

    async def _in_thread(self, lane: ThreadPoolExecutor, work: Callable[..., Result], *arguments: Any) -> Result:
        job = lane.submit(work, *arguments)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return await asyncio.wrap_future(job)

    async def _run(self) -> None:
        while True:
            await self._free.acquire()
            await self._wake.wait()
            while not (batch := self._next_batch()):
                self._wake.clear()
                await self._wake.wait()
            task = asyncio.create_task(self._read_batch(batch))
            self._reading.add(task)
            task.add_done_callback(self._end_batch)

    def _end_batch(self, task: asyncio.Task[None]) -> None:
        self._reading.discard(task)
        self._free.release()
        if not task.cancelled() and (error := task.exception()):
            log.error("a batch was not answered", exc_info=error)

    def _next_batch(self) -> list[_Waiting]:
        """Take the next batch out of the queue: the page that waited longest, and whoever still fits."""
        within = [waiting for waiting in self._ready if waiting.prepared.num_tokens <= self.batch_tokens]
        candidates = within if self._last_was_huge and within else self._ready
        batch: list[_Waiting] = []
        tokens = 0
        for waiting in candidates:
            fits = tokens + waiting.prepared.num_tokens <= self.batch_tokens
            if not batch or (fits and waiting.predictor is batch[0].predictor):
                batch.append(waiting)
                tokens += waiting.prepared.num_tokens
        if batch:
            self._last_was_huge = tokens > self.batch_tokens
        chosen = set(map(id, batch))
        self._ready = [waiting for waiting in self._ready if id(waiting) not in chosen]
        return batch

    async def _read_batch(self, batch: Sequence[_Waiting]) -> None:
        pages = [waiting.prepared for waiting in batch]
        started = time.monotonic()
        rows: Sequence[Page | FailedPage]
        try:
            threads = max(1, self._threads // len(self._reading))
            rows = await self._in_thread(self._model, _read, batch[0].predictor, pages, threads)
        except Exception as error:  # read_batch finds out which page it was, so this is none's
            log.exception("a batch failed")
            rows = [FailedPage(source=None, error=f"the model failed ({type(error).__name__})")] * len(pages)
        seconds = time.monotonic() - started
        self.pace.note(pages=len(pages) * self.lanes, seconds=seconds)
        self.meters.count_batch(pages=len(pages), tokens=sum(page.num_tokens for page in pages), seconds=seconds)
        for waiting, row in zip(batch, rows, strict=True):
            if waiting.answer.done():
                continue
            if isinstance(row, Page):
                waiting.answer.set_result(row)
            else:
                waiting.answer.set_exception(BrokenPageError(row.error))


def _read(predictor: Predictor, pages: Sequence[PreparedPage], threads: int) -> Sequence[Page | FailedPage]:
    torch.set_num_threads(threads)  # for what this thread begins
    return predictor.read_batch(pages)
