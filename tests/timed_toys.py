"""Toy video models that embed numbers by sine and cosine, as models embed their timestep."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import Video


def waves(x: Tensor, features: int = 32) -> Tensor:
    """(..., features) sines and cosines of x (...)."""
    steps = torch.arange(features // 2, dtype=torch.float32)
    angles = x[..., None].float() * torch.exp(-math.log(10_000) / 16 * steps)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Timed(Video):
    """A `Video` whose tokens are shifted by embeddings of any further inputs, of any names."""

    def __init__(self, factor: float, run_block: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__(F.scaled_dot_product_attention)
        self.mix = nn.Linear(32, 32)
        self.factor, self.run_block = factor, run_block

    def step(self, block: nn.Module, x: Tensor) -> Tensor:
        return x + self.run_block(block, x)

    def forward(self, x: Tensor, **scalars: Tensor) -> Tensor:
        x = self.embed(self.tokens(x))
        for scalar in scalars.values():
            x = x + self.mix(waves(scalar * self.factor)).reshape(-1, 1, 32)
        for block in self.blocks:
            x = self.step(block, x)
        return x


def plainly(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = block(x)
    return y


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = checkpoint(block, x, use_reentrant=False)
    return y


@torch.compiler.nested_compile_region
def in_region(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = block(x)
    return y


def timed(factor: float = 1.0, run_block: Callable[[nn.Module, Tensor], Tensor] = plainly) -> Timed:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Timed(factor, run_block).eval().requires_grad_(False)


class Positioned(Video):
    """Rotary positions, computed in the graph from an input of one number per token."""

    def __init__(self, added: bool = False) -> None:
        super().__init__(self._attend)
        self.added = added

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.added:
            cos, sin = self.turn[:, 8:], self.turn[:, :8]
            halves = ((x[..., :8], x[..., 8:]) for x in (q, k))
            q, k = (torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1) for a, b in halves)
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        self.turn = waves(place, 16)
        x = self.embed(self.tokens(x))
        if self.added:
            x = x + waves(place)
        for block in self.blocks:
            x = self.step(block, x)
        return x


class Summed(nn.Module):
    """Shifts tokens by the sum of several embedded values."""

    def __init__(self, model: Timed) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        shift = self.model.mix(waves(places)).sum(1, keepdim=True)
        x = self.model.embed(self.model.tokens(x)) + shift
        for block in self.model.blocks:
            x = self.model.step(block, x)
        return x
