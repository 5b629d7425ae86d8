"""The styles of Open-Sora: factorised attention first, then one over all tokens.

Version 1 attends within frames and along time by turns. Version 2 is built like an image model
with three axes of position ids: 2 x 2 rotation matrices per frequency, or a table of cosines and
sines, over text and video in one sequence; its blocks run under activation checkpointing.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.originals.hunyuan import Modulation
from benchmarks.originals.parts import (
    TEXT,
    Built,
    Grid,
    Original,
    RMSNorm,
    axis_rates,
    feed_forward,
    plain_norm,
    sinusoids,
)

WIDTH, HEADS, HEAD_DIM = 48, 2, 24
AXES = (8, 8, 8)


class FactorisedAttention(nn.Module):
    """Self-attention over whatever side the caller puts second."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, HEADS, HEAD_DIM)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q * HEAD_DIM**-0.5, k, v, scale=1.0)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, WIDTH))  # type: ignore[no-any-return]


class STDiTStyle(nn.Module):
    """Version 1; latents are (B, 4, T, 2 H, 2 W)."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.x_embedder = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.spatial = nn.ModuleList(FactorisedAttention() for _ in range(layers))
        self.temporal = nn.ModuleList(FactorisedAttention() for _ in range(layers))
        self.norm, self.head = plain_norm(WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, T * H * W, 16)."""
        x = self.x_embedder(x)
        batch, _, t, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            frames = self.norm(x).view(batch * t, h * w, WIDTH)  # "B (T S) C -> (B T) S C"
            x = x + spatial(frames).view(batch, t * h * w, WIDTH)
            times = self.norm(x).view(batch, t, h * w, WIDTH).transpose(1, 2).flatten(0, 1)
            times = temporal(times).view(batch, h * w, t, WIDTH).transpose(1, 2)
            x = x + times.reshape(batch, t * h * w, WIDTH)
        return self.head(x)  # type: ignore[no-any-return]


def matrices(ids: Tensor, width: int) -> Tensor:
    """(B, N) ids of one axis -> (B, N, width / 2, 2, 2) rotations."""
    angles = torch.einsum("...n,d->...nd", ids, axis_rates(width))
    out = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1)
    return out.view(*out.shape[:-1], 2, 2).float()  # "b n d (i j) -> b n d i j"


def by_matrices(x: Tensor, turns: Tensor) -> Tensor:
    """(B, H, N, D) rotated by (B, 1, N, D / 2, 2, 2)."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    out = turns[..., 0] * pairs[..., 0] + turns[..., 1] * pairs[..., 1]
    return out.reshape(*x.shape).type_as(x)


def by_table(x: Tensor, turns: Tensor) -> Tensor:
    """(B, H, N, D) rotated by (2, B, N, D): halves swapped, as fused kernels do it."""
    cos, sin = turns[0].unsqueeze(1), turns[1].unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class EmbedND(nn.Module):
    """Rotary positions of (B, N, 3) ids."""

    def __init__(self, table: bool) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        """(B, 1, N, D / 2, 2, 2) rotations, or (2, B, N, D) cosines and sines."""
        if not self.table:
            parts = [matrices(ids[..., i], width) for i, width in enumerate(AXES)]
            return torch.cat(parts, dim=-3).unsqueeze(1)
        angles = torch.cat(
            [ids[..., i].unsqueeze(-1) * axis_rates(width) for i, width in enumerate(AXES)], -1
        )
        angles = torch.cat((angles, angles), dim=-1)
        return torch.stack((angles.cos(), angles.sin())).float()


class JointBlock(nn.Module):
    """Text and video in one sequence, attention and feed-forward one after the other."""

    def __init__(self, table: bool) -> None:
        super().__init__()
        self.rotate = by_table if table else by_matrices
        self.mod, self.norm1, self.norm2 = Modulation(6), plain_norm(WIDTH), plain_norm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.q_norm, self.k_norm = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)
        self.proj, self.mlp = nn.Linear(WIDTH, WIDTH), feed_forward(WIDTH)

    def forward(self, x: Tensor, vec: Tensor, turns: Tensor) -> Tensor:
        """x: (B, L + N, C)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.mod(vec)
        y = self.norm1(x) * (1 + scale) + shift
        q, k, v = (  # "B L (H D) -> B L H D"
            layer(y).view(*y.shape[:2], HEADS, HEAD_DIM)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k, v = (part.transpose(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))
        out = F.scaled_dot_product_attention(self.rotate(q, turns), self.rotate(k, turns), v)
        x = x + gate * self.proj(out.transpose(1, 2).flatten(2))  # "B H L D -> B L (H D)"
        return x + mlp_gate * self.mlp(self.norm2(x) * (1 + mlp_scale) + mlp_shift)  # type: ignore[no-any-return]


class MMDiTStyle(nn.Module):
    """Version 2; latents are packed (B, N, 16)."""

    def __init__(self, table: bool, checkpointed: bool, layers: int = 2) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.img_in, self.txt_in = nn.Linear(16, WIDTH), nn.Linear(16, WIDTH)
        self.time_in, self.pe_embedder = feed_forward(WIDTH), EmbedND(table)
        self.blocks = nn.ModuleList(JointBlock(table) for _ in range(layers))
        self.final = nn.Linear(WIDTH, 16)

    def forward(
        self, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, time: Tensor
    ) -> Tensor:
        """img: (B, N, 16), img_ids: (B, N, 3), txt: (B, L, 16), txt_ids: (B, L, 3)."""
        vec = self.time_in(sinusoids(WIDTH, time).float())
        x = torch.cat((self.txt_in(txt), self.img_in(img)), 1)
        turns = self.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))
        for block in self.blocks:
            if self.checkpointed:
                x = checkpoint(block, x, vec, turns, use_reentrant=False)
            else:
                x = block(x, vec, turns)
        return self.final(x[:, txt.shape[1] :])  # type: ignore[no-any-return]


def _v1(grid: Grid, batch: int = 1) -> Built:
    t, h, w = grid
    return STDiTStyle(), {"x": torch.randn(batch, 4, t, 2 * h, 2 * w)}


def _v2(grid: Grid, table: bool = False, checkpointed: bool = False, batch: int = 1) -> Built:
    t, h, w = grid
    ids = torch.cartesian_prod(*(torch.arange(n).float() for n in grid))
    return MMDiTStyle(table, checkpointed), {
        "img": torch.randn(batch, t * h * w, 16),
        "img_ids": ids.expand(batch, -1, 3).contiguous(),
        "txt": torch.randn(batch, TEXT, 16),
        "txt_ids": torch.zeros(batch, TEXT, 3),
        "time": torch.full((batch,), 500.0),
    }


STYLES = (
    Original("open-sora v1", _v1, 0, {"FACTORISED": 4}),
    Original("open-sora v1, batch 2", partial(_v1, batch=2), 0, {"FACTORISED": 4}),
    Original("open-sora v2", _v2, 2, first=TEXT),
    Original("open-sora v2, batch 2", partial(_v2, batch=2), 2, first=TEXT),
    Original("open-sora v2, table", partial(_v2, table=True), 2, first=TEXT),
    Original("open-sora v2, checkpointed", partial(_v2, checkpointed=True), 2, first=TEXT),
)
