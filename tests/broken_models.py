"""Models that Dynamo cuts between the projections and the attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from compiling import sparse_calls
from torch import Tensor, nn

from veda_compile.kernels.layout import Layout

Grid = tuple[int, int, int]
LANDSCAPE, PORTRAIT, LONGER = (3, 4, 6), (3, 6, 4), (5, 6, 4)
GRIDS = (LANDSCAPE, PORTRAIT, LONGER, (2, 6, 8), PORTRAIT)


class Broken(nn.Module):
    """Projections and attention in two graphs, and `between` run in neither."""

    def __init__(self, between: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.patch, self.qkv = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2)), nn.Linear(32, 96)
        self.between = between

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: (B, 4, T, 2 H, 2 W) -> q, k, v (B, 2, N, 16)."""
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return tuple(  # contiguous as a copy is: other strides would recompile
            part.unflatten(2, (2, 16)).transpose(1, 2).contiguous()
            for part in self.qkv(tokens).chunk(3, -1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 4, T, 2 H, 2 W) -> (B, N, 32)."""
        q, k, v = torch._dynamo.disable(self.between)(*self.project(x))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def nothing(*parts: Tensor) -> tuple[Tensor, ...]:
    return parts


def other_tensors(*parts: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.clone() for part in parts)


def written(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    k.copy_(k.flip(2))
    return q, k, v


def written_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    k[0].copy_(k[0].flip(1))
    return q, k, v


def exchanged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return q, k.flip(2), v


MEDDLERS = (other_tensors, written, written_through_a_view, exchanged)
"""What eager code may do between two graphs, after which q, k and v are not what they were."""


def latent(grid: Grid = LANDSCAPE) -> Tensor:
    t, h, w = grid
    return torch.randn(2, 4, t, 2 * h, 2 * w)


def broken(between: Callable[..., tuple[Tensor, ...]] = nothing) -> Broken:
    torch.manual_seed(0)
    return Broken(between).eval().requires_grad_(False)


def call(fn: Callable[..., Any], inputs: dict[str, Any]) -> tuple[list[Tensor], list[Layout]]:
    """What a model returns, and the layouts of its sparse calls."""
    with torch.no_grad(), sparse_calls() as calls:
        out = fn(**inputs)
    return [out] if isinstance(out, Tensor) else list(out), [c.layout for c, _ in calls]
