"""Position encodings of a feature map. B images, D hidden, H W feature size."""

import math

import torch
from torch import Tensor, nn


class SinePosition(nn.Module):
    """Fixed sine encoding [B, D, H, W] of a padding mask [B, H, W] (True in the padding).

    Positions run from 0 to 2*pi over the unpadded part of each image, so padding changes no encoding.
    The first D/2 channels encode y, the rest x; wavelengths grow from 2*pi to 2*pi times `temperature`.
    Source: paper, appendix A.4.
    """

    def __init__(self, hidden_dim: int, temperature: float = 10000.0) -> None:
        super().__init__()
        if hidden_dim % 4:
            raise ValueError(f"hidden_dim is {hidden_dim}; the sine position encoding needs a multiple of 4")
        self.half_dim = hidden_dim // 2
        self.temperature = temperature

    def forward(self, padding: Tensor) -> Tensor:
        inside = ~padding
        y, x = (inside.cumsum(dim=dim, dtype=torch.int32).float() for dim in (1, 2))  # of floats it varies on GPUs
        y = y / (y[:, -1:, :] + 1e-6) * 2 * math.pi
        x = x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
        channel = torch.arange(self.half_dim, device=padding.device)
        period = self.temperature ** (2 * (channel // 2) / self.half_dim)

        def waves(position: Tensor) -> Tensor:
            angle = position[..., None] / period  # [B, H, W, D/2]
            return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(3)

        return torch.cat([waves(y), waves(x)], dim=-1).permute(0, 3, 1, 2)


class LearnedPosition(nn.Module):
    """Learned encoding [B, D, H, W]: one vector per row and one per column, at most 50 of each."""

    def __init__(self, hidden_dim: int, num_places: int = 50) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(num_places, hidden_dim // 2)
        self.col_embed = nn.Embedding(num_places, hidden_dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, padding: Tensor) -> Tensor:
        batch, height, width = padding.shape
        if max(height, width) > self.row_embed.num_embeddings:
            raise ValueError(
                f"feature map is {height}x{width}, learned position encodings reach "
                f"{self.row_embed.num_embeddings}; use position: sine for images of this size"
            )
        rows = self.row_embed.weight[:height, None].expand(-1, width, -1)
        cols = self.col_embed.weight[None, :width].expand(height, -1, -1)
        return torch.cat([cols, rows], dim=-1).permute(2, 0, 1).expand(batch, -1, -1, -1)


class NoPosition(nn.Module):
    """No encoding: zeros [B, D, H, W]. The paper's ablation, section 4.2."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.hidden_dim = hidden_dim

    def forward(self, padding: Tensor) -> Tensor:
        batch, height, width = padding.shape
        return torch.zeros(batch, self.hidden_dim, height, width, device=padding.device)
