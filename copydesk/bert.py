"""The text encoders of the BERT family (arXiv:1810.04805): tensors in, hidden states out.

The same numbers as transformers' `BertModel` gives without dropout, from weights of the same names. It is ours because
importing transformers' takes longer than all else that happens before a first page is read.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from torch.nn import functional

_ROW_STEP = 64


class BertSettings(BaseModel):
    """What of transformers' `BertConfig` matters here, with its defaults."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: Literal["bert"]
    vocab_size: int = 30_522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3_072
    hidden_act: Literal["gelu"] = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    is_decoder: Literal[False] = False
    position_embedding_type: Literal["absolute"] = "absolute"

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> "BertSettings | None":
        """Return the settings, or None where they describe something else."""
        try:
            return cls.model_validate(settings)
        except ValidationError:
            return None


class Hidden(NamedTuple):
    """What an encoder returns, named as transformers' models name it."""

    last_hidden_state: torch.Tensor


def _project(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """Return (rows, tokens, out) of (rows, tokens, in).

    oneDNN, which multiplies bfloat16, keeps what it makes for a number of rows until the process ends: so their numbers
    are multiples of `_ROW_STEP`.
    """
    if linear.weight.dtype == torch.float32 or x.device.type != "cpu":
        return linear(x)
    rows, tokens, _ = x.shape
    filled = functional.pad(x.flatten(0, 1), (0, 0, 0, -rows * tokens % _ROW_STEP))
    return linear(filled)[: rows * tokens].unflatten(0, (rows, tokens))


class Output(nn.Module):
    """Projects back to the encoder's width, adds what it was before, and normalises."""

    def __init__(self, inner: int, settings: BertSettings) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, settings.hidden_size)
        self.LayerNorm = nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Return (rows, tokens, width)."""
        return self.LayerNorm(_project(self.dense, x) + before)


_MAX_PRODUCT_TOKENS = 256
"""Longest rows that are trained without PyTorch's attention for processors: at 512 tokens it is as fast."""


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return softmax(query @ key / sqrt(width)) @ value, all (rows, heads, tokens, width), under a mask.

    Where gradients are wanted of short rows in bfloat16, by plain products: PyTorch's attention for processors takes up
    to nine times as long there (bench/LOG.md).
    """
    trains = torch.is_grad_enabled() and query.requires_grad
    in_bfloat16 = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not trains or not in_bfloat16 or query.shape[-2] > _MAX_PRODUCT_TOKENS:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1).to(value.dtype) @ value


class Attention(nn.Module):
    """Self-attention of each row over its own tokens."""

    def __init__(self, settings: BertSettings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.num_heads = settings.num_attention_heads
        self.self = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.output = Output(width, settings)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Read (rows, tokens, width) under a mask that broadcasts to (rows, heads, tokens, tokens)."""
        query, key, value = (
            _project(linear, x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear in self.self.values()
        )
        attended = attend(query, key, value, mask)
        return self.output(attended.transpose(1, 2).flatten(2), x)


class Layer(nn.Module):
    """A post-norm transformer layer."""

    def __init__(self, settings: BertSettings) -> None:
        super().__init__()
        self.attention = Attention(settings)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(settings.hidden_size, settings.intermediate_size)})
        self.output = Output(settings.intermediate_size, settings)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Read (rows, tokens, width) under a mask that broadcasts to (rows, heads, tokens, tokens)."""
        x = self.attention(x, mask)
        return self.output(functional.gelu(_project(self.intermediate["dense"], x)), x)


class Embeddings(nn.Module):
    """Sums what a token is and where it stands; all tokens are of type 0."""

    def __init__(self, settings: BertSettings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.word_embeddings = nn.Embedding(settings.vocab_size, width, padding_idx=settings.pad_token_id)
        self.position_embeddings = nn.Embedding(settings.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(settings.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=settings.layer_norm_eps)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return (rows, tokens, width) for token ids (rows, tokens)."""
        x = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        return self.LayerNorm(x + self.position_embeddings.weight[: input_ids.shape[1]])


class Bert(nn.Module):
    """Embeddings and layers."""

    def __init__(self, settings: BertSettings) -> None:
        super().__init__()
        self.config = settings
        self.embeddings = Embeddings(settings)
        layers = nn.ModuleList(Layer(settings) for _ in range(settings.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Hidden:
        """Return (rows, tokens, width) for token ids (rows, tokens); where the mask is 0 nothing is read."""
        x = self.embeddings(input_ids)
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        for layer in self.encoder["layer"].children():
            x = layer(x, mask)
        return Hidden(x)
