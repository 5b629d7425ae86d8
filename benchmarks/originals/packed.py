"""Styles of code that packs its tokens: Mochi, CogVideoX in its first form, Step-Video.

Mochi gathers video and valid text into one unpadded sequence by an index tensor. CogVideoX asks a
mask whether it is all ones before each attention, which breaks the graph. Step-Video makes its
positions in the graph and rotates three slices of every head.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.originals.flash import flash_attn_varlen_func
from benchmarks.originals.parts import (
    TEXT,
    Built,
    Grid,
    Original,
    RMSNorm,
    axis_rates,
    feed_forward,
    plain_norm,
)

WIDTH, HEADS, HEAD_DIM = 48, 2, 24


class MochiAttention(nn.Module):
    """Video and text of different widths in one packed sequence."""

    def __init__(self, text_width: int) -> None:
        super().__init__()
        self.qkv_x, self.qkv_y = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(text_width, 3 * WIDTH)
        self.q_norm, self.k_norm = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)
        self.proj_x, self.proj_y = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, text_width)

    def forward(
        self, x: Tensor, y: Tensor, indices: Tensor, bounds: Tensor, longest: int, turns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x: (B, N, C), y: (B, L, C'). indices: rows of the (B * (N + L)) that are no padding."""
        batch, tokens, _ = x.shape
        both = torch.cat([self.qkv_x(x), self.qkv_y(y)], dim=1)
        rows = both.view(-1, 3, HEADS, HEAD_DIM)
        picked = torch.gather(rows, 0, indices[:, None, None, None].expand(-1, 3, HEADS, HEAD_DIM))
        q, k, v = picked.unbind(1)
        q, k = (norm(part) * turns for norm, part in ((self.q_norm, q), (self.k_norm, k)))
        out = flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest)
        whole = torch.zeros(rows.shape[0], WIDTH, dtype=out.dtype)
        whole = torch.scatter(whole, 0, indices[:, None].expand(-1, WIDTH), out.flatten(1))
        x_out, y_out = whole.view(batch, -1, WIDTH).split([tokens, y.shape[1]], dim=1)
        return x + self.proj_x(x_out), y + self.proj_y(y_out)


class MochiStyle(nn.Module):
    """The model; latents are (B, 4, T, 2 H, 2 W)."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.text = nn.Linear(16, 32)
        self.blocks = nn.ModuleList(MochiAttention(32) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 16)

    def forward(
        self, x: Tensor, y: Tensor, indices: Tensor, bounds: Tensor, longest: int, turns: Tensor
    ) -> Tensor:
        """Returns (B, N, 16)."""
        x, y = self.embed(x).flatten(2).transpose(1, 2), self.text(y)
        for block in self.blocks:
            x, y = block(x, y, indices, bounds, longest, turns)
        return self.head(x)  # type: ignore[no-any-return]


def attention_function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, asked: bool) -> Tensor:
    """Attention that is causal unless the mask is full. asked: find out from its values."""
    full = bool((mask > 0).all()) if asked else True
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=not full)


class CogBlock(nn.Module):
    """Text and video in one sequence, one projection for both, rotary positions on the video."""

    def __init__(self, asked: bool) -> None:
        super().__init__()
        self.asked = asked
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(HEAD_DIM), nn.LayerNorm(HEAD_DIM)
        self.dense, self.mlp = nn.Linear(WIDTH, WIDTH), feed_forward(WIDTH)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor, text: int) -> Tensor:
        """x: (B, L + N, C)."""
        mixed = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (  # "b n (h d) -> b h n d"
            part.view(*part.shape[:-1], HEADS, HEAD_DIM).permute(0, 2, 1, 3) for part in mixed
        )
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = (
            torch.cat((part[:, :, :text], self.turn(part[:, :, text:], cos, sin)), dim=2)
            for part in (q, k)
        )
        out = attention_function(q, k, v, mask, self.asked)
        x = x + self.dense(out.permute(0, 2, 1, 3).contiguous().view(*x.shape))
        return x + self.mlp(x)  # type: ignore[no-any-return]

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, H, N, D) rotated by tables (T, H, W, D) of which N rows are taken."""
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        quarter = torch.stack((-second, first), dim=-1).flatten(-2)
        table = [part.reshape(-1, HEAD_DIM)[None, None] for part in (cos, sin)]
        return x * table[0] + quarter * table[1]


class CogVideoXStyle(nn.Module):
    """The model; latents are (B, T, 4, 2 H, 2 W)."""

    def __init__(self, asked: bool, layers: int = 2) -> None:
        super().__init__()
        self.proj, self.text_proj = nn.Conv2d(4, WIDTH, 2, 2), nn.Linear(16, WIDTH)
        self.layers = nn.ModuleList(CogBlock(asked) for _ in range(layers))
        self.final = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor, text: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Returns (B, N, 16)."""
        batch, t = x.shape[:2]
        image = self.proj(x.reshape(-1, *x.shape[2:]))  # "b t c h w -> (b t) c h w"
        image = image.view(batch, t, *image.shape[1:]).flatten(3).transpose(2, 3).flatten(1, 2)
        hidden = torch.cat((self.text_proj(text), image), dim=1)
        mask = torch.ones(1, 1)
        for layer in self.layers:
            hidden = layer(hidden, mask, cos, sin, text.shape[1])
        return self.final(hidden[:, text.shape[1] :])  # type: ignore[no-any-return]


class StepBlock(nn.Module):
    """Self-attention with three slices of rotary positions, then attention to the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = plain_norm(WIDTH), plain_norm(WIDTH)
        self.wqkv, self.wo = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = RMSNorm(HEAD_DIM), RMSNorm(HEAD_DIM)
        self.wq, self.wkv, self.wo2 = (nn.Linear(WIDTH, n * WIDTH) for n in (1, 2, 1))
        self.ff = feed_forward(WIDTH)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """(B, N, H, D) by positions (B, N, 3), one slice of D an axis."""
        slices = []
        for i, part in enumerate(x.split([8, 8, 8], dim=-1)):
            length = int(x.shape[1])  # a table long enough for every position
            angles = torch.outer(torch.arange(length).float(), axis_rates(8).float())
            angles = torch.cat((angles, angles), dim=-1)
            rows = positions[..., i]
            cos = F.embedding(rows, angles.cos())[:, :, None, :]
            sin = F.embedding(rows, angles.sin())[:, :, None, :]
            first, second = part.chunk(2, dim=-1)
            slices.append(part * cos + torch.cat((-second, first), dim=-1) * sin)
        return torch.cat(slices, dim=-1)

    def forward(self, x: Tensor, prompt: Tensor, positions: Tensor) -> Tensor:
        """x: (B, N, C)."""
        qkv = self.wqkv(self.norm1(x)).view(*x.shape[:2], HEADS, 3 * HEAD_DIM)
        q, k, v = qkv.split([HEAD_DIM] * 3, dim=-1)
        q, k = self.rotate(self.q_norm(q), positions), self.rotate(self.k_norm(k), positions)
        x = x + self.wo(self.core(q, k, v))
        q = self.wq(self.norm2(x)).view(*x.shape[:2], HEADS, HEAD_DIM)
        k, v = self.wkv(prompt).view(*prompt.shape[:2], HEADS, 2 * HEAD_DIM).chunk(2, dim=-1)
        x = x + self.wo2(self.core(q, k, v))
        return x + self.ff(self.norm2(x))  # type: ignore[no-any-return]

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """ "b s h d -> b h s d", attention, "b h s d -> b s (h d)"."""
        q, k, v = (part.transpose(1, 2).contiguous() for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None)
        return out.transpose(1, 2).flatten(2)


class StepVideoStyle(nn.Module):
    """The model; latents are (B, T, 4, 2 H, 2 W)."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.pos_embed, self.caption = nn.Conv2d(4, WIDTH, 2, 2), nn.Linear(16, WIDTH)
        self.blocks = nn.ModuleList(StepBlock() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """Returns (B, N, 16)."""
        batch, t = x.shape[:2]
        x = self.pos_embed(x.flatten(0, 1))
        h, w = x.shape[2:]
        x = x.flatten(2).transpose(1, 2).reshape(batch, t * h * w, WIDTH)
        axes = [torch.arange(n) for n in (t, h, w)]
        positions = torch.cartesian_prod(*axes).unsqueeze(0).expand(batch, -1, -1)
        prompt = self.caption(prompt)
        for block in self.blocks:
            x = block(x, prompt, positions)
        return self.head(x)  # type: ignore[no-any-return]


def _mochi(grid: Grid, batch: int = 1) -> Built:
    t, h, w = grid
    tokens, valid = t * h * w, TEXT - 3
    keep = torch.ones(batch, tokens + TEXT, dtype=torch.bool)
    keep[:, tokens + valid :] = False
    lengths = torch.tensor([0] + [tokens + valid] * batch)
    return MochiStyle(), {
        "x": torch.randn(batch, 4, t, 2 * h, 2 * w),
        "y": torch.randn(batch, TEXT, 16),
        "indices": keep.flatten().nonzero().flatten(),
        "bounds": lengths.cumsum(0, dtype=torch.int32),
        "longest": tokens + valid,
        "turns": torch.randn(batch * (tokens + valid), 1, HEAD_DIM),
    }


def _cogvideox(grid: Grid, asked: bool, batch: int = 2) -> Built:
    t, h, w = grid
    places = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    turns = [(axis[..., None] * axis_rates(8)).repeat_interleave(2, -1) for axis in places]
    angles = torch.cat(turns, dim=-1)  # (T, H, W, D)
    return CogVideoXStyle(asked), {
        "x": torch.randn(batch, t, 4, 2 * h, 2 * w),
        "text": torch.randn(batch, TEXT, 16),
        "cos": angles.cos().float(),
        "sin": angles.sin().float(),
    }


def _step(grid: Grid, batch: int = 1) -> Built:
    t, h, w = grid
    return StepVideoStyle(), {
        "x": torch.randn(batch, t, 4, 2 * h, 2 * w),
        "prompt": torch.randn(batch, TEXT, 16),
    }


STYLES = (
    Original("mochi original", _mochi, 2, last=TEXT - 3),
    Original("mochi original, batch 2", partial(_mochi, batch=2), 0, {"SEGMENTS": 2}),
    Original("cogvideox original", partial(_cogvideox, asked=True), 2, first=TEXT,
             shared=True),
    Original("cogvideox original, mask not asked", partial(_cogvideox, asked=False), 2, first=TEXT),
    Original("step-video original", _step, 2, {"CROSS_ATTENTION": 2}),
    Original("step-video original, batch 2", partial(_step, batch=2), 2, {"CROSS_ATTENTION": 2}),
)  # fmt: skip
