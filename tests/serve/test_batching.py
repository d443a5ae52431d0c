import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from copydesk.page import FailedPage, PageError
from copydesk.predictor import Document, Predictor
from copydesk.serve.batching import Batcher, BrokenPageError, BusyError, Pace
from copydesk.serve.metering import Meters

SMALL = Document("goal", kind="text")
LONG = Document("\n".join(f"the match of {word}" for word in "a to in and minister said talks".split()), kind="text")


class Gated:
    """A predictor that waits for a sign before each batch, and remembers batches."""

    def __init__(self, predictor: Predictor) -> None:
        self.real = predictor
        self.limits = predictor.limits
        self.batches: list[list[str]] = []
        self.go = threading.Semaphore(0)
        self.began = threading.Semaphore(0)

    def prepare(self, document):
        return self.real.prepare(document)

    def read_batch(self, batch):
        self.batches.append([page.document.content for page in batch])
        self.began.release()
        self.go.acquire()
        return self.real.read_batch(batch)


def run(
    predictor,
    scenario: Callable[[Batcher], Awaitable[None]],
    *,
    batch_tokens: int = 10_000,
    max_waiting: int = 100,
    lanes: int = 1,
) -> None:
    async def main() -> None:
        batcher = Batcher(predictor, Meters(), batch_tokens=batch_tokens, max_waiting=max_waiting, lanes=lanes)
        batcher.start()
        try:
            async with asyncio.timeout(60):
                await scenario(batcher)
        finally:
            if isinstance(predictor, Gated):
                predictor.go.release(1_000)
            await batcher.close()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 (what is waited for has no event)
        await asyncio.sleep(0.005)


async def occupy(batcher: Batcher, gated: Gated) -> asyncio.Task:
    """Keep the model busy with a page until `gated.go` is released."""
    (task,) = batcher.accept([Document("minister", kind="text")])
    await asyncio.to_thread(gated.began.acquire)
    return task


def one(text: str) -> Document:
    return Document(text, kind="text")


def test_answers_are_those_of_the_predictor(predictor):
    documents = [SMALL, LONG, Document("<h1>Minister</h1><p>said", kind="html", url="u")]

    async def scenario(batcher):
        assert await asyncio.gather(*batcher.accept(documents)) == predictor.predict(documents)

    run(predictor, scenario)


def test_pages_that_wait_together_are_read_in_one_batch(predictor):
    gated = Gated(predictor)

    async def scenario(batcher):
        first = await occupy(batcher, gated)
        others = [batcher.accept([one(text)])[0] for text in ("goal", "talks", "news")]
        await until(lambda: len(batcher._ready) == 3)
        gated.go.release(2)
        await asyncio.gather(first, *others)

    run(gated, scenario)
    assert [len(batch) for batch in gated.batches] == [1, 3]


def test_lanes_read_batches_at_once_and_no_more_than_they_are(predictor):
    gated = Gated(predictor)

    async def scenario(batcher):
        tasks = [await occupy(batcher, gated), await occupy(batcher, gated)]
        tasks += batcher.accept([SMALL])
        await until(lambda: len(batcher._ready) == 1)
        await asyncio.sleep(0.02)
        assert not gated.began.acquire(blocking=False)
        gated.go.release(3)
        await asyncio.gather(*tasks)

    run(gated, scenario, lanes=2)
    assert gated.batches == [["minister"], ["minister"], ["goal"]]


def test_pages_that_are_read_at_once_get_the_answers_that_they_get_alone(predictor):
    documents = [one(" ".join(["minister said", "goal"][i % 2 :] * (1 + i % 7))) for i in range(60)]

    async def scenario(batcher):
        assert await asyncio.gather(*batcher.accept(documents)) == [predictor.predict([one])[0] for one in documents]

    run(predictor, scenario, batch_tokens=30, lanes=4)


def test_the_page_that_waited_longest_goes_first_and_takes_along_who_fits(predictor):
    gated = Gated(predictor)
    budget = predictor.prepare(LONG).num_tokens + predictor.prepare(SMALL).num_tokens

    async def scenario(batcher):
        first = await occupy(batcher, gated)
        others = []
        for count, document in enumerate((LONG, LONG, SMALL), start=1):
            others += batcher.accept([document])
            await until(lambda count=count: len(batcher._ready) == count)
        gated.go.release(3)
        await asyncio.gather(first, *others)

    run(gated, scenario, batch_tokens=budget)
    assert gated.batches[1:] == [[LONG.content, SMALL.content], [LONG.content]]


def test_a_small_page_waits_for_one_huge_page_at_most(predictor):
    gated = Gated(predictor)

    async def scenario(batcher):
        first = await occupy(batcher, gated)
        others = batcher.accept([LONG] * 4)
        await until(lambda: len(batcher._ready) == 4)
        others += batcher.accept([SMALL])
        await until(lambda: len(batcher._ready) == 5)
        gated.go.release(6)
        await asyncio.gather(first, *others)

    run(gated, scenario, batch_tokens=8)
    assert [len(batch) for batch in gated.batches] == [1] * 6
    assert gated.batches.index([SMALL.content]) == 2  # occupied, huge, small, huge, …


def test_huge_pages_are_split_beside_small_ones(predictor, monkeypatch):
    gated = Gated(predictor)
    release = threading.Event()
    monkeypatch.setattr("copydesk.serve.batching.HUGE_CHARACTERS", 50)
    gated.prepare = lambda document: (
        release.wait(60) if len(document.content) >= 50 else None,
        predictor.prepare(document),
    )[1]

    async def scenario(batcher):
        huge = batcher.accept([LONG] * 5)
        (small,) = batcher.accept([SMALL])
        gated.go.release(100)
        assert (await small).text == "goal"
        assert not any(task.done() for task in huge)
        release.set()
        await asyncio.gather(*huge)

    run(gated, scenario)


def test_a_page_that_nobody_waits_for_leaves_the_queue(predictor):
    gated = Gated(predictor)

    async def scenario(batcher):
        first = await occupy(batcher, gated)
        dropped, kept = batcher.accept([one("talks"), one("goal")])
        await until(lambda: len(batcher._ready) == 2)
        dropped.cancel()
        await until(lambda: batcher.num_waiting == 2)
        gated.go.release(2)
        await asyncio.gather(first, kept)
        assert batcher.num_waiting == 0

    run(gated, scenario)
    assert gated.batches == [["minister"], ["goal"]]


def test_a_thread_computes_until_it_is_done_whoever_waits(predictor):
    gated = Gated(predictor)

    async def scenario(batcher):
        assert not batcher.is_computing
        first = await occupy(batcher, gated)
        first.cancel()
        await asyncio.sleep(0.02)
        assert batcher.is_computing
        gated.go.release()
        await until(lambda: not batcher.is_computing)

    run(gated, scenario)


def test_a_request_that_finds_no_room_for_all_its_pages_leaves_none(predictor):
    gated = Gated(predictor)

    async def scenario(batcher):
        first = await occupy(batcher, gated)
        with pytest.raises(BusyError):
            batcher.accept([SMALL] * 3)
        assert batcher.num_waiting == 1
        others = batcher.accept([SMALL] * 2)
        waiting = asyncio.create_task(batcher.wait_for_room())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        gated.go.release(10)
        await asyncio.gather(first, waiting, *others)

    run(gated, scenario, max_waiting=3)


def test_a_page_that_breaks_the_model_breaks_alone(predictor):
    gated = Gated(predictor)
    real = gated.real

    class Breaking:
        def read_batch(self, batch):
            rows = real.read_batch(batch)
            return [
                FailedPage(source=None, error="boom") if "talks" in page.document.content else row
                for page, row in zip(batch, rows, strict=True)
            ]

    gated.real = Breaking()
    gated.prepare = real.prepare

    async def scenario(batcher):
        gated.go.release(10)
        bad, good = batcher.accept([one("talks"), one("goal")])
        assert (await good).text == "goal"
        with pytest.raises(BrokenPageError, match="boom"):
            await bad

    run(gated, scenario)


def test_a_batch_that_fails_as_a_whole_does_not_stop_the_service(predictor):
    gated = Gated(predictor)
    gated.go.release(10)
    real, failures = gated.read_batch, [MemoryError("no memory")]

    def fail_once(batch):
        if failures:
            raise failures.pop()
        return real(batch)

    gated.read_batch = fail_once

    async def scenario(batcher):
        with pytest.raises(BrokenPageError, match="MemoryError"):
            await batcher.accept([SMALL])[0]
        assert (await batcher.accept([SMALL])[0]).text == "goal"

    run(gated, scenario)


def test_a_page_over_a_limit_is_refused_and_one_that_breaks_the_splitter_reported(predictor):
    gated = Gated(predictor)
    gated.prepare = lambda document: 1 / 0 if document is SMALL else predictor.prepare(document)

    async def scenario(batcher):
        with pytest.raises(PageError, match="limit"):
            await batcher.accept([one("x" * 100_001)])[0]
        with pytest.raises(BrokenPageError, match="ZeroDivisionError"):
            await batcher.accept([SMALL])[0]

    run(gated, scenario)


def test_pages_under_way_keep_the_model_that_prepared_them(predictor):
    old, new = Gated(predictor), Gated(predictor)

    async def scenario(batcher):
        first = await occupy(batcher, old)
        others = batcher.accept([one("talks")])
        await until(lambda: len(batcher._ready) == 1)
        batcher.predictor = new
        others += batcher.accept([one("goal")])
        await until(lambda: len(batcher._ready) == 2)
        old.go.release(2)
        new.go.release(1)
        await asyncio.gather(first, *others)

    run(old, scenario)
    assert (old.batches, new.batches) == ([["minister"], ["talks"]], [["goal"]])


def test_who_has_to_come_again_is_told_by_the_pace():
    pace = Pace()
    for _ in range(100):
        pace.note(pages=10, seconds=5)

    assert [pace.retry_after(pages) for pages in (0, 1, 20, 10_000)] == [1, 1, 10, 60]
