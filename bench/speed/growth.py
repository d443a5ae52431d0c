"""How time and memory grow with pages and with a page's length, and how soon the command line answers.

Knows `stream`, `predict_one` and the command line. Imports no training library: what it measures is memory, too.
"""

import html
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from bench.speed.apart import Sample, Side
from bench.speed.measure import Goal, Row, alternate, exponent, median, number
from bench.speed.setup import ROOT, Setup
from copydesk.encode import EncodedPage
from copydesk.predictor import Document, load

MAX_EXPONENT = 1.05
MAX_MEBIBYTES = 1_024
MAX_MEMORY_GROWTH = 1.1
"""From the second number of pages to the last one: by the first, not every buffer has been used."""

MIN_TOKENS = 4
"""Of a paragraph: a word, a number, and what frames them."""


def growth_rows(setup: Setup) -> list[Row]:
    """Measure a stream of pages, once, and pages of several lengths."""
    from bench.speed.pages import read_pages, write_pages

    folder = setup.folder / "pages"
    write_pages(folder, setup.sizes.composed)
    with Side(streamed, setup.model, str(folder), setup.sizes.streamed) as side:
        stream = side()
    sections = [text for page in read_pages(min(setup.sizes.composed, 44)) for text in page.raw.texts()]
    with Side(single, setup.model, sections, setup.sizes.lengths) as side:
        taken = alternate({"ours": side}, repeats=setup.repeats)["ours"]
    lengths = taken[0]["lengths"]
    seconds = [median(taken, str(length)) for length in lengths]
    peaks = stream["mebibytes"]
    return [
        Row(
            f"exponent of time, {setup.sizes.streamed[0]:,} to {setup.sizes.streamed[-1]:,} pages",
            exponent(stream["pages"], stream["marks"]),
            goal=Goal(MAX_EXPONENT, at_most=True),
            note="one run: " + ", ".join(f"{number(value)} s" for value in stream["marks"]),
        ),
        Row(
            f"exponent of time, {lengths[0]:,} to {lengths[-1]:,} tokens a page",
            exponent(lengths, seconds),
            goal=Goal(MAX_EXPONENT, at_most=True),
            note=", ".join(f"{number(value)} s" for value in seconds),
        ),
        Row(
            f"peak memory, {setup.sizes.streamed[-1]:,} pages streamed",
            peaks and peaks[-1],
            unit="MiB",
            goal=Goal(MAX_MEBIBYTES, at_most=True),
            note=", ".join(f"{number(value)} MiB" for value in peaks or ()),
        ),
        Row(
            f"peak memory after them by that after {setup.sizes.streamed[1]:,}",
            peaks and peaks[-1] / peaks[1],
            goal=Goal(MAX_MEMORY_GROWTH, at_most=True),
        ),
    ]


def streamed(model: str, folder: str, sizes: Sequence[int]) -> Callable[[], Sample]:
    """Set up the stream: the pages of a folder again and again, no paragraph twice the same."""
    desk = load(model, device="cpu")
    paths = sorted(Path(folder).glob("*.html"))

    def documents(count: int, taken: list[Path]) -> Iterator[Document]:
        for i, path in enumerate(islice(cycle(paths), count)):
            taken.append(path)
            yield Document(path.read_text("utf-8").replace("</p>", f" {i}.</p>"), kind="html")

    def run() -> Sample:
        taken: list[Path] = []
        done, marks, peaks = [], [], []
        began = time.perf_counter()
        for i, _ in enumerate(desk.stream(documents(sizes[-1], taken)), 1):
            if i in sizes:  # all of its batch are read, and one more waits
                done.append(i if i == sizes[-1] else len(taken) - 1)
                marks.append(time.perf_counter() - began)
                peaks.append(peak_mebibytes())
        return {"pages": done, "marks": marks, "mebibytes": None if None in peaks else peaks}

    desk.predict(documents(2, []))
    return run


def peak_mebibytes() -> float | None:
    """Return the most memory that this process has held; None where /proc does not say."""
    # Not getrusage: what it says includes the process that this one was started from.
    status = Path("/proc/self/status")
    lines = status.read_text("utf-8").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1_024 for line in lines if line.startswith("VmHWM:")), None)


def single(model: str, sections: Sequence[str], lengths: Sequence[int]) -> Callable[[], Sample]:
    """Set up pages of several lengths.

    Returns:
        What gives the seconds of each under its number of tokens, and these numbers.
    """
    desk = load(model, device="cpu")

    def encoded(page: str) -> EncodedPage:
        return desk.prepare(Document(page, kind="html")).encoded

    longest = encoded(long_page(sections, lengths[-1] // MIN_TOKENS))
    totals = np.cumsum([len(longest.tokens[row]) for row in longest.distinct])
    pages = [long_page(sections, int(np.searchsorted(totals, length)) + 1) for length in lengths]
    sizes = [encoded(page).num_tokens for page in pages]
    desk.predict(pages, kind="html")

    def run() -> Sample:
        taken = {}
        for size, page in zip(sizes, pages, strict=True):
            desk.memory.clear()
            began = time.perf_counter()
            desk.predict_one(page, kind="html")
            taken[str(size)] = time.perf_counter() - began
        return {"lengths": sizes, **taken}

    return run


def long_page(sections: Sequence[str], count: int) -> str:
    """Return a page of `count` paragraphs, no two of them the same."""
    return "\n".join(f"<p>{html.escape(text)} {i}</p>" for i, text in enumerate(islice(cycle(sections), count)))


def start_rows(setup: Setup) -> list[Row]:
    """Measure the command line from its start to its first label."""
    page = ROOT / "data" / "sample" / "pages" / "eveninglantern" / "marlport-mayor-biscuit-tin.html"
    command = [sys.executable, "-m", "copydesk.cli", "predict", "--model", str(Path(setup.model).resolve())]
    command += ["--format", "jsonl", str(page)]
    _first_answer(command)
    taken = alternate({"ours": lambda: {"seconds": _first_answer(command)}}, repeats=setup.repeats)["ours"]
    return [
        Row(
            "`copydesk predict`, start to first label",
            median(taken, "seconds"),
            unit="s",
            goal=Goal(3, at_most=True),
            note=f"{page.stat().st_size / 1_024:.0f} KiB of HTML",
        )
    ]


def _first_answer(command: Sequence[str]) -> float:
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:  # noqa: S603 (a command of ours)
        line = process.stdout.readline() if process.stdout else b""
        seconds = time.perf_counter() - began
    if process.returncode or not line:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} and no answer: run it by hand")
    return seconds
