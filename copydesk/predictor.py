"""Read pages with a saved model: split, encode, network, decode, batched by token budget.

Knows devices, precision and batches; knows nothing of files but the model folder.
"""

import ctypes
import gc
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from copydesk import int8
from copydesk.decode import (
    article_of,
    class_probabilities,
    expecting_headline,
    list_topics,
    page_from,
    topic_probabilities,
)
from copydesk.detect import Kind
from copydesk.encode import EncodedPage, PageBatch, TextEncoder, collate_distinct
from copydesk.int8 import LayerRanges
from copydesk.memory import Rows, VectorMemory
from copydesk.page import FailedPage, ModelInfo, Page, PageError
from copydesk.ragged import TokenRows
from copydesk.saved import SavedModel, load_saved
from copydesk.split import Limits, RawPage, split

log = logging.getLogger(__name__)

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "int8", "bfloat16", "float32"]


class Document(NamedTuple):
    """A page to read, with what is known of it."""

    content: str | bytes
    source: str | None = None
    url: str | None = None
    kind: Kind = "auto"


@dataclass(frozen=True, slots=True)
class PreparedPage:
    """A page, split and encoded, that waits for the network."""

    document: Document
    raw: RawPage
    encoded: EncodedPage

    @property
    def num_tokens(self) -> int:
        """Tokens that the section encoder reads for this page."""
        return self.encoded.num_tokens

    @property
    def num_sections(self) -> int:
        """Sections of this page."""
        return len(self.encoded)


def load(
    path: str | Path, *, device: Device = "auto", precision: Precision = "auto", limits: Limits | None = None
) -> "Predictor":
    """Load a model folder, ready to read pages.

    Two things change for the whole process: freed memory is kept, and the garbage collector passes over all objects
    that there are by then (`gc.freeze`).

    Raises:
        ModelError: the folder cannot be trusted or understood.
        EncoderError: it builds on a pretrained encoder that cannot be had.
        ValueError: the device or the precision is not to be had.
    """
    tune_malloc()
    predictor = Predictor(load_saved(path), device=device, precision=precision, limits=limits)
    _spare_collector()
    _give_back()
    return predictor


def choose_device(device: Device) -> torch.device:
    """Return the device to run on.

    Raises:
        ValueError: CUDA is asked for and not there, or it is no device.
    """
    _check_choice("device", device, Device)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA device: use --device cpu, or install torch for CUDA")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def native_bfloat16(device: torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 in hardware; elsewhere it is many times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_precision(precision: Precision, device: torch.device, ranges: Sequence[LayerRanges] | None) -> Precision:
    """Return what the text encoder is to compute in: the fastest that the processor knows, if that is left open.

    Args:
        precision: asked for.
        device: to run on.
        ranges: of the model's activations, without which there are no 8-bit integers.

    Raises:
        ValueError: int8 is asked for and not to be had, or it is no precision.
    """
    _check_choice("precision", precision, Precision)
    if precision == "int8":
        if device.type != "cpu":
            raise ValueError(f"precision is int8, which is for processors, and the device is {device}: use auto")
        if not int8.is_native():
            raise ValueError("precision is int8, which this processor or this torch does not multiply: use auto")
        if not ranges:
            raise ValueError("precision is int8, but the model has no ranges: use auto, or run fit and release again")
    if precision != "auto":
        return precision
    if ranges and device.type == "cpu" and int8.is_native():
        return "int8"
    return "bfloat16" if native_bfloat16(device) else "float32"


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in (allowed := get_args(choices)):
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")


def tune_malloc() -> None:
    """Keep freed memory: glibc otherwise maps and unmaps every large tensor, a page fault for each 4 KiB."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # not glibc
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**30)
    mallopt(top_pad, 64 * 2**20)


def _give_back() -> None:
    """Let the system have what loading has freed: `tune_malloc` would keep it."""
    with suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _spare_collector() -> None:
    """Let the garbage collector pass over what is there by now: it would walk all modules for each few dozen pages."""
    gc.unfreeze()  # of a model that was loaded before
    gc.collect()
    gc.freeze()


class Predictor:
    """Reads pages. Make one with `copydesk.load`.

    Several threads may use it at once.
    """

    def __init__(
        self,
        saved: SavedModel,
        *,
        device: Device = "auto",
        precision: Precision = "auto",
        limits: Limits | None = None,
        max_batch_tokens: int = 32_768,
        max_batch_sections: int = 8_192,
        max_batch_pages: int = 256,
        max_remembered_sections: int = 32_768,
    ) -> None:
        """Place a saved model on a device.

        Args:
            saved: the model, which is the predictor's from now on.
            device: `auto` takes CUDA where there is one.
            precision: of the text encoder; `auto` takes the fastest that the device multiplies natively. Page layers
                compute in bfloat16 unless it is float32, or the device has none.
            limits: what a page may cost.
            max_batch_tokens: budget of one batch; a page above it makes a batch of its own.
            max_batch_sections: likewise.
            max_batch_pages: likewise.
            max_remembered_sections: distinct sections whose vectors are kept for pages to come, about 2 KB each.
        """
        self.saved = saved
        self.limits = limits or Limits()
        self.info = ModelInfo(name=saved.manifest.name, version=saved.manifest.version)
        self.device = choose_device(device)
        self.max_batch_tokens, self.max_batch_sections = max_batch_tokens, max_batch_sections
        self.max_batch_pages = max_batch_pages
        self.model = saved.model
        ranges = saved.description.ranges
        self.precision = choose_precision(precision, self.device, ranges)
        if self.precision == "int8" and ranges:
            int8.quantize(self.model.encoder, ranges)
        self.model.to(self.device)
        if self.precision == "bfloat16" or (self.precision == "int8" and native_bfloat16(self.device)):
            self.model.multiply_in(torch.bfloat16)  # the rest costs little and stays exact
        self.thresholds = saved.thresholds
        self._text_encoder = TextEncoder(saved.tokenizer, saved.description.encoding, saved.description.hints)
        width = self.model.encoder.config.hidden_size
        self.memory = VectorMemory(max_remembered_sections, width=width, device=self.device)
        log.info("%s %s on %s in %s", self.info.name, self.info.version, self.device, self.precision)

    def predict_one(self, page: str | bytes, *, kind: Kind = "auto") -> Page:
        """Read one page.

        Raises:
            PageError: the page breaks a limit.
            ValueError: it is no kind.
        """
        return self.predict([page], kind=kind)[0]

    def predict(self, pages: Iterable[str | bytes | Document], *, kind: Kind = "auto") -> list[Page]:
        """Read pages, in order.

        Args:
            pages: HTML or plain text, or a `Document` that says more.
            kind: what they are, where they do not say so themselves.

        Raises:
            PageError: a page breaks a limit.
            TypeError: it is one page, no list.
            ValueError: it is no kind.
        """
        if isinstance(pages, str | bytes | Document):  # which can be walked, too
            raise TypeError(f"pages is one {type(pages).__name__}, expected a list: pass [page], or use predict_one")
        documents = (page if isinstance(page, Document) else Document(page, kind=kind) for page in pages)
        return [page for page in self._read(documents, keep_failures=False) if isinstance(page, Page)]

    def stream(self, documents: Iterable[Document | FailedPage]) -> Iterator[Page | FailedPage]:
        """Read pages as they come, in order.

        Args:
            documents: pages, and in their places rows for those that could not even be fetched, which are passed on.

        Yields:
            A `FailedPage` for a page that breaks a limit, the splitter or the model, so that the others are read all
            the same.
        """
        return self._read(documents, keep_failures=True)

    def _read(self, documents: Iterable[Document | FailedPage], *, keep_failures: bool) -> Iterator[Page | FailedPage]:
        waiting: list[PreparedPage | FailedPage] = []
        tokens = sections = 0
        for document in documents:
            if isinstance(document, Document):
                _check_choice("kind", document.kind, Kind)
            item = document if isinstance(document, FailedPage) else self._prepare(document, keep_failures)
            if isinstance(item, PreparedPage):
                tokens += item.num_tokens
                sections += item.num_sections
            over = (
                tokens > self.max_batch_tokens
                or sections > self.max_batch_sections
                or len(waiting) >= self.max_batch_pages
            )
            if waiting and over:
                yield from self._finish(waiting, keep_failures)
                waiting = []
                tokens = item.num_tokens if isinstance(item, PreparedPage) else 0
                sections = item.num_sections if isinstance(item, PreparedPage) else 0
            waiting.append(item)
        yield from self._finish(waiting, keep_failures)

    def _prepare(self, document: Document, keep_failures: bool) -> PreparedPage | FailedPage:  # noqa: FBT001 (private)
        try:
            return self.prepare(document)
        except Exception as error:
            if not keep_failures:
                raise
            if isinstance(error, PageError):
                return FailedPage(source=document.source, error=str(error))
            log.exception("%s broke the splitter", document.source)
            reason = f"the page could not be split ({type(error).__name__}: {error}): report the page"
            return FailedPage(source=document.source, error=reason)

    def _finish(
        self,
        waiting: Sequence[PreparedPage | FailedPage],
        keep_failures: bool,  # noqa: FBT001 (private)
    ) -> Iterator[Page | FailedPage]:
        prepared = [item for item in waiting if isinstance(item, PreparedPage)]
        pages = iter(self.read_batch(prepared) if keep_failures else self._predict_batch(prepared))
        for item in waiting:
            yield next(pages) if isinstance(item, PreparedPage) else item

    def prepare(self, document: Document) -> PreparedPage:
        """Split and encode a page, in any thread.

        Raises:
            PageError: the page breaks a limit.
        """
        raw = split(document.content, kind=document.kind, limits=self.limits)
        return PreparedPage(document, raw, self._text_encoder.encode_page(raw))

    def read_batch(self, batch: Sequence[PreparedPage]) -> Sequence[Page | FailedPage]:
        """Read pages in one batch; if one breaks the model, find out which by halves.

        Returns:
            A `Page` for each, or a `FailedPage` for one that breaks the model.
        """
        try:
            return self._predict_batch(batch)
        except Exception as error:
            if len(batch) > 1:
                middle = len(batch) // 2
                return [*self.read_batch(batch[:middle]), *self.read_batch(batch[middle:])]
            log.exception("the model failed on %s", batch[0].document.source)
            reason = f"the model failed on this page ({type(error).__name__}: {error}): report the page"
            return [FailedPage(source=batch[0].document.source, error=reason)]

    def _predict_batch(self, batch: Sequence[PreparedPage]) -> list[Page]:
        logits = self.section_logits([item.encoded for item in batch])
        probabilities = [self._class_probabilities(page) for page in logits]
        articles = [article_of(item.raw, page) for item, page in zip(batch, probabilities, strict=True)]
        topics = list_topics(
            self.topic_probabilities(["\n".join(article) for article in articles]),
            thresholds=self.thresholds,
            topics=self.saved.topics,
        )
        return [
            page_from(
                item.raw,
                article=article,
                probabilities=page,
                topics=found if any(article) else (),
                model=self.info,
                source=item.document.source,
                url=item.document.url,
            )
            for item, article, page, found in zip(batch, articles, probabilities, topics, strict=True)
        ]

    def _class_probabilities(self, logits: np.ndarray) -> np.ndarray:
        description = self.saved.description
        probabilities = class_probabilities(logits, temperature=description.section_temperature)
        return expecting_headline(probabilities, share=description.headline_share)

    def topic_probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Return calibrated (articles, topics) of articles: headline, line break, body."""
        return topic_probabilities(
            self.topic_logits(texts),
            temperature=self.saved.description.topic_temperature,
            topics=self.saved.topics,
        )

    @torch.inference_mode()
    def section_logits(self, pages: Sequence[EncodedPage]) -> list[np.ndarray]:
        """Return (sections, classes) of each page."""
        if not pages:
            return []
        rows, batch = collate_distinct(pages)
        vectors = self.memory.vectors(rows, self._encode)
        logits = self.model.mean_section_logits(vectors, move_batch(batch, self.device)).cpu().numpy()
        return np.split(logits, np.cumsum(batch.page_lengths)[:-1])

    @torch.inference_mode()
    def topic_logits(self, texts: Sequence[str]) -> np.ndarray:
        """Return (articles, topics) of articles."""
        return self.model.topic_logits(TokenRows.of(self._text_encoder.encode_articles(texts))).cpu().numpy()

    def _encode(self, rows: Rows) -> torch.Tensor:
        return self.model.encode_rows(TokenRows.of(rows))


def move_batch(batch: PageBatch, device: torch.device) -> PageBatch:
    """Return the batch on a device."""
    if device.type == "cpu":
        return batch
    return PageBatch(
        rows=batch.rows,
        row_of_section=batch.row_of_section.to(device),
        features=batch.features.to(device),
        hint_ids=batch.hint_ids.to(device),
        hint_offsets=batch.hint_offsets.to(device),
        page_lengths=batch.page_lengths,
    )
