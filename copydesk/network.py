"""The network: text encoder, page encoders, section heads, topic head. Tensors in, logits out.

Knows weights and shapes; knows nothing of text, thresholds or files. Shapes: S sections of all pages of a batch, D the
encoder's width, P page encoders, V views of the same pages, C classes, A articles, T topics.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from torch import nn
from torch.nn import functional

from copydesk.attention import attend_rows
from copydesk.bert import Bert, BertSettings
from copydesk.encode import NUM_FEATURES, PageBatch
from copydesk.labels import CLASSES
from copydesk.ragged import TokenRows, equal_runs

MAX_GROUP_SECTIONS = 2_048
"""Sections that the layers of a page encoder hold at once; more where a window is longer."""


class PageShape(BaseModel):
    """Shape of what stands above the text encoder: what a config may choose."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    page_width: PositiveInt = 256
    """Width of the page encoders, a multiple of 64."""
    page_layers: NonNegativeInt = 2
    """Their depth; 0 judges each section by itself."""
    page_encoders: PositiveInt = 1
    """How many read each page, their probabilities averaged."""
    text_readers: NonNegativeInt = 0
    """How many of them, the last, read every page as if it had come as plain text: tags and class names mislead on
    sites that use them in their own way. In training they see what the others see."""
    own_text_readers: NonNegativeInt = 0
    """How many of them, the first, also judge each section by its own text alone, through a hidden layer, which counts
    beside what the page says of it. It helps most where there are no tags; all of them would be too much alike."""
    hint_width: PositiveInt = 64
    """Width of the embeddings of hints."""
    topic_width: NonNegativeInt = 0
    """Width of a hidden layer below the topic logits; 0: they are linear in the article's vector."""
    window_sections: PositiveInt = 1_024
    """Sections that a page encoder reads at once."""
    window_overlap: NonNegativeInt = 256
    """Sections that neighbouring windows share."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the residuals of the page encoders and in hidden layers, in training."""
    vector_dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the section vectors that they read, in training."""

    @model_validator(mode="after")
    def _windows_advance(self) -> Self:
        if self.window_overlap >= self.window_sections:
            raise ValueError("window_overlap must be smaller than window_sections")
        return self

    @model_validator(mode="after")
    def _readers_are_page_encoders(self) -> Self:
        for name in ("text_readers", "own_text_readers"):
            if getattr(self, name) > self.page_encoders:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected at most page_encoders: {self.page_encoders}"
                )
        return self


class CopydeskConfig(PageShape):
    """Shape of the whole network; saved with a model."""

    encoder: dict[str, Any]
    """Config of the text encoder, as transformers writes it, with its `model_type`."""
    num_topics: int
    """Logits of the topic head."""
    num_hints: int = 1
    """Size of the vocabulary of hints."""


class PageLayer(nn.Module):
    """A pre-norm transformer layer over the sections of one window, with rotary positions (arXiv:2104.09864)."""

    def __init__(self, width: int, *, dropout: float) -> None:
        super().__init__()
        if width % 64:
            raise ValueError(f"page_width is {width}, expected a multiple of 64: heads are 64 wide")
        self.num_heads = width // 64
        self.dropout = nn.Dropout(dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed_up = nn.Linear(width, 4 * width)
        self.feed_down = nn.Linear(4 * width, width)

    def forward(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], lengths: Sequence[int]
    ) -> torch.Tensor:
        """Read windows of sections, one after the other in (sections, width), each by itself; return the same shape."""
        sections = len(x)
        dtype = self.feed_up.weight.dtype
        heads = self.query_key_value(self.attention_norm(x).to(dtype)).view(sections, 3 * self.num_heads, 64)
        query_key, value = heads.split((2 * self.num_heads, self.num_heads), dim=1)
        query, key = _rotate(query_key, rotary).chunk(2, dim=1)
        x = x + self.dropout(self.attention_output(attend_rows(query, key, value, lengths).flatten(1)))
        return x + self.dropout(self.feed_down(functional.gelu(self.feed_up(self.feed_norm(x).to(dtype)))))

    def multiply_in(self, dtype: torch.dtype) -> None:
        """Compute projections and attention in another precision; sums and norms stay in the one of the input."""
        for linear in (self.query_key_value, self.attention_output, self.feed_up, self.feed_down):
            linear.to(dtype)


def _rotary(lengths: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of each section's place in its window, (sections, 1, 64) each."""
    rates = 1_000.0 ** (-torch.arange(0, 64, 2, device=device) / 64)
    angles = torch.outer(torch.arange(max(lengths), device=device), rates).repeat(1, 2)
    places = torch.cat([torch.arange(length, device=device) for length in lengths])
    return angles.cos()[places, None], angles.sin()[places, None]


def _rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = (part.to(x.dtype) for part in rotary)
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def windows_of(length: int, *, size: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """Cover `length` sections by windows.

    Returns:
        (start, stop, keep_from, keep_to) of each: all sections are read at least once, each is kept once, from the
        window in which it stands farther from an edge.
    """
    if length <= size:
        return [(0, length, 0, length)]
    count = -(-(length - overlap) // (size - overlap))
    starts = [round(i * (length - size) / (count - 1)) for i in range(count)]
    cuts = [0, *((b + a + size) // 2 for a, b in pairwise(starts)), length]
    return [(start, start + size, cuts[i], cuts[i + 1]) for i, start in enumerate(starts)]


def _two_layers(width: int, inner: int, out: int, *, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, out)
    )


class OwnText(nn.Module):
    """What a section's own vector says, whatever stands around it.

    Without it page encoders make of a vector hardly more than a linear classifier would (bench/LOG.md).
    """

    def __init__(self, config: CopydeskConfig, width: int) -> None:
        super().__init__()
        self.hidden = _two_layers(width, config.page_width, config.page_width, dropout=config.dropout)
        self.head = nn.Sequential(nn.LayerNorm(config.page_width), nn.Linear(config.page_width, len(CLASSES)))

    def forward(self, vectors: torch.Tensor, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (S, page_width) with the hidden layer added, and logits (S, C).

        Args:
            vectors: of sections, (S, D).
            projected: the same, (S, page_width).
        """
        x = projected + self.hidden(vectors)
        return x, self.head(x)


class PageEncoder(nn.Module):
    """Reads the section vectors of a whole page in order, with their layout."""

    def __init__(self, config: CopydeskConfig, width: int, *, reads_own_text: bool) -> None:
        super().__init__()
        self.size, self.overlap = config.window_sections, config.window_overlap
        self.vector_dropout = nn.Dropout(config.vector_dropout)
        self.section_projection = nn.Linear(width, config.page_width)
        self.own_text = OwnText(config, width) if reads_own_text else None
        self.feature_projection = nn.Linear(NUM_FEATURES, config.page_width)
        self.hint_embedding = nn.EmbeddingBag(config.num_hints, config.hint_width, mode="sum")
        nn.init.normal_(self.hint_embedding.weight, std=0.02)  # a hint never seen in training must say next to nothing
        self.hint_projection = nn.Linear(config.hint_width, config.page_width)
        self.layers = nn.ModuleList(
            PageLayer(config.page_width, dropout=config.dropout) for _ in range(config.page_layers)
        )
        self.norm = nn.LayerNorm(config.page_width)

    def forward(self, sections: torch.Tensor, batch: PageBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (S, page_width) and, if it reads them, logits (S, C) of own texts, from section vectors (S, D)."""
        hints = self.hint_embedding(batch.hint_ids, batch.hint_offsets)
        vectors = self.vector_dropout(sections)
        x, own_logits = self.section_projection(vectors), None
        if self.own_text:
            x, own_logits = self.own_text(vectors, x)
        x = x + self.feature_projection(batch.features)
        x += self.hint_projection(hints)
        return self._read(x, batch.page_lengths), own_logits

    def multiply_in(self, dtype: torch.dtype) -> None:
        """Compute the projections and the attention of its layers in another precision."""
        for module in self.layers:
            if isinstance(module, PageLayer):
                module.multiply_in(dtype)

    def _read(self, x: torch.Tensor, page_lengths: Sequence[int]) -> torch.Tensor:
        windows, page_start = [], 0
        for length in page_lengths:
            for start, stop, keep_from, keep_to in windows_of(length, size=self.size, overlap=self.overlap):
                windows.append((page_start + start, page_start + stop, slice(keep_from - start, keep_to - start)))
            page_start += length
        kept: list[torch.Tensor] = []
        while windows:  # some at a time: a page of 100,000 sections must not be held at every width at once
            group = [windows.pop(0)]
            while windows and windows[0][1] - group[0][0] <= MAX_GROUP_SECTIONS:
                group.append(windows.pop(0))
            lengths = [stop - start for start, stop, _ in group]
            rotary = _rotary(lengths, x.device)
            read = torch.cat([x[start:stop] for start, stop, _ in group])
            for layer in self.layers:
                read = layer(read, rotary, lengths)
            read = self.norm(read)
            kept += [window[keep] for window, (_, _, keep) in zip(read.split(lengths), group, strict=True)]
        return torch.cat(kept)


class CopydeskModel(nn.Module):
    """Section logits for pages and topic logits for articles, from one text encoder."""

    def __init__(self, shape: CopydeskConfig) -> None:
        """Build the network with random weights."""
        super().__init__()
        self.shape = shape
        self.encoder = _build_encoder(shape.encoder)
        width = self.encoder.config.hidden_size
        self.page_encoders = nn.ModuleList(
            PageEncoder(shape, width, reads_own_text=number < shape.own_text_readers)
            for number in range(shape.page_encoders)
        )
        self.section_heads = nn.ModuleList(
            nn.Linear(shape.page_width, len(CLASSES)) for _ in range(shape.page_encoders)
        )
        self.topic_head = (
            _two_layers(width, shape.topic_width, shape.num_topics, dropout=shape.dropout)
            if shape.topic_width
            else nn.Linear(width, shape.num_topics)
        )

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.parameters()).device

    def multiply_in(self, dtype: torch.dtype) -> None:
        """Compute in another precision what costs most: the text encoder, projections and attention of page layers."""
        self.encoder.to(dtype)
        for module in self.modules():
            if isinstance(module, PageEncoder):
                module.multiply_in(dtype)

    def encode_rows(self, rows: TokenRows) -> torch.Tensor:
        """Return mean-pooled vectors (rows, D) in float32."""
        if not len(rows.lengths):
            return torch.zeros(0, self.encoder.config.hidden_size, device=self.device)
        pads = not isinstance(self.encoder, Bert) or self.device.type != "cpu"
        parts = rows.stretches(padded=pads)
        vectors = torch.cat([self._mean_hidden(rows.take(part)) for part in parts])
        return vectors.index_select(0, torch.cat(parts).argsort().to(vectors.device))

    def _mean_hidden(self, rows: TokenRows) -> torch.Tensor:
        if isinstance(self.encoder, Bert):
            runs = equal_runs(self.encoder(rows), rows.lengths.tolist())
            return torch.cat([run.mean(dim=1, dtype=torch.float32) for run in runs])
        ids, mask = (x.to(self.device) for x in rows.padded(self.encoder.config.pad_token_id or 0))
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].float()
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)

    def section_logits(self, batch: PageBatch) -> torch.Tensor:
        """Return (S, C): the logarithm of the mean of the page encoders' probabilities (arXiv:1612.01474)."""
        return self.mean_section_logits(self.encode_rows(batch.rows), batch)

    def mean_section_logits(self, rows: torch.Tensor, batch: PageBatch) -> torch.Tensor:
        """Return the same from the vectors of distinct sections (rows, D)."""
        text_readers = self.shape.text_readers
        views = [batch] * (len(self.page_encoders) - text_readers)
        if text_readers:
            views += [batch.without_hints()] * text_readers
        each, _ = self.each_section_logits(rows, views)
        return functional.log_softmax(each, dim=-1).logsumexp(dim=0) - math.log(len(each))

    def each_section_logits(self, rows: torch.Tensor, views: Sequence[PageBatch]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (V, S, C) and what of it comes from own texts, (V', S, C): page encoder v mod P reads view v.

        Args:
            rows: vectors of distinct sections, (rows, D).
            views: the same pages as each is to see them; V' are those whose page encoder reads own texts.
        """
        count = len(self.page_encoders)
        each = [self.section_logits_of(view % count, rows, [batch]) for view, batch in enumerate(views)]
        return torch.cat([logits for logits, _ in each]), torch.cat([own for _, own in each])

    def section_logits_of(
        self, number: int, rows: torch.Tensor, views: Sequence[PageBatch]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same of one page encoder that reads all views."""
        logits, own = [], []
        for batch in views:
            if not len(batch.row_of_section):
                logits.append(torch.zeros(0, len(CLASSES), device=self.device))
                continue
            read, own_logits = self.page_encoders[number](rows[batch.row_of_section], batch)
            logits.append(self.section_heads[number](read).float())
            if own_logits is not None:
                own.append(own_logits.float())
                logits[-1] = logits[-1] + own[-1]
        return torch.stack(logits), torch.stack(own) if own else logits[0].new_zeros(0, *logits[0].shape)

    def forward(
        self, views: Sequence[PageBatch], articles: TokenRows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return section logits (V, S, C), those of their own text and topic logits (A, T).

        One call, as distributed training needs it.

        Args:
            views: the same pages as page encoder v mod P is to see them; their texts are those of the first.
            articles: their tokens.
        """
        return *self.each_section_logits(self.encode_rows(views[0].rows), views), self.topic_logits(articles)

    def topic_logits(self, articles: TokenRows) -> torch.Tensor:
        """Return (A, T)."""
        return self.topic_head(self.encode_rows(articles)).float()


def _build_encoder(settings: Mapping[str, Any]) -> Any:
    bert = BertSettings.read(settings)
    if bert is not None:
        return Bert(bert)
    from transformers import AutoConfig, AutoModel  # slow to import

    encoder = AutoModel.from_config(AutoConfig.for_model(**settings))
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # sections are mean-pooled; unused weights would break distributed training
    return encoder
