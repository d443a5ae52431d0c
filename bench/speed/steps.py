"""Where the time of reading a page goes, and how much of its text encoder's peak the network reaches.

The calls of `predict` are timed in place, so that what is measured is what runs.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial, wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import copydesk.predictor
from bench.speed.apart import Sample, Side
from bench.speed.cost import page_flops, peak, text_flops
from bench.speed.measure import Goal, Row, alternate, median
from bench.speed.pages import read_pages
from bench.speed.setup import Setup
from copydesk.encode import PageBatch, TextEncoder
from copydesk.predictor import Predictor, choose_precision, load
from copydesk.ragged import TokenRows
from copydesk.saved import read_description

STEPS = {
    "split": "parse and split",
    "encode_page": "tokenize, layout features",
    "collate_distinct": "pack",
    "encode_rows": "text encoder",
    "each_section_logits": "page layers",
    "topic_logits": "topics",
    "class_probabilities": "decode",
    "expecting_headline": "decode",
    "article_of": "decode",
    "topic_probabilities": "decode",
    "list_topics": "decode",
    "page_from": "decode",
}
"""The function that takes a step, and the step's name."""


class Clock:
    """Adds up the seconds of calls by name; a call within another one counts for the outer one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running = False

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed."""

        @wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            if self._running:
                return function(*arguments, **keywords)
            self._running = True
            began = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self.seconds[name] += time.perf_counter() - began
                self._running = False

        return call


def step_rows(setup: Setup) -> list[Row]:
    """Measure pages a second beside trafilatura, the share of each step, and what the network makes of the peak."""
    pages = [page.content for page in read_pages(setup.sizes.pages)]
    with ExitStack() as stack:
        sides = {
            "ours": stack.enter_context(Side(ours, setup.model, pages)),
            "theirs": stack.enter_context(Side(theirs, pages)),
            "peak": stack.enter_context(Side(peak, setup.sizes.matrices, setup.sizes.peak_seconds)),
        }
        taken = alternate(sides, repeats=setup.repeats)
    counts = taken["ours"][0]
    seconds = median(taken["ours"], "seconds")
    precision = choose_precision("auto", torch.device("cpu"), read_description(setup.model).ranges)
    flops = counts["flops"] / (1e9 * median(taken["peak"], precision))
    pace = Row(
        "pages from HTML, beside trafilatura's bodies",
        len(pages) / seconds,
        len(pages) / median(taken["theirs"], "seconds"),
        unit="pages/s",
        more_is_better=True,
    )
    return [
        Row(
            f"share of the {precision} matmul peak in prediction, the network",
            flops / median(taken["ours"], "network"),
            goal=Goal(0.4),
            note=f"{counts['real'] / median(taken['ours'], 'network'):,.0f} real tokens/s",
        ),
        Row(
            f"share of the {precision} matmul peak in prediction, from HTML",
            flops / seconds,
            goal=Goal(0.4),
            note=f"{counts['real'] / seconds:,.0f} real tokens/s",
        ),
        Row("real tokens of all, prediction", counts["real"] / counts["computed"], goal=Goal(0.95)),
        pace,
        *(
            Row(f"share of the time: {name}", 100 * median(taken["ours"], name) / seconds, unit="%")
            for name in _names()
        ),
    ]


def _names() -> list[str]:
    return list(dict.fromkeys(STEPS.values()))


def ours(model: str, pages: Sequence[str]) -> Callable[[], Sample]:
    """Set up `predict`, its steps timed."""
    desk = load(model, device="cpu")

    def run() -> Sample:
        clock, network, counts = Clock(), Clock(), Counter[str]()
        with ExitStack() as stack:
            for owner, name, function in [*_steps_of(desk), *_network_of(desk, network, counts)]:
                timed = clock.timed(STEPS[name], function)
                stack.enter_context(patch.object(owner, name, timed))
            count = partial(_count_computed, counts=counts)
            stack.callback(desk.model.encoder.embeddings.register_forward_hook(count).remove)
            desk.memory.clear()
            began = time.perf_counter()
            desk.predict(pages, kind="html")
            seconds = time.perf_counter() - began
        steps = {name: clock.seconds[name] for name in _names()}
        return {"seconds": seconds, "network": network.seconds["network"], **counts, **steps}

    run()
    return run


def _count_computed(_: nn.Module, __: object, hidden: torch.Tensor, *, counts: Counter[str]) -> None:
    counts["computed"] += len(hidden)


def _steps_of(desk: Predictor) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return steps outside of the network: where the function stands, its name, itself."""
    module = copydesk.predictor
    return [
        *((module, name, getattr(module, name)) for name in STEPS if hasattr(module, name)),
        (TextEncoder, "encode_page", TextEncoder.encode_page),
        (desk, "topic_logits", desk.topic_logits),
    ]


def _network_of(desk: Predictor, network: Clock, counts: Counter[str]) -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return the network's two parts, timed together, what they cost counted."""
    model = desk.model
    encode_rows = network.timed("network", model.encode_rows)
    each_section_logits = network.timed("network", model.each_section_logits)

    def counted_rows(rows: TokenRows) -> Any:
        counts["real"] += len(rows.ids)
        counts["flops"] += int(text_flops(model.encoder.config, rows.lengths.tolist()))
        return encode_rows(rows)

    def counted_sections(rows: Any, views: Sequence[PageBatch]) -> Any:
        counts["flops"] += int(page_flops(model, views[0].page_lengths))
        return each_section_logits(rows, views)

    return [(model, "encode_rows", counted_rows), (model, "each_section_logits", counted_sections)]


def theirs(pages: Sequence[str]) -> Callable[[], Sample]:
    """Set up trafilatura."""
    import trafilatura

    def run() -> Sample:
        began = time.perf_counter()
        for page in pages:
            trafilatura.extract(page, include_comments=False, include_tables=True)
        return {"seconds": time.perf_counter() - began}

    run()
    return run
