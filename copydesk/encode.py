"""Turn sections and articles into tokens and layout features. The one way text becomes tensors.

Knows tokens and features; knows nothing of weights, labels or files.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, pairwise

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

from copydesk.hints import ATTRIBUTE_HINTS
from copydesk.ragged import TokenRows
from copydesk.split import RawPage

TEXT_FEATURES = (
    "characters",
    "words",
    "ends_like_a_sentence",
    "digits",
    "capitals",
    "occurrences",
    "place_by_sections",
    "place_by_characters",
    "sections_before",
    "sections_after",
    "sections",
    "breaks_before",
    "breaks_after",
)
HTML_FEATURES = ("link_share", "is_heading", "is_html")
"""Zero where the page is plain text."""
BREAKS = [TEXT_FEATURES.index(name) for name in ("breaks_before", "breaks_after")]
"""Their places among the features."""
NUM_FEATURES = len(TEXT_FEATURES) + len(HTML_FEATURES)


class Encoding(BaseModel):
    """How text becomes tokens; saved with a model."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    head_tokens: int = Field(default=24, ge=1)
    """Tokens kept from the start of a section."""
    tail_tokens: int = Field(default=8, ge=0)
    """Tokens kept from its end."""
    max_page_tokens: int = Field(default=2**18, ge=1)
    """Tokens of a page's distinct sections above which all are cut shorter, by halves down to two tokens each."""
    max_article_tokens: int = Field(default=256, ge=8)
    """Tokens of headline and body that the topics are read from."""


@dataclass(frozen=True, slots=True)
class EncodedPage:
    """A page as numbers."""

    tokens: list[list[int]]
    """Token ids of each distinct section."""
    distinct: np.ndarray
    """(sections,) of int: which of `tokens` each section is."""
    features: np.ndarray
    """(sections, NUM_FEATURES) of float32."""
    hint_ids: np.ndarray
    """(hints,) of int: the places in the vocabulary of the hints of all sections, one after the other."""
    hint_counts: np.ndarray
    """(sections,) of int: how many of them are each section's."""
    from_attributes: np.ndarray
    """(hints,) of bool: which come from attributes, not from tags."""

    def __len__(self) -> int:
        return len(self.distinct)

    @property
    def num_tokens(self) -> int:
        """Tokens that the section encoder reads for this page."""
        return sum(map(len, self.tokens))

    def without_hints(self) -> "EncodedPage":
        """Return the page as it would look if it had come as plain text."""
        features = self.features.copy()
        features[:, len(TEXT_FEATURES) :] = 0
        return replace(self._keep_hints(np.zeros(len(self.hint_ids), dtype=bool)), features=features)

    def without_blank_lines(self) -> "EncodedPage":
        """Return the page as it would look if no line of its text were blank."""
        features = self.features.copy()
        features[:, BREAKS] = np.minimum(features[:, BREAKS], 0.5)
        return replace(self, features=features)

    def without_attribute_hints(self) -> "EncodedPage":
        """Return the page as it would look if its elements had no class names and its links no address."""
        return self._keep_hints(~self.from_attributes)

    def thinned(self, random: np.random.Generator, *, share: float) -> "EncodedPage":
        """Return the page with this share of its hints left out, each by itself."""
        return self._keep_hints(random.random(len(self.hint_ids)) >= share)

    def _keep_hints(self, kept: np.ndarray) -> "EncodedPage":
        sections = np.repeat(np.arange(len(self)), self.hint_counts)
        return replace(
            self,
            hint_ids=self.hint_ids[kept],
            hint_counts=np.bincount(sections[kept], minlength=len(self)),
            from_attributes=self.from_attributes[kept],
        )


_NOTHING = np.zeros(0, dtype=np.int64)


class TextEncoder:
    """Encodes pages and articles with one tokenizer and one vocabulary of hints."""

    def __init__(self, tokenizer: Tokenizer, encoding: Encoding, hints: Sequence[str]) -> None:
        """Take over the tokenizer: padding and truncation are done here. Hints not among `hints` say nothing."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.encoding = encoding
        special = tokenizer.encode("").ids
        # [CLS] … [SEP] for BERT-like tokenizers; nothing around the text where the tokenizer adds nothing.
        self._before, self._after = special[: len(special) // 2], special[len(special) // 2 :]
        vocabulary = {hint: index for index, hint in enumerate(hints)}

        self._is_attribute = np.array([hint.startswith(ATTRIBUTE_HINTS) for hint in hints], dtype=bool)

        def look_up(hints: tuple[str, ...]) -> np.ndarray:
            return np.array([vocabulary[hint] for hint in hints if hint in vocabulary], dtype=np.int64)

        self._look_up = lru_cache(maxsize=8_192)(look_up)

    def encode_page(self, page: RawPage) -> EncodedPage:
        """Encode the sections of a page, each distinct text once."""
        texts = page.texts()
        index: dict[str, int] = {}
        distinct = np.array([index.setdefault(text, len(index)) for text in texts], dtype=np.int64)
        hints = [self._look_up(section.hints) for section in page.sections]
        tokens: list[list[int]] = []
        remaining = iter(index)
        head, tail = self.encoding.head_tokens, self.encoding.tail_tokens
        while batch := list(islice(remaining, 4_096)):  # a page of 100,000 sections must not be held as encodings
            encodings = self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            tokens += [_cut(encoding.ids, head, tail) for encoding in encodings]
        around = len(self._before) + len(self._after)
        while sum(map(len, tokens)) + around * len(tokens) > self.encoding.max_page_tokens and head + tail > 2:
            head, tail = -(-head // 2), tail // 2
            rows: dict[tuple[int, ...], int] = {}  # what is cut short may be equal
            distinct = np.array([rows.setdefault(tuple(_cut(ids, head, tail)), len(rows)) for ids in tokens])[distinct]
            tokens = [list(ids) for ids in rows]
        hint_ids = np.concatenate([_NOTHING, *hints])
        return EncodedPage(
            tokens=[[*self._before, *ids, *self._after] for ids in tokens],
            distinct=distinct,
            features=features_of(page, texts),
            hint_ids=hint_ids,
            hint_counts=np.array([len(ids) for ids in hints], dtype=np.int64),
            from_attributes=self._is_attribute[hint_ids],
        )

    def encode_articles(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode articles (headline, line break, body), each cut to its first tokens."""
        room = self.encoding.max_article_tokens - len(self._before) - len(self._after)
        # Fifteen characters a token is far above any real text: cutting first saves tokenizing whole books.
        encodings = self.tokenizer.encode_batch_fast([text[: room * 15] for text in texts], add_special_tokens=False)
        return [[*self._before, *encoding.ids[:room], *self._after] for encoding in encodings]


def _cut(ids: list[int], head: int, tail: int) -> list[int]:
    return ids[:head] + ids[len(ids) - tail :] if len(ids) > head + tail else ids


_DIGIT = re.compile(r"\d")
_CAPITAL = re.compile(r"[A-Z]")
_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’»)\]]*$")


@lru_cache(maxsize=8_192)
def _text_features(text: str) -> tuple[float, float, float, float, float]:
    length = len(text)
    return (
        math.log1p(length) / 7,
        math.log1p(text.count(" ") + 1) / 5,
        float(_SENTENCE_END.search(text[-8:]) is not None),
        len(_DIGIT.findall(text)) / length,
        len(_CAPITAL.findall(text)) / length,
    )


def features_of(page: RawPage, texts: Sequence[str]) -> np.ndarray:
    """Return (sections, NUM_FEATURES) of float32, each about between 0 and 1."""
    count = len(texts)
    features = np.zeros((count, NUM_FEATURES), dtype=np.float32)
    if not count:
        return features
    occurrences = Counter(texts)
    place = np.arange(count)
    lengths = np.array([len(text) for text in texts])
    features[:, :5] = [_text_features(text) for text in texts]
    features[:, 5] = np.log([occurrences[text] for text in texts])
    features[:, 6] = (place + 0.5) / count
    features[:, 7] = (np.cumsum(lengths) - lengths / 2) / lengths.sum()
    features[:, 8] = np.log1p(place) / 7
    features[:, 9] = np.log1p(count - 1 - place) / 7
    features[:, 10] = math.log1p(count) / 7
    breaks = _breaks_between(page)
    features[:, BREAKS] = np.stack([breaks[:-1], breaks[1:]], axis=1)
    if page.kind == "html":
        features[:, 13] = [section.link_share for section in page.sections]
        features[:, 14] = [section.is_heading for section in page.sections]
        features[:, 15] = 1
    return features


def _breaks_between(page: RawPage) -> np.ndarray:
    """Return (sections + 1,): the line breaks before, between and behind sections by halves, at most two.

    Where each line of a page has a blank one behind it, that says nothing, and is read as if there were none.
    """
    texts = (page.text[a.end : b.start] for a, b in pairwise(page.sections))
    breaks = np.array([min(2, len((text + ".").splitlines()) - 1) for text in texts], dtype=np.float32)
    if 1 not in breaks:
        breaks = np.minimum(breaks, 1)
    return np.concatenate([[1], breaks, [1]]) / 2


@dataclass(frozen=True, slots=True)
class PageBatch:
    """Pages packed for the network: no section is encoded twice."""

    rows: TokenRows
    """Tokens of distinct sections."""
    row_of_section: torch.Tensor
    """(sections,): the row that holds each section's text."""
    features: torch.Tensor
    """(sections, NUM_FEATURES)."""
    hint_ids: torch.Tensor
    """(hints,): those of all sections, one after the other."""
    hint_offsets: torch.Tensor
    """(sections,): where each section's begin."""
    page_lengths: list[int]
    """Sections of each page."""

    def showing(self, pages: Sequence[EncodedPage]) -> "PageBatch":
        """Return the batch with the features and the hints of these pages, whose texts are those of its own."""
        features, hint_ids, hint_offsets = _layout(pages)
        return replace(self, features=features, hint_ids=hint_ids, hint_offsets=hint_offsets)

    def without_hints(self) -> "PageBatch":
        """Return the batch as it would be if its pages had come as plain text."""
        features = self.features.clone()
        features[:, len(TEXT_FEATURES) :] = 0
        return replace(
            self, features=features, hint_ids=self.hint_ids[:0], hint_offsets=torch.zeros_like(self.hint_offsets)
        )


def collate_pages(pages: Sequence[EncodedPage]) -> PageBatch:
    """Pack pages; equal sections of different pages are encoded once."""
    rows, batch = collate_distinct(pages)
    return replace(batch, rows=TokenRows.of(rows))


def collate_distinct(pages: Sequence[EncodedPage]) -> tuple[list[tuple[int, ...]], PageBatch]:
    """Pack pages without their texts.

    Returns:
        The token ids of each distinct section of all pages, and a batch whose rows these are.
    """
    index: dict[tuple[int, ...], int] = {}
    distinct: list[np.ndarray] = []
    for page in pages:
        rows = np.array([index.setdefault(tuple(tokens), len(index)) for tokens in page.tokens], dtype=np.int64)
        distinct.append(rows[page.distinct])
    return list(index), _batch(pages, distinct)


def collate_encoded(pages: Sequence[EncodedPage]) -> PageBatch:
    """Pack pages whose texts are encoded already: rows are the distinct sections of each page, page after page."""
    starts = np.cumsum([0, *(len(page.tokens) for page in pages)])
    distinct = [page.distinct + start for page, start in zip(pages, starts[:-1], strict=True)]
    return _batch(pages, distinct)


def _batch(pages: Sequence[EncodedPage], distinct: Sequence[np.ndarray]) -> PageBatch:
    features, hint_ids, hint_offsets = _layout(pages)
    return PageBatch(
        rows=TokenRows.of([]),
        row_of_section=torch.from_numpy(np.concatenate([_NOTHING, *distinct])),
        features=features,
        hint_ids=hint_ids,
        hint_offsets=hint_offsets,
        page_lengths=[len(page) for page in pages],
    )


def _layout(pages: Sequence[EncodedPage]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features, hint ids and where each section's begin."""
    features = np.concatenate([np.zeros((0, NUM_FEATURES), dtype=np.float32), *[page.features for page in pages]])
    hint_ids = np.concatenate([_NOTHING, *[page.hint_ids for page in pages]])
    counts = np.concatenate([_NOTHING, *[page.hint_counts for page in pages]])
    return torch.from_numpy(features), torch.from_numpy(hint_ids), torch.from_numpy(np.cumsum(counts) - counts)
