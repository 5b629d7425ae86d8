"""Hand-written video transformers: attention spelled out in every usual way."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention over q, k, v of shape (B, H, N, D), all float; returns (B, H, N, D)."""


def by_methods(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tensor methods, scale on the logits."""
    logits = q.matmul(k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    return logits.softmax(dim=-1).matmul(v)


def by_operators(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Operators, scale on the queries."""
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, -1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """einsum on tokens-first operands: no transposed key, heads in the third place."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    weights = torch.nn.functional.softmax(logits, dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).transpose(1, 2)


def by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """baddbmm and bmm on 3-D tensors, heads folded into the batch."""
    batch, heads, tokens, head_dim = q.shape
    q, k, v = (x.reshape(batch * heads, tokens, head_dim) for x in (q, k, v))
    empty = torch.empty(batch * heads, tokens, tokens, dtype=q.dtype, device=q.device)
    logits = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=head_dim**-0.5)
    return torch.bmm(logits.softmax(-1), v).reshape(batch, heads, tokens, head_dim)


def by_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Logits and softmax in float32 whatever the model's dtype."""
    logits = torch.matmul(q, k.transpose(2, 3)).float() * q.shape[-1] ** -0.5
    return torch.matmul(torch.softmax(logits, dim=-1).to(v.dtype), v)


class PlainBlock(nn.Module):
    """Pre-norm self-attention and MLP over (B, N, C)."""

    def __init__(self, width: int, heads: int, attend: Attend, fused: bool) -> None:
        super().__init__()
        self.heads, self.attend, self.fused = heads, attend, fused
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if fused:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of shape (B, H, N, D)."""
        batch, tokens, width = x.shape
        shape = (batch, tokens, self.heads, width // self.heads)
        if self.fused:  # "b n (three h d) -> three b h n d"
            whole = self.qkv(x).reshape(batch, tokens, 3, *shape[2:]).permute(2, 0, 3, 1, 4)
            q, k, v = whole.unbind(0)
            return q, k, v
        q, k, v = (
            layer(x).view(shape).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        out = self.attend(*self.split(self.norm1(x)))
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class PlainDiT(nn.Module):
    """Patch embedding (1, 2, 2), blocks, back to pixels. Latents are (B, 4, T, 2 H, 2 W)."""

    def __init__(
        self,
        attend: Attend,
        *,
        fused: bool = False,
        width: int = 48,
        heads: int = 2,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, width, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(PlainBlock(width, heads, attend, fused) for _ in range(layers))
        self.head = nn.Linear(width, 16)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, 4, T, 2 H, 2 W) -> the same."""
        x = self.patch(latents)
        batch, _, t, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        x = self.head(x).view(batch, t, h, w, 4, 2, 2)
        return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, 4, t, 2 * h, 2 * w)
