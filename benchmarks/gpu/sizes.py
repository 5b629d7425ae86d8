"""The attention calls that are timed: those of known models, and their tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.layout import Extra, Layout, Video
from veda_compile.kernels.plan import Plan, least_padding_shape
from veda_compile.options import tile_size_for

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Size:
    """One layer's self-attention. text: extra tokens after the video."""

    name: str
    grid: tuple[int, int, int]
    heads: int
    batch: int = 1
    text: int = 0
    head_dim: int = 128

    @property
    def layout(self) -> Layout:
        """The segments of the sequence."""
        video = Video(*self.grid)
        return Layout.of(video, Extra(self.text)) if self.text else Layout.of(video)

    @property
    def tokens(self) -> int:
        """Video and text."""
        return self.layout.length

    def flops(self, pairs: float) -> float:
        """Of two matrix products over so many pairs of a query and a key."""
        return 4.0 * self.head_dim * pairs

    @property
    def dense_pairs(self) -> int:
        """Pairs of a query and a key, over batch and heads."""
        return self.batch * self.heads * self.tokens**2


WAN_14B = Size("wan2.1-14b 720p 81 frames", (21, 45, 80), 40)
LONG = Size("12b class 245,760 tokens", (60, 64, 64), 32)

SIZES = (
    Size("wan2.1-14b 720p 81 frames, batch 2", (21, 45, 80), 40, batch=2),
    LONG,
    WAN_14B,
    Size("hunyuanvideo 720p 129 frames", (33, 45, 80), 24, text=256),
    Size("wan2.1-1.3b 480p 81 frames", (21, 30, 52), 12),
)
"""Most important first."""

SMOKE_SIZES = (Size("smoke", (3, 9, 22), 2, text=5, head_dim=64),)


def video_tensors(size: Size, dtype: torch.dtype, device: str, seed: int) -> Tensors:
    """q, k, v (B, H, N, D), stored as (B, N, H, D) as models hold them.

    They vary smoothly over the grid, and queries resemble the keys near them: attention is local
    and peaked, as in a trained model, and which tiles are kept matters.
    """
    generator = torch.Generator(device).manual_seed(seed)
    shape = (size.batch, size.tokens, size.heads, size.head_dim)
    made = tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(3))
    video = math.prod(size.grid)
    coarse = [max(side // 4, 1) + 1 for side in size.grid]
    for b in range(size.batch):
        for h in range(size.heads):  # one head at a time: in float32 all would be large
            seeds = torch.randn(1, size.head_dim, *coarse, generator=generator, device=device)
            field = F.interpolate(seeds, size=size.grid, mode="trilinear", align_corners=True)
            field = F.pad(field.flatten(2)[0].T, (0, 0, 0, size.tokens - video))
            field = field / field.std()
            for x, share in zip(made, (0.9, 0.9, 0.7), strict=True):
                noise = torch.randn(field.shape, generator=generator, device=device)
                x[b, :, h] = share * field + (1 - share**2) ** 0.5 * noise
    q, k, v = (x.transpose(1, 2) for x in made)
    return q, k, v


def plan_of(size: Size, density: float, tile_size: int | None = None) -> Plan:
    """The plan as the backend would make it without a sidecar."""
    tokens = math.prod(size.grid)
    shape = least_padding_shape(size.layout, tile_size or tile_size_for(tokens))
    return Plan.uniform(size.heads, shape, density)


def call_of(
    size: Size, tensors: Tensors, density: float, tile_size: int | None = None
) -> AttentionCall:
    """The call as the backend would make it without a sidecar."""
    plan = plan_of(size, density, tile_size)
    return AttentionCall(*tensors, size.layout, plan, 1.0 / math.sqrt(size.head_dim))
