"""Rows of tokens of many lengths, one after the other; padded only for encoders that cannot do without.

Knows where rows begin and end; knows nothing of text or weights.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import NamedTuple, Self

import numpy as np
import torch

MAX_STRETCH_TOKENS = 2_048
"""Longer stretches are read no faster by a processor, and take more memory."""
MAX_PADDED_TOKENS = 8_192
"""Of a padded stretch."""
MAX_PADDING = 0.04
"""Share of padding above which a padded stretch ends and another begins."""
FEW_TOKENS = 256
"""So much padding costs less than another call."""


class TokenRows(NamedTuple):
    """Token ids of rows, on the CPU."""

    ids: torch.Tensor
    """(tokens,) of int64, row after row."""
    lengths: torch.Tensor
    """(rows,) of int64."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> Self:
        """Lay out rows."""
        ids = np.fromiter(chain.from_iterable(rows), dtype=np.int64)
        return cls(torch.from_numpy(ids), torch.tensor([len(row) for row in rows], dtype=torch.long))

    @property
    def positions(self) -> torch.Tensor:
        """(tokens,): the place of each token in its row."""
        return _places(self.lengths, torch.zeros_like(self.lengths))

    def take(self, chosen: torch.Tensor) -> "TokenRows":
        """Return rows in another order, or some of them; `chosen` holds their numbers."""
        lengths = self.lengths[chosen]
        starts = (self.lengths.cumsum(0) - self.lengths)[chosen]
        return TokenRows(self.ids[_places(lengths, starts)], lengths)

    def stretches(self, *, padded: bool, max_tokens: int | None = None) -> list[torch.Tensor]:
        """Part the rows, the shortest first, into stretches of about `max_tokens`; a longer row has one of its own.

        Args:
            padded: the rows of a stretch are to be padded to the longest one, so they must not differ too much.
            max_tokens: of a stretch, padding included; None: what is best for the one and the other.

        Returns:
            The numbers of the rows of each.
        """
        max_tokens = max_tokens or (MAX_PADDED_TOKENS if padded else MAX_STRETCH_TOKENS)
        order = self.lengths.argsort(stable=True)
        counts: list[int] = []
        count = real = 0
        for length in self.lengths[order].tolist():
            size = length * (count + 1) if padded else real + length
            padding = size - real - length
            if count and (size > max_tokens or padding > max(MAX_PADDING * size, FEW_TOKENS)):
                counts.append(count)
                count = real = 0
            count += 1
            real += length
        return list(order.split([*counts, count])) if count else []

    def padded(self, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and attention mask, (rows, tokens of the longest row) each."""
        mask = torch.arange(int(self.lengths.max())) < self.lengths[:, None]
        ids = torch.full(mask.shape, pad_id)
        ids[mask] = self.ids
        return ids, mask.long()


def equal_runs(x: torch.Tensor, lengths: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield (rows, length, …) of neighbours of equal length, from what belongs to the tokens of rows, (tokens, …)."""
    runs = [(sum(1 for _ in run), length) for length, run in groupby(lengths)]
    for part, shape in zip(x.split([count * length for count, length in runs]), runs, strict=True):
        yield part.unflatten(0, shape)


def _places(lengths: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Return `start`, `start + 1`, … of each row, one after the other."""
    shift = (starts - lengths.cumsum(0) + lengths).numpy()
    return torch.from_numpy(np.arange(int(lengths.sum())) + np.repeat(shift, lengths.numpy()))  # torch's takes longer
