"""Attention of equal rows, and of rows of many lengths, one after the other, without padding.

Knows which way is the fastest where; knows nothing of weights.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn import functional

from copydesk.ragged import equal_runs

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes and returns (tokens, heads, width of a head)."""

_MAX_PRODUCT_TOKENS = 1_024
"""Longest rows that are multiplied by plain products; what these keep for the way back grows with the square."""
_MIN_READ_TOKENS = 192
"""Shortest rows whose products pay when nothing is learnt: oneDNN makes a bfloat16 product anew for each new shape."""
_MAX_SHORT_TOKENS = 48
"""Longest rows of which there are so many numbers of so many lengths that training multiplies them in float32, where no
product is made anew."""
_MAX_SCORES = 2**21
"""Scores that are computed at once: more do not fit the processor's cache."""


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    long_rows_in: torch.dtype | None = None,
) -> torch.Tensor:
    """Return what each row gathers from its own tokens: all (tokens, heads, width), row after row.

    Neighbours of equal length are computed together; for `long_rows_in` see `attend`.
    """
    runs = zip(*(equal_runs(x, lengths) for x in (query, key, value)), strict=True)
    attend_run = partial(attend, long_rows_in=long_rows_in)
    parts = [attend_run(*(x.transpose(1, 2) for x in run)).transpose(1, 2) for run in runs]
    if torch.is_grad_enabled():
        return torch.cat([part.flatten(0, 1) for part in parts])
    attended = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    for place, part in zip(equal_runs(attended, lengths), parts, strict=True):
        place.copy_(part)
    return attended


class PaddedAttention:
    """The same by one call for rows of all lengths: on a GPU many calls cost more than padding does."""

    def __init__(self, lengths: torch.Tensor, device: torch.device) -> None:
        """Prepare for rows of these lengths, (rows,)."""
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        self._shape = mask.shape
        self._places = mask.flatten().nonzero()[:, 0].to(device)
        self._mask = mask[:, None, None].to(device)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return (tokens, heads, width) of the same."""
        padded = self._padded(query), self._padded(key), self._padded(value)
        attended = functional.scaled_dot_product_attention(*padded, attn_mask=self._mask)
        return attended.transpose(1, 2).flatten(0, 1)[self._places]

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        padded = x.new_zeros(self._shape.numel(), *x.shape[1:]).index_copy(0, self._places, x)
        return padded.unflatten(0, self._shape).transpose(1, 2)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, long_rows_in: torch.dtype | None = None
) -> torch.Tensor:
    """Return softmax(query @ key / sqrt(width)) @ value, all (rows, heads, tokens, width).

    In bfloat16, where gradients are wanted or rows are long, by plain products: PyTorch's attention for processors
    takes up to nine times as long there (bench/LOG.md).

    Args:
        query: what is looked for.
        key: what it is looked for in.
        value: what is gathered.
        long_rows_in: precision that long rows may be multiplied in, where it is not that of the input.
    """
    trains = torch.is_grad_enabled() and query.requires_grad
    in_bfloat16 = query.device.type == "cpu" and torch.bfloat16 in {query.dtype, long_rows_in}
    tokens = query.shape[-2]
    if not in_bfloat16 or not (0 if trains else _MIN_READ_TOKENS) <= tokens <= _MAX_PRODUCT_TOKENS:
        return functional.scaled_dot_product_attention(query, key, value)
    precision = torch.float32 if tokens <= _MAX_SHORT_TOKENS else torch.bfloat16
    count = max(1, _MAX_SCORES // max(1, tokens**2))
    matrices = (x.to(precision).flatten(0, 1).split(count) for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        attended = torch.cat([_by_products(*some) for some in zip(*matrices, strict=True)])
    return attended.view(query.shape).to(value.dtype)


def _by_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    weights = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2)).softmax(dim=-1)
    return torch.bmm(weights, value)
