"""The style of the original Wan 2.1 code.

Samples come as a list, are patched one by one and padded with zeros to one length; a tensor of grid
sizes decides how each is rotated, in complex float64; flash attention drops the padded keys and
falls back to torch's attention; modulation is float32 outside autocast.

Reading the grid sizes out of their tensor breaks the graph between the projections and the
attention; so does the warning of the fallback. The tokens are followed through all of these graphs.
`static` keeps the model in one: the same sizes as Python integers, with a setting of Dynamo for the
warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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
    sinusoids,
)

WIDTH, HEADS = 48, 2


def _outside_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def rotary_table(length: int, head_dim: int) -> Tensor:
    """(length, head_dim / 2) complex float64: frequencies of t, then h, then w."""
    third = 2 * (head_dim // 6)
    tables = []
    for width in (head_dim - 2 * third, third, third):
        angles = torch.outer(torch.arange(length).double(), axis_rates(width))
        tables.append(torch.polar(torch.ones_like(angles), angles))
    return torch.cat(tables, dim=1)


Sizes = Tensor | list[tuple[int, int, int]]
Lengths = Tensor | list[int]


def rotate(x: Tensor, grid_sizes: Sizes, table: Tensor) -> Tensor:
    """(B, N, H, D) with the first T * H * W tokens of every sample rotated, the padding not."""
    sizes = grid_sizes.tolist() if isinstance(grid_sizes, Tensor) else grid_sizes
    heads, half = x.size(2), x.size(3) // 2
    parts = table.split([half - 2 * (half // 3), half // 3, half // 3], dim=1)
    out = []
    for i, (t, h, w) in enumerate(sizes):
        tokens = t * h * w
        pairs = torch.view_as_complex(x[i, :tokens].to(torch.float64).reshape(tokens, heads, -1, 2))
        turns = torch.cat(
            [
                parts[0][:t].view(t, 1, 1, -1).expand(t, h, w, -1),
                parts[1][:h].view(1, h, 1, -1).expand(t, h, w, -1),
                parts[2][:w].view(1, 1, w, -1).expand(t, h, w, -1),
            ],
            dim=-1,
        ).reshape(tokens, 1, -1)
        turned = torch.view_as_real(pairs * turns).flatten(2)
        out.append(torch.cat([turned, x[i, tokens:]]))
    return torch.stack(out).float()


def attention(q: Tensor, k: Tensor, v: Tensor, k_lens: Lengths | None, flash: bool) -> Tensor:
    """(B, N, H, D) attention whose keys end at `k_lens`, where flash attention is at hand."""
    if not flash:
        if k_lens is not None:
            warnings.warn("key lengths are ignored by scaled_dot_product_attention", stacklevel=2)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=False)
        return out.transpose(1, 2).contiguous()
    batch, q_length, k_length = q.size(0), q.size(1), k.size(1)
    q_lens = torch.tensor([q_length] * batch, dtype=torch.int32)
    q = q.flatten(0, 1)
    if k_lens is None:
        k_lens = [k_length] * batch
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    else:
        k = torch.cat([u[:n] for u, n in zip(k, k_lens, strict=True)])
        v = torch.cat([u[:n] for u, n in zip(v, k_lens, strict=True)])
    bounds = [
        torch.cat([lens.new_zeros([1]), lens]).cumsum(0, dtype=torch.int32)
        for lens in (q_lens, torch.as_tensor(k_lens, dtype=torch.int32))
    ]
    out = flash_attn_varlen_func(q, k, v, bounds[0], bounds[1], q_length, k_length)
    return out.unflatten(0, (batch, q_length))


class SelfAttention(nn.Module):
    """Self-attention over padded sequences."""

    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.flash = flash
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(WIDTH), RMSNorm(WIDTH)

    def forward(self, x: Tensor, lens: Lengths, grid_sizes: Sizes, table: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        shape = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k = self.norm_q(self.q(x)).view(shape), self.norm_k(self.k(x)).view(shape)
        v = self.v(x).view(shape)
        q, k = rotate(q, grid_sizes, table), rotate(k, grid_sizes, table)
        return self.o(attention(q, k, v, lens, self.flash).flatten(2))  # type: ignore[no-any-return]


class CrossAttention(SelfAttention):
    """Attention to the prompt."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # type: ignore[override]
        """(B, N, C), (B, L, C) -> (B, N, C)."""
        q = self.norm_q(self.q(x)).view(x.size(0), -1, HEADS, WIDTH // HEADS)
        k = self.norm_k(self.k(context)).view(x.size(0), -1, HEADS, WIDTH // HEADS)
        v = self.v(context).view(x.size(0), -1, HEADS, WIDTH // HEADS)
        return self.o(attention(q, k, v, None, self.flash).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Modulated self-attention, cross-attention, modulated feed-forward."""

    def __init__(self, flash: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = plain_norm(WIDTH), plain_norm(WIDTH), RMSNorm(WIDTH)
        self.self_attn, self.cross_attn = SelfAttention(flash), CrossAttention(flash)
        self.ffn = feed_forward(WIDTH)
        self.modulation = nn.Parameter(torch.randn(1, 6, WIDTH) / WIDTH**0.5)

    def forward(
        self, x: Tensor, e: Tensor, lens: Lengths, grid_sizes: Sizes, table: Tensor, context: Tensor
    ) -> Tensor:
        """x: (B, N, C). e: (B, 6, C) float32."""
        with _outside_autocast():
            parts = (self.modulation + e).chunk(6, dim=1)
        y = self.norm1(x).float() * (1 + parts[1]) + parts[0]
        y = self.self_attn(y, lens, grid_sizes, table)
        with _outside_autocast():
            x = x + y * parts[2]
        x = x + self.cross_attn(self.norm3(x), context)
        y = self.ffn(self.norm2(x).float() * (1 + parts[4]) + parts[3])
        with _outside_autocast():
            return x + y * parts[5]


class WanStyle(nn.Module):
    """The model; latents are a list of (4, T, 2 H, 2 W), prompts a list of (L, 16)."""

    def __init__(self, flash: bool, static: bool, layers: int = 2) -> None:
        super().__init__()
        self.static = static
        self.patch_embedding = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.text_embedding = feed_forward(16)
        self.text_out = nn.Linear(16, WIDTH)
        self.time_embedding = nn.Sequential(
            nn.Linear(32, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.blocks = nn.ModuleList(Block(flash) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 16)
        self.freqs = rotary_table(64, WIDTH // HEADS)  # not a buffer: casts would lose precision

    def forward(
        self, x: Sequence[Tensor], t: Tensor, context: Sequence[Tensor], seq_len: int
    ) -> list[Tensor]:
        """seq_len: tokens every sample is padded to. Returns latents of the inputs' sizes."""
        patched = [self.patch_embedding(u.unsqueeze(0)) for u in x]
        grid_sizes: Sizes = [(u.shape[2], u.shape[3], u.shape[4]) for u in patched]
        if not self.static:
            grid_sizes = torch.stack([torch.tensor(u.shape[2:], dtype=torch.long) for u in patched])
        flat = [u.flatten(2).transpose(1, 2) for u in patched]
        lens: Lengths = [u.size(1) for u in flat]
        if not self.static:
            lens = torch.tensor(lens, dtype=torch.long)
        tokens = torch.cat(
            [torch.cat([u, u.new_zeros(1, seq_len - u.size(1), u.size(2))], dim=1) for u in flat]
        )
        with _outside_autocast():
            e = self.time_embedding(sinusoids(32, t).float())
            e0 = self.time_projection(e).unflatten(1, (6, WIDTH))
        texts = torch.stack([torch.cat([u, u.new_zeros(TEXT - u.size(0), 16)]) for u in context])
        prompt = self.text_out(self.text_embedding(texts))
        for block in self.blocks:
            tokens = block(tokens, e0, lens, grid_sizes, self.freqs, prompt)
        return self.unpatchify(self.head(tokens), grid_sizes)

    def unpatchify(self, x: Tensor, grid_sizes: Sizes) -> list[Tensor]:
        """Per sample, (4, T, 2 H, 2 W) of its own size."""
        out = []
        sizes = grid_sizes.tolist() if isinstance(grid_sizes, Tensor) else grid_sizes
        for u, (t, h, w) in zip(x, sizes, strict=True):
            u = u[: t * h * w].view(t, h, w, 2, 2, 4)
            out.append(torch.einsum("fhwqrc->cfhqwr", u).reshape(4, t, 2 * h, 2 * w))
        return out


def _build(
    grid: Grid, flash: bool = False, static: bool = True, padding: int = 0, batch: int = 1
) -> Built:
    t, h, w = grid
    return WanStyle(flash, static), {
        "x": [torch.randn(4, t, 2 * h, 2 * w) for _ in range(batch)],
        "t": torch.full((batch,), 500.0),
        "context": [torch.randn(TEXT - 2, 16) for _ in range(batch)],
        "seq_len": t * h * w + padding,
    }


_CROSS = {"CROSS_ATTENTION": 2}
_WARNINGS = {"reorderable_logging_functions": {warnings.warn}}

STYLES = (
    Original("wan original", partial(_build, static=False), 2, {"CROSS_ATTENTION": 1},
             shared=True),
    Original("wan original, static", _build, 2, _CROSS, dynamo=_WARNINGS),
    Original("wan original, static padded", partial(_build, padding=7), 2, _CROSS, last=7,
             dynamo=_WARNINGS),
    Original("wan original, static batch 2", partial(_build, batch=2), 2, _CROSS,
             dynamo=_WARNINGS),
    Original("wan original, static flash", partial(_build, flash=True), 2, _CROSS),
)  # fmt: skip
