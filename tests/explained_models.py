"""What `veda explain tests...:callable` is given in the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    """Self-attention over the tokens of a latent."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(tokens).unflatten(2, (1, 16)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Two layers; `breaks` puts a graph break before the second one's attention."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))
        if breaks:
            self.layers[1].forward = torch.compiler.disable(self.layers[1].forward)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        tokens = latent.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return tokens


def good() -> tuple[nn.Module, tuple[Any, ...]]:
    return Model(), (torch.ones(1, 16, 4, 8, 12),)


def broken() -> tuple[nn.Module, dict[str, Any]]:
    return Model(breaks=True), {"latent": torch.ones(1, 16, 4, 8, 12)}


def not_a_model() -> int:
    return 3


def failing() -> tuple[nn.Module, tuple[Any, ...]]:
    return Model(), (torch.ones(3),)
