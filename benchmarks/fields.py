"""Attention inputs with the structure of video: smooth over the grid, with some noise on top."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from veda_compile.kernels.layout import Video


def smooth_field(
    video: Video, heads: int, head_dim: int, cell: int, generator: torch.Generator
) -> torch.Tensor:
    """(1, heads, N, head_dim) float32 of unit variance, varying over about `cell` tokens."""
    coarse = [max(side // cell, 1) + 1 for side in video.grid]
    seeds = torch.randn(1, heads * head_dim, *coarse, generator=generator)
    field = F.interpolate(seeds, size=video.grid, mode="trilinear", align_corners=True)
    field = field / field.std()
    return field.view(1, heads, head_dim, video.length).transpose(2, 3).contiguous()


def video_qkv(
    video: Video, heads: int, head_dim: int, dtype: torch.dtype, device: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v (1, heads, N, head_dim). Queries resemble the keys near them: attention is local
    and peaked, as in a trained model, and which tiles are kept matters."""
    generator = torch.Generator().manual_seed(seed)
    content = smooth_field(video, heads, head_dim, 4, generator)
    made = []
    for share in (0.9, 0.9, 0.7):
        noise = torch.randn(content.shape, generator=generator)
        made.append((share * content + (1 - share**2) ** 0.5 * noise).to(device, dtype))
    q, k, v = made
    return q, k, v
