"""Small video models with one thing about their attention that can be chosen."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
GRID = (3, 4, 6)
TOKENS = 72


def latents(
    grid: tuple[int, int, int] = GRID, batch: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(B, 4, T, H, W): one token an element."""
    return torch.randn(batch, 4, *grid, generator=torch.Generator().manual_seed(1)).to(dtype)


class Attention(nn.Module):
    """Projections around `attend`; k and v come from `context` where there is one."""

    def __init__(self, attend: Attend, width: int = 32, heads: int = 2, inputs: int = 32) -> None:
        super().__init__()
        self.attend, self.heads = attend, heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width)
        self.to_k, self.to_v = nn.Linear(inputs, width), nn.Linear(inputs, width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        context = x if context is None else context
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for layer, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        return self.to_out(self.attend(q * 3.0, k, v).transpose(-3, -2).flatten(-2))


def toy(attend: Attend = F.scaled_dot_product_attention, layers: int = 2) -> Video:
    """A frozen `Video` with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Video(attend, layers).eval().requires_grad_(False)


class Video(nn.Module):
    """Self-attention over all tokens of a (B, 4, T, H, W) latent, in raster order."""

    def __init__(self, attend: Attend, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 32)
        self.blocks = nn.ModuleList(Attention(attend) for _ in range(layers))

    def tokens(self, x: Tensor) -> Tensor:
        """(B, N, C) tokens in the order attention sees them."""
        return x.flatten(2).transpose(1, 2)

    def step(self, block: nn.Module, x: Tensor) -> Tensor:
        """x after one block."""
        return x + block(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(self.tokens(x))
        for block in self.blocks:
            x = self.step(block, x)
        return x
