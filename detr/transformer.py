"""The encoder and decoder. B images, Q queries, N feature positions, D hidden, L decoder layers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerShape:
    """What all encoder and decoder layers have in common."""

    hidden_dim: int
    num_heads: int
    dim_feedforward: int
    dropout: float
    attention_dropout: float
    pre_norm: bool


class Attention(nn.Module):
    """Multi-head attention [B, Nq, D] of queries [B, Nq, D] over keys and values [B, Nk, D].

    `attend` [B, 1, 1, Nk] bool is True where a key may be looked at. Parameters carry the names and packing
    of `nn.MultiheadAttention`; the work is done by scaled_dot_product_attention, which fuses it.
    """

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(f"model.hidden_dim is {hidden_dim}, not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_dim, hidden_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_dim))
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attend: Tensor | None = None) -> Tensor:
        dim = query.shape[-1]
        if query is key:
            q, k = F.linear(query, self.in_proj_weight[: 2 * dim], self.in_proj_bias[: 2 * dim]).chunk(2, dim=-1)
        else:
            q = F.linear(query, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
            k = F.linear(key, self.in_proj_weight[dim : 2 * dim], self.in_proj_bias[dim : 2 * dim])
        v = F.linear(value, self.in_proj_weight[2 * dim :], self.in_proj_bias[2 * dim :])
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, N, D/heads]
        dropout = self.dropout if self.training else 0.0
        if dropout and query.device.type == "cpu":  # nothing is fused there, and this keeps a mask of bytes, not floats
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            scores = scores if attend is None else scores.masked_fill_(~attend, -torch.inf)
            mixed = torch.native_dropout(scores.softmax(dim=-1), dropout, True)[0] @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attend, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        dim = shape.hidden_dim
        self.self_attn = Attention(dim, shape.num_heads, shape.attention_dropout)
        self.linear1 = nn.Linear(dim, shape.dim_feedforward)
        self.linear2 = nn.Linear(shape.dim_feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(shape.dropout)
        self.pre_norm = shape.pre_norm

    def _feedforward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(self.linear1(x), self.dropout.p, self.training, inplace=True)
        hidden = F.relu(dropped, inplace=True)  # the same as dropout after it, and one tensor less is kept
        return self.dropout(self.linear2(hidden))

    def _attention(self, x: Tensor, position: Tensor, attend: Tensor | None) -> Tensor:
        placed = x + position
        return self.dropout(self.self_attn(placed, placed, x, attend))

    def forward(self, x: Tensor, position: Tensor, attend: Tensor | None) -> Tensor:
        if self.pre_norm:
            x = x + self._attention(self.norm1(x), position, attend)
            return x + self._feedforward(self.norm2(x))
        x = self.norm1(x + self._attention(x, position, attend))
        return self.norm2(x + self._feedforward(x))


class DecoderLayer(EncoderLayer):
    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.multihead_attn = Attention(shape.hidden_dim, shape.num_heads, shape.attention_dropout)
        self.norm3 = nn.LayerNorm(shape.hidden_dim)

    def forward(  # type: ignore[override]
        self, x: Tensor, queries: Tensor, memory: Tensor, placed_memory: Tensor, attend: Tensor | None
    ) -> Tensor:
        def look(x: Tensor) -> Tensor:
            return self.dropout(self.multihead_attn(x + queries, placed_memory, memory, attend))

        if self.pre_norm:
            x = x + self._attention(self.norm1(x), queries, None)
            x = x + look(self.norm2(x))
            return x + self._feedforward(self.norm3(x))
        x = self.norm1(x + self._attention(x, queries, None))
        x = self.norm2(x + look(x))
        return self.norm3(x + self._feedforward(x))


class Encoder(nn.Module):
    def __init__(self, num_layers: int, shape: LayerShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(shape) for _ in range(num_layers))
        self.norm = nn.LayerNorm(shape.hidden_dim) if shape.pre_norm else nn.Identity()

    def forward(self, x: Tensor, position: Tensor, attend: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, position, attend)
        return self.norm(x)


class Decoder(nn.Module):
    def __init__(self, num_layers: int, shape: LayerShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(num_layers))
        self.norm = nn.LayerNorm(shape.hidden_dim)

    def forward(self, queries: Tensor, memory: Tensor, position: Tensor, attend: Tensor | None) -> Tensor:
        """Normed outputs of every layer [L, B, Q, D]; auxiliary losses read all, inference the last."""
        x = torch.zeros_like(queries)
        placed_memory = memory + position
        outputs = []
        for layer in self.layers:
            x = layer(x, queries, memory, placed_memory, attend)
            outputs.append(self.norm(x))
        return torch.stack(outputs)


class Transformer(nn.Module):
    """Decoder outputs [L, B, Q, D] of features and positions [B, N, D], padding [B, N] or None, and queries [Q, D].

    Invariant: features where `padding` is True change nothing. Source: paper, section 3.2 and figure 10.
    """

    def __init__(self, num_encoder_layers: int, num_decoder_layers: int, shape: LayerShape) -> None:
        super().__init__()
        self.encoder = Encoder(num_encoder_layers, shape)
        self.decoder = Decoder(num_decoder_layers, shape)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, features: Tensor, position: Tensor, padding: Tensor | None, queries: Tensor) -> Tensor:
        attend = None if padding is None else ~padding[:, None, None, :]  # [B, 1, 1, N]
        memory = self.encoder(features, position, attend)
        return self.decoder(queries.expand(features.shape[0], -1, -1), memory, position, attend)
