"""Models that pack the video and the text of every sample into one sequence, with offsets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import GRID, latents

from benchmarks.originals.flash import flash_attn_varlen_func

TEXT = 8
Bounds = Callable[[Tensor, int], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def one_by_one(mask: Tensor, video: int) -> Tensor:
    batch, length = mask.shape
    counts = mask.sum(dim=1)
    bounds = torch.zeros([2 * batch + 1], dtype=torch.int32)
    for i in range(batch):
        bounds[2 * i + 1] = i * (video + length) + video + counts[i]
        bounds[2 * i + 2] = (i + 1) * (video + length)
    return bounds


def strided(mask: Tensor, video: int) -> Tensor:
    batch, length = mask.shape
    starts = torch.arange(0, batch) * (video + length)
    bounds = torch.zeros(2 * batch + 1, dtype=torch.int32)
    bounds[1::2] = (starts + video + torch.count_nonzero(mask, dim=-1)).to(torch.int32)
    bounds[2::2] = starts + (video + length)
    return bounds


def cumulated(mask: Tensor, video: int) -> Tensor:
    counts = mask.bool().long().sum(-1)
    lengths = torch.stack([counts + video, mask.shape[1] - counts], dim=1).flatten()
    return F.pad(lengths.cumsum(0), (1, 0)).int()


def joined(mask: Tensor, video: int) -> Tensor:
    batch, length = mask.shape
    parts = [torch.zeros(1, dtype=torch.int64)]
    for i in range(batch):
        hidden = torch.sum(mask == 0, dim=1, keepdim=True)[i]
        end = torch.full((1,), (i + 1) * (video + length))
        parts += [end - hidden, end]
    return torch.cat(parts).to(torch.int32)


def two_texts_of_five(mask: Tensor, video: int) -> Tensor:
    whole = video + mask.shape[1]
    ends = [end for i in range(len(mask)) for end in (i * whole, (i + 1) * whole - 3)]
    return torch.tensor([*ends, len(mask) * whole], dtype=torch.int32)


def whole_samples(mask: Tensor, video: int) -> Tensor:
    whole = video + mask.shape[1]
    return torch.arange(0, (len(mask) + 1) * whole, whole, dtype=torch.int32)


def by_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    batch, tokens = q.shape[:2]
    packed = (x.reshape(batch * tokens, *x.shape[2:]) for x in (q, k, v))
    return flash_attn_varlen_func(*packed, bounds, bounds, tokens, tokens).view(q.shape)


class Model(nn.Module):
    """Two layers over a (B, 4, T, H, W) video and the text behind it, packed."""

    def __init__(self, bounds: Bounds, attend: Attend = by_varlen, kv_heads: int = 2) -> None:
        super().__init__()
        self.bounds, self.attend, self.kv_heads = bounds, attend, kv_heads
        self.embed, self.text = nn.Linear(4, 32), nn.Linear(4, 32)
        self.qkv = nn.ModuleList(nn.Linear(32, 32 + 2 * 16 * kv_heads) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        video = self.embed(x.flatten(2).transpose(1, 2))
        tokens = torch.cat([video, self.text(text)], 1)
        bounds = self.bounds(mask, video.shape[1])
        for layer in self.qkv:
            heads = layer(F.layer_norm(tokens, (32,))).unflatten(-1, (-1, 16))
            q, k, v = heads.split([2, self.kv_heads, self.kv_heads], dim=2)
            tokens = tokens + self.attend(q * 3.0, k, v, bounds).flatten(2)
        return tokens


def model(*args: Any, **kwargs: Any) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(*args, **kwargs).eval().requires_grad_(False)


def inputs(valid: tuple[int, ...], dtype: torch.dtype = torch.int64, text: int = TEXT,
           grid: tuple[int, int, int] = GRID) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    words = torch.randn(len(valid), text, 4, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(text) < torch.tensor(valid)[:, None]
    return latents(grid, batch=len(valid)), words, mask.to(dtype)
