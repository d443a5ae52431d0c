"""The text encoders of the BERT family (arXiv:1810.04805): rows of tokens in, hidden states out.

The same numbers as transformers' `BertModel` gives without dropout, from weights of the same names. It is ours because
importing transformers' takes longer than all else that happens before a first page is read.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from torch.nn import functional

from copydesk.attention import Attend, PaddedAttention, attend_rows
from copydesk.ragged import TokenRows


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


class Output(nn.Module):
    """Projects back to the encoder's width, adds what it was before, and normalises."""

    def __init__(self, inner: int, settings: BertSettings) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, settings.hidden_size)
        self.LayerNorm = nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Return (tokens, width)."""
        return self.LayerNorm(self.dense(x) + before)


class Attention(nn.Module):
    """Self-attention of each row over its own tokens."""

    def __init__(self, settings: BertSettings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.num_heads = settings.num_attention_heads
        self.self = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.output = Output(width, settings)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Return (tokens, width) of the same."""
        query, key, value = (linear(x).unflatten(-1, (self.num_heads, -1)) for linear in self.self.values())
        return self.output(attend(query, key, value).flatten(1), x)


class Layer(nn.Module):
    """A post-norm transformer layer."""

    def __init__(self, settings: BertSettings) -> None:
        super().__init__()
        self.attention = Attention(settings)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(settings.hidden_size, settings.intermediate_size)})
        self.output = Output(settings.intermediate_size, settings)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Return (tokens, width) of the same."""
        x = self.attention(x, attend)
        return self.output(functional.gelu(self.intermediate["dense"](x)), x)


class Embeddings(nn.Module):
    """Sums what a token is and where it stands; all tokens are of type 0."""

    def __init__(self, settings: BertSettings) -> None:
        super().__init__()
        width = settings.hidden_size
        self.word_embeddings = nn.Embedding(settings.vocab_size, width, padding_idx=settings.pad_token_id)
        self.position_embeddings = nn.Embedding(settings.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(settings.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=settings.layer_norm_eps)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return (tokens, width) of (tokens,) each."""
        x = self.word_embeddings(token_ids) + self.token_type_embeddings.weight[0]
        return self.LayerNorm(x + self.position_embeddings(positions))


class Bert(nn.Module):
    """Embeddings and layers. Rows of tokens are read one after the other, without padding."""

    def __init__(self, settings: BertSettings) -> None:
        super().__init__()
        self.config = settings
        self.embeddings = Embeddings(settings)
        layers = nn.ModuleList(Layer(settings) for _ in range(settings.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, rows: TokenRows) -> torch.Tensor:
        """Return (tokens, width) of the tokens of all rows; neighbours of equal length are read fastest."""
        device = self.embeddings.LayerNorm.weight.device
        x = self.embeddings(rows.ids.to(device), rows.positions.to(device))
        attend: Attend
        if device.type == "cpu":
            attend = partial(attend_rows, lengths=rows.lengths.tolist(), long_rows_in=x.dtype)
        else:
            attend = PaddedAttention(rows.lengths, device)
        for layer in self.encoder["layer"].children():
            x = layer(x, attend)
        return x
