"""What the stand-ins share: norms, feed-forward layers, time embeddings, and their ground truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Grid = tuple[int, int, int]
Built = tuple[nn.Module, dict[str, Any]]

TEXT = 12
"""Text tokens of every stand-in with a prompt."""


@dataclass(frozen=True)
class Original:
    """One stand-in and what is true of its attention.

    build: grid of tokens -> (model, arguments of one call). sites: video self-attention calls.
    left: how many other attention calls stay dense, by reason. first, last: extra tokens around
    the video. options: what a user adds to the backend's options for `sites` to be served.
    dynamo: Dynamo settings a user needs for that. shared: the model is cut into graphs, and its
    blocks share one with the attention.
    """

    name: str
    build: Callable[[Grid], Built]
    sites: int
    left: Mapping[str, int] = field(default_factory=dict)
    first: int = 0
    last: int = 0
    options: Callable[[Grid], Mapping[str, Any]] = lambda _: {}
    dynamo: Mapping[str, Any] = field(default_factory=dict)
    shared: bool = False

    def make(self, grid: Grid) -> Built:
        """The model in eval mode and the arguments of a call; leaves global seeds alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = self.build(grid)
        return model.eval().requires_grad_(False), inputs


class RMSNorm(nn.Module):
    """x / rms(x) over the last side, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # queries and keys larger than 1: near-uniform attention would hide what is not kept
        self.weight = nn.Parameter(torch.full((width,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        """The shape and dtype of x."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
        return y.type_as(x) * self.weight


def plain_norm(width: int) -> nn.LayerNorm:
    """LayerNorm without weights, as modulated blocks use it."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def feed_forward(width: int, factor: int = 2) -> nn.Sequential:
    """Linear, GELU, Linear."""
    return nn.Sequential(
        nn.Linear(width, factor * width), nn.GELU("tanh"), nn.Linear(factor * width, width)
    )


def sinusoids(width: int, position: Tensor, base: float = 10000.0) -> Tensor:
    """(..., width) cosines and sines of positions, computed in float64."""
    half = width // 2
    rates = torch.pow(base, -torch.arange(half, dtype=torch.float64) / half)
    angles = position.double()[..., None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def axis_rates(width: int, base: float = 10000.0) -> Tensor:
    """(width / 2,) rotary frequencies of one axis."""
    return 1.0 / base ** (torch.arange(0, width, 2).double() / width)


def default_scale(head_dim: int) -> float:
    """1 / sqrt(head_dim)."""
    return 1.0 / math.sqrt(head_dim)
