"""The BERT encoder in 8-bit integers, which processors multiply twice as fast as bfloat16 (VNNI) or float32 (AVX2).

Weights are scaled row by row, activations by ranges measured once on held-out text (arXiv:1712.05877), so that what a
row of tokens comes out as does not depend on its neighbours. Channels that are far wider than the others are narrowed
first, at the cost of the weights (SmoothQuant, arXiv:2211.10438). Knows oneDNN's operators, which torch has for its own
compiler; knows nothing of pages.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat
from torch import nn

from copydesk.attention import Attend
from copydesk.bert import Bert

Range = tuple[float, float]
_Ends = tuple[torch.Tensor, torch.Tensor]
_SMOOTHING = 0.75
"""Power of a channel's greatest magnitude that it is divided by."""
_KEPT = 0.7
"""Share of the range of GELU's results: coarser steps cost more than what few neurons lose beyond (bench/LOG.md)."""


class LayerRanges(BaseModel):
    """Least and greatest of what the linear projections of a layer read, channels divided by their widths."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    attention: Range
    """Query, key and value."""
    attended: Range
    """What attention gathered."""
    feed: Range
    """The first projection after attention."""
    inner: Range
    """The second; what is greater is cut off."""
    widths: dict[Literal["attention", "attended", "feed"], list[PositiveFloat]] = Field(default_factory=dict)
    """What each channel is divided by; 1 where there are none."""


class Scale(NamedTuple):
    """How numbers stand for integers from 0 to 255: the number `step * (integer - zero)`."""

    step: float
    zero: int

    @classmethod
    def of(cls, values: Range) -> Self:
        """Return the scale whose integers cover a range and zero."""
        low, high = min(values[0], 0.0), max(values[1], 0.0)
        step = (high - low) / 255 or 1.0
        return cls(step, round(-low / step))

    def integers(self, x: torch.Tensor, widths: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Divide by widths, and round to integers; what lies outside of the range becomes its end."""
        shifted = x.to(torch.float32, copy=True).mul_(1 / (self.step * widths)).add_(self.zero + 0.5)
        return shifted.clamp_(0, 255).to(torch.int16).to(torch.uint8)  # straight to uint8 takes three times as long


class Int8Linear(nn.Module):
    """Linear projections of one input, side by side."""

    def __init__(self, parts: Sequence[Any], values: Range, widths: Sequence[float] | None = None) -> None:
        """Take over weights (out, in) and biases of linear layers.

        Args:
            parts: the layers.
            values: range of what they read, divided by its widths.
            widths: of its channels, (in,); all are 1 if there are none.
        """
        super().__init__()
        self.scale = Scale.of(values)
        self.widths = torch.tensor(widths) if widths else 1.0
        weight = torch.cat([part.weight.detach().float() for part in parts]) * self.widths
        steps = weight.abs().amax(dim=1).clamp_min(1e-12) / greatest_weight()
        integers = (weight / steps[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(integers, None)
        self.steps, self.zeros = steps, torch.zeros(len(steps), dtype=torch.long)
        self.bias = torch.cat([part.bias.detach().float() for part in parts])

    def forward(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return (..., out) of (..., in), which may have been rounded to integers already."""
        integers = x if x.dtype == torch.uint8 else self.scale.integers(x, self.widths)
        return self._multiply(integers, Scale(1.0, 0), dtype, "none")

    def gelu(self, x: torch.Tensor, scale: Scale) -> torch.Tensor:
        """Return GELU of (..., out), rounded to the integers of another scale."""
        return self._multiply(self.scale.integers(x, self.widths), scale, torch.uint8, "gelu")

    def _multiply(self, integers: torch.Tensor, scale: Scale, dtype: torch.dtype, then: str) -> torch.Tensor:
        return torch.ops.onednn.qlinear_pointwise(
            integers, *self.scale, self.weight, self.steps, self.zeros, self.bias, *scale, dtype, then, [], "none"
        )


class Int8Layer(nn.Module):
    """A `Layer` whose projections multiply integers; sums and norms stay as they are.

    Attention reads float32, which is fastest for short rows; long ones may be multiplied in the input's precision.
    """

    def __init__(self, layer: Any, ranges: LayerRanges) -> None:
        """Take over a `Layer`."""
        super().__init__()
        attention = layer.attention
        self.num_heads = attention.num_heads
        widths = ranges.widths
        self.query_key_value = Int8Linear([*attention.self.values()], ranges.attention, widths.get("attention"))
        self.attention_output = Int8Linear([attention.output.dense], ranges.attended, widths.get("attended"))
        self.attention_norm = attention.output.LayerNorm
        self.feed_up = Int8Linear([layer.intermediate["dense"]], ranges.feed, widths.get("feed"))
        self.feed_down = Int8Linear([layer.output.dense], ranges.inner)
        self.feed_norm = layer.output.LayerNorm

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Return (tokens, width) of the same."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)) for part in self.query_key_value(x, torch.float32).chunk(3, dim=-1)
        )
        x = self.attention_norm(self.attention_output(attend(query, key, value).flatten(1), x.dtype) + x)
        inner = self.feed_up.gelu(x, self.feed_down.scale)
        return self.feed_norm(self.feed_down(inner, x.dtype) + x)


def is_native() -> bool:
    """Tell whether the processor multiplies 8-bit integers faster than all else, and torch has the operators for it."""
    return (_has_vnni() or torch.cpu._is_avx2_supported()) and hasattr(torch.ops.onednn, "qlinear_pointwise")


def greatest_weight() -> int:
    """Return the greatest integer that weights are rounded to.

    Without VNNI two products of 8 bits are added up in 16, which hold 2 * 255 * 63 and not 2 * 255 * 127: what is more
    is cut off in silence (oneDNN's guide, "Nuances of int8 computations").
    """
    return 127 if _has_vnni() else 63


def _has_vnni() -> bool:
    return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()


def quantize(encoder: Bert, ranges: Sequence[LayerRanges]) -> None:
    """Put layers of integers in place of an encoder's own. There is no way back, and none to learn.

    Args:
        encoder: on the CPU.
        ranges: of each layer.
    """
    layers = zip(encoder.encoder["layer"].children(), ranges, strict=True)
    encoder.encoder["layer"] = nn.ModuleList(Int8Layer(layer, values) for layer, values in layers)


@contextmanager
def measured(encoder: nn.Module) -> Iterator[list[LayerRanges]]:
    """Measure what the projections of an encoder read within the context; the list fills when it ends.

    It stays empty where the encoder is none of ours.
    """
    found: list[LayerRanges] = []
    if not isinstance(encoder, Bert):
        yield found
        return
    layers: list[Any] = list(encoder.encoder["layer"].children())
    seen: list[dict[str, _Ends]] = [{} for _ in layers]
    hooks = [
        module.register_forward_pre_hook(_watch(values, name))
        for layer, values in zip(layers, seen, strict=True)
        for name, module in {
            "attention": layer.attention.self["query"],
            "attended": layer.attention.output.dense,
            "feed": layer.intermediate["dense"],
            "inner": layer.output.dense,
        }.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    if all(seen):
        found += [_ranges_of(ends) for ends in seen]


def _watch(ends: dict[str, _Ends], name: str) -> Any:
    def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        low, high = (end.float().cpu() for end in inputs[0].detach().flatten(0, -2).aminmax(dim=0))
        if name in ends:
            low, high = torch.minimum(low, ends[name][0]), torch.maximum(high, ends[name][1])
        ends[name] = low, high

    return watch


def _ranges_of(ends: dict[str, _Ends]) -> LayerRanges:
    low, high = ends["inner"]
    found: dict[str, Any] = {"inner": (low.min().item(), _KEPT * high.max().item()), "widths": {}}
    for name in ("attention", "attended", "feed"):
        low, high = ends[name]
        greatest = torch.maximum(low.abs(), high.abs()).clamp_min(1e-3)
        widths = [float(f"{width:.2g}") for width in (greatest**_SMOOTHING).tolist()]
        found["widths"][name] = widths
        found[name] = ((low / torch.tensor(widths)).min().item(), (high / torch.tensor(widths)).max().item())
    return LayerRanges.model_validate(found)
