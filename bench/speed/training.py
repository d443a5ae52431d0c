"""An epoch of ours beside one of the stock Trainer, on the same pages or articles.

The Trainer learns each section, or each article, as a row of its own, cut to as many tokens as ours reads: float32,
dropout, padding by its own collator, and as many real tokens a step. All layers learn on both sides; time to split and
to tokenize counts on neither.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bench.speed.apart import Sample, Side
from bench.speed.cost import TRAINING, page_flops, peak, text_flops
from bench.speed.measure import Goal, Row, alternate, median
from bench.speed.pages import read_long_articles, read_pages
from bench.speed.setup import Setup
from copydesk.encode import TextEncoder
from copydesk.labels import CLASSES
from copydesk.network import PageShape
from copydesk.predictor import tune_malloc
from copydesk.saved import SavedModel, load_saved
from train.config import TransformerFit
from train.fitting import Fitting
from train.packs import Packs
from train.rows import Rows, TrainingArticle, TrainingPage

What = Literal["sections", "articles"]
TOKENS_PER_STEP = 4_000
"""As configs/pages.yaml; eight articles of 512 tokens, the Trainer's default batch."""
ARTICLE_TOKENS = 512
CHECKPOINT_STEPS = 500
"""The Trainer's default; each side writes one checkpoint at its end."""
GOALS: Mapping[What, float] = {"sections": 2.5, "articles": 5}
NAMES: Mapping[What, str] = {"sections": "section rows", "articles": f"{ARTICLE_TOKENS}-token article rows"}


class Stopwatch(TrainerCallback):
    """Takes the time from the first step to the end of training."""

    began = seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.began = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self.began


def training_rows(setup: Setup) -> list[Row]:
    """Measure both kinds of rows."""
    return [
        *_compare(setup, "sections", count=setup.sizes.training_pages),
        *_compare(setup, "articles", count=setup.sizes.articles),
    ]


def _compare(setup: Setup, what: What, *, count: int) -> list[Row]:
    with ExitStack() as stack:
        sides = {
            "ours": stack.enter_context(Side(ours, setup.model, setup.stock, what, count)),
            "theirs": stack.enter_context(Side(theirs, setup.model, setup.stock, what, count)),
            "peak": stack.enter_context(Side(peak, setup.sizes.matrices, setup.sizes.peak_seconds)),
        }
        taken = alternate(sides, repeats=setup.repeats)
    seconds = median(taken["ours"], "seconds")
    counts, batch = taken["ours"][0], taken["theirs"][0]
    flops_per_second = counts["flops"] / seconds
    precision = "bfloat16" if "bfloat16" in taken["peak"][0] else "float32"
    return [
        Row(
            f"an epoch beside `Trainer`, {NAMES[what]}",
            seconds,
            median(taken["theirs"], "seconds"),
            unit="s",
            goal=Goal(GOALS[what]),
            of_ratio=True,
            note=f"{batch['rows']} rows, {batch['batch_size']} a step",
        ),
        Row(
            f"share of the {precision} matmul peak in training, {NAMES[what]}",
            flops_per_second / (1e9 * median(taken["peak"], precision)),
            goal=Goal(0.33),
            note=f"{counts['real'] / seconds:,.0f} real tokens/s",
        ),
    ]


def ours(model: str, stock: str, what: What, count: int) -> Callable[[], Sample]:
    """Set up our training: packs and trainer as the fit stage uses them."""
    tune_malloc()
    saved = load_saved(model)
    rows = _section_rows(saved, count) if what == "sections" else _article_rows(saved, count)
    settings = _settings(saved, stock, rows)
    fitting = Fitting(settings, Path(stock), saved.topics, num_hints=len(saved.description.hints))
    counts = _counts(saved, rows, settings)

    def run(rows: Rows = rows) -> Sample:
        watch = Stopwatch()
        with tempfile.TemporaryDirectory() as folder:
            fitting.run(rows, None, epochs=1, output=Path(folder), callbacks=[watch])
        return counts | {"seconds": watch.seconds}

    run(Rows(rows.pages[:1], rows.articles[:1]))
    return run


def _section_rows(saved: SavedModel, count: int) -> Rows:
    encoder = TextEncoder(saved.tokenizer, saved.description.encoding, saved.description.hints)
    return Rows(
        [
            TrainingPage(
                page.annotation.page,
                page.source,
                page.annotation.site,
                0,
                encoder.encode_page(page.raw),
                np.array(page.classes),
            )
            for page in read_pages(count)
        ],
        [],
    )


def _article_rows(saved: SavedModel, count: int) -> Rows:
    """Return articles, and the shortest of some pages: our packs are counted by the tokens of pages."""
    encoding = saved.description.encoding.model_copy(update={"max_article_tokens": _article_tokens(saved)})
    encoder = TextEncoder(saved.tokenizer, encoding, saved.description.hints)
    articles = read_long_articles(count)
    rows = encoder.encode_articles([text for text, _ in articles])
    everything = np.ones(len(saved.topics), dtype=np.float32)
    return Rows(
        [min(_section_rows(saved, 8).pages, key=lambda page: page.encoded.num_tokens)],
        [
            TrainingArticle(str(i), str(i), 0, tokens, _holds(saved, topics), everything)
            for i, (tokens, (_, topics)) in enumerate(zip(rows, articles, strict=True))
        ],
    )


def _article_tokens(saved: SavedModel) -> int:
    return min(ARTICLE_TOKENS, saved.model.encoder.config.max_position_embeddings)


def _holds(saved: SavedModel, topics: Sequence[str]) -> np.ndarray:
    return np.array([topic.id in topics for topic in saved.topics.topics], dtype=np.float32)


def _settings(saved: SavedModel, stock: str, rows: Rows) -> TransformerFit:
    page_tokens = sum(page.encoded.num_tokens for page in rows.pages)
    steps = max(1, round(max(page_tokens, sum(len(row.tokens) for row in rows.articles)) / TOKENS_PER_STEP))
    described = saved.description.network.model_dump(include=set(PageShape.model_fields))
    return TransformerFit(
        kind="transformer",
        encoder=stock,
        network=PageShape(**described),
        epochs=1,
        tokens_per_batch=max(1, page_tokens // steps),
        learning_rate=5e-5,
        head_learning_rate=2e-4,
        class_weight_power=0.25,
        checkpoint_steps=CHECKPOINT_STEPS,
        device="cpu",
    )


def _counts(saved: SavedModel, rows: Rows, settings: TransformerFit) -> Sample:
    """Return what an epoch costs, as it is packed."""
    packs = Packs(rows.pages, rows.articles, settings=settings, epochs=1, num_topics=len(saved.topics))
    real = 0
    flops = 0.0
    for pack in (packs[i] for i in range(len(packs))):
        lengths = [*pack.views[0].rows.lengths.tolist(), *pack.articles.lengths.tolist()]
        real += sum(lengths)
        flops += text_flops(saved.model.encoder.config, lengths) + page_flops(saved.model, pack.views[0].page_lengths)
    return {"real": real, "flops": TRAINING * flops}


def theirs(model: str, stock: str, what: What, count: int) -> Callable[[], Sample]:
    """Set up the stock Trainer."""
    saved = load_saved(model)
    tokenizer = AutoTokenizer.from_pretrained(stock)
    texts, labels, num_labels, max_length = _stock_task(saved, what, count)
    tokens = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    rows = [{"input_ids": ids, "label": label} for ids, label in zip(tokens, labels, strict=True)]
    batch_size = max(1, round(TOKENS_PER_STEP * len(rows) / sum(map(len, tokens))))
    problem = "single_label_classification" if what == "sections" else "multi_label_classification"

    def run(rows: Any = rows) -> Sample:
        watch = Stopwatch()
        network = AutoModelForSequenceClassification.from_pretrained(
            stock, num_labels=num_labels, problem_type=problem, dtype=torch.float32
        )
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=batch_size,
                report_to=[],
                use_cpu=True,
                dataloader_pin_memory=False,
            )
            trainer = Trainer(
                model=network,
                args=arguments,
                train_dataset=rows,
                data_collator=DataCollatorWithPadding(tokenizer),
                callbacks=[watch],
            )
            trainer.train()
        return {"seconds": watch.seconds, "rows": len(tokens), "batch_size": batch_size}

    run(rows[:2])
    return run


def _stock_task(saved: SavedModel, what: What, count: int) -> tuple[list[str], list[Any], int, int]:
    """Return texts, targets, the number of classes and the tokens of a row."""
    if what == "articles":
        articles = read_long_articles(count)
        targets = [_holds(saved, topics).tolist() for _, topics in articles]
        return [text for text, _ in articles], targets, len(saved.topics), _article_tokens(saved)
    encoding = saved.description.encoding
    pairs = [pair for page in read_pages(count) for pair in zip(page.raw.texts(), page.classes, strict=True)]
    around = len(saved.tokenizer.encode("").ids)
    num_tokens = encoding.head_tokens + encoding.tail_tokens + around
    return [text for text, _ in pairs], [label for _, label in pairs], len(CLASSES), num_tokens
