"""Reading pages beside what others would classify or encode their sections with.

Ours reads from HTML to labels and topics; the others are given the sections as we split them, and give a label or a
vector for each: no parsing, no topics. Each loads a text encoder of the same size.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import transformers

from bench.speed import engines
from bench.speed.apart import Sample, Side, SideError
from bench.speed.measure import Goal, Row, alternate, median
from bench.speed.pages import read_pages
from bench.speed.setup import Setup
from copydesk.page import Page
from copydesk.predictor import Predictor, load

BATCH_SIZES = (8, 32, 128)
"""Of which the others' best is chosen."""


def prediction_rows(setup: Setup) -> list[Row]:
    """Measure ours beside transformers' pipeline and sentence-transformers."""
    pages = read_pages(setup.sizes.pages)
    sections = [text for page in pages for text in page.raw.texts()]
    tried = setup.sizes.tried_sections
    with ExitStack() as stack:
        sides = {
            "ours": stack.enter_context(Side(ours, setup.model, [page.content for page in pages])),
            "single": stack.enter_context(Side(one_by_one, setup.stock, sections)),
            "batched": stack.enter_context(Side(in_batches, setup.stock, sections, tried)),
            "vectors": stack.enter_context(Side(vectors, setup.stock, sections, tried)),
        }
        taken = alternate(sides, repeats=setup.repeats)
    found = f"{len(pages)} pages, {len(sections):,} sections"
    best = {name: taken[name][0]["batch_size"] for name in ("batched", "vectors")}
    return [
        _row("`pipeline`, a section at a time", taken, "single", goal=20, note=found),
        _row("`pipeline` at its best batch size", taken, "batched", goal=6, note=f"{best['batched']} sections"),
        _row("sentence-transformers `encode`", taken, "vectors", goal=2, note=f"{best['vectors']} sections"),
    ]


def engine_rows(setup: Setup) -> list[Row]:
    """Measure ours beside the same model whose text encoder runs on another engine."""
    pages = [page.content for page in read_pages(setup.sizes.pages)]
    failed = {}
    with ExitStack() as stack:
        sides = {"ours": stack.enter_context(Side(ours, setup.model, pages))}
        for name, make in ENGINES.items():
            try:
                sides[name] = stack.enter_context(Side(make, setup.model, pages))
            except SideError as error:
                failed[name] = str(error).splitlines()[-1]
        taken = alternate(sides, repeats=setup.repeats)
    rows = []
    for name in ENGINES:
        note = f"missing: {failed[name]}" if name in failed else _agreement(taken["ours"][0], taken[name][0])
        rows.append(_row(f"{name} as text encoder", taken, name, goal=0.95, note=note))
    return rows


def _row(name: str, taken: Mapping[str, Sequence[Sample]], side: str, *, goal: float, note: str) -> Row:
    theirs = median(taken[side], "seconds") if side in taken else None
    ours = median(taken["ours"], "seconds")
    return Row(f"predict beside {name}", ours, theirs, unit="s", goal=Goal(goal), of_ratio=True, note=note)


def _agreement(ours: Sample, theirs: Sample) -> str:
    same = sum(a == b for a, b in zip(ours["labels"], theirs["labels"], strict=True))
    return f"{same / len(ours['labels']):.2%} of the labels agree"


def reading(desk: Predictor, pages: Sequence[str]) -> Callable[[], Sample]:
    """Return what reads pages with a predictor that is warm and has read none of them."""

    def run() -> Sample:
        desk.memory.clear()
        began = time.perf_counter()
        read = desk.predict(pages, kind="html")
        return {"seconds": time.perf_counter() - began, "labels": _labels(read)}

    run()
    return run


def _labels(pages: Sequence[Page]) -> list[str]:
    return [section.role or section.label for page in pages for section in page.sections]


def ours(model: str, pages: Sequence[str]) -> Callable[[], Sample]:
    """Set up `predict`."""
    return reading(load(model, device="cpu"), pages)


def on_onnx_runtime(model: str, pages: Sequence[str]) -> Callable[[], Sample]:
    """Set up `predict` with the text encoder on ONNX Runtime."""
    return reading(engines.with_onnx_runtime(model), pages)


def on_openvino_bfloat16(model: str, pages: Sequence[str]) -> Callable[[], Sample]:
    """Set up `predict` with the text encoder on OpenVINO, in bfloat16 where the processor has it."""
    return reading(engines.with_openvino(model), pages)


def on_openvino_int8(model: str, pages: Sequence[str]) -> Callable[[], Sample]:
    """Set up `predict` with the text encoder on OpenVINO, quantized on the same pages."""
    return reading(engines.with_openvino(model, calibration=pages), pages)


ENGINES = {
    "ONNX Runtime int8": on_onnx_runtime,
    "OpenVINO bfloat16": on_openvino_bfloat16,
    "OpenVINO int8": on_openvino_int8,
}


def one_by_one(stock: str, sections: Sequence[str]) -> Callable[[], Sample]:
    """Set up the pipeline, called for each section."""
    classify = transformers.pipeline("text-classification", model=stock, device="cpu")

    def run() -> Sample:
        return {"seconds": _seconds(lambda: [classify(text, truncation=True) for text in sections])}

    classify(sections[0], truncation=True)
    return run


def in_batches(stock: str, sections: Sequence[str], tried: int) -> Callable[[], Sample]:
    """Set up the pipeline, called once for all sections, with the batch size that is fastest on the first of them."""
    classify = transformers.pipeline("text-classification", model=stock, device="cpu")

    def work(texts: Sequence[str], batch_size: int) -> object:
        return classify(list(texts), batch_size=batch_size, truncation=True)

    return _at_best(work, sections, tried)


def vectors(stock: str, sections: Sequence[str], tried: int) -> Callable[[], Sample]:
    """Set up sentence-transformers, which sorts the pooled sections by length."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(stock, device="cpu", local_files_only=True)

    def work(texts: Sequence[str], batch_size: int) -> object:
        return encoder.encode(list(texts), batch_size=batch_size, show_progress_bar=False)

    return _at_best(work, sections, tried)


def _at_best(work: Callable[[Sequence[str], int], object], sections: Sequence[str], tried: int) -> Callable[[], Sample]:
    trial = sections[:tried]
    work(trial, BATCH_SIZES[0])  # warms up
    taken = {size: _seconds(partial(work, trial, size)) for size in BATCH_SIZES}
    best = min(taken, key=taken.__getitem__)

    def run() -> Sample:
        return {"seconds": _seconds(lambda: work(sections, best)), "batch_size": best}

    return run


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
