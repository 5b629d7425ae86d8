"""Random video attention layers whose tokens carry their places through all that moves them."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from random_moves import FLATTEN, GRIDDED, SEQUENCE
from torch import Tensor

Grid = tuple[int, int, int]
Attend = Callable[..., Tensor]
WIDTH, HEADS = 16, 2
UNIT = 0.0625


def places(grid: Grid, first: Grid = (0, 0, 0)) -> Tensor:
    """(T, H, W, 3): where every element stands."""
    sides = [torch.arange(f, f + n).float() for f, n in zip(first, grid, strict=True)]
    return torch.stack(torch.meshgrid(*sides, indexing="ij"), -1) * UNIT


def video(grid: Grid, batch: int, first: Grid = (0, 0, 0), seed: int = 0) -> Tensor:
    """(B, T, H, W, C) with places in the first channels and noise in the others."""
    noise = torch.randn(batch, *grid, WIDTH - 3, generator=torch.Generator().manual_seed(seed))
    return torch.cat([places(grid, first).expand(batch, -1, -1, -1, -1), noise], -1)


def projections(seed: int) -> list[Tensor]:
    """(heads * width, width) for q, k and v; every head keeps the first three features."""
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for _ in range(3):
        weight = torch.randn(HEADS, WIDTH, WIDTH, generator=generator) * 0.6
        weight[:, :3] = 0
        weight[:, range(3), range(3)] = 1.0
        weights.append(torch.nn.Parameter(weight.flatten(0, 1), requires_grad=False))
    return weights


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of the last twelve features by (N, 6) angles."""
    kept, a, b = x[..., :4], x[..., 4:10], x[..., 10:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([kept, a * cos - b * sin, a * sin + b * cos], -1)


def averaged(x: Tensor, patch: Grid) -> Tensor:
    pt, ph, pw = patch
    return x.unflatten(3, (-1, pw)).unflatten(2, (-1, ph)).unflatten(1, (-1, pt)).mean((2, 4, 6))


def convolved(x: Tensor, patch: Grid) -> Tensor:
    weight = torch.eye(WIDTH)[:, :, None, None, None].expand(-1, -1, *patch)
    y = F.conv3d(x.movedim(-1, 1), weight / (patch[0] * patch[1] * patch[2]), stride=patch)
    return y.movedim(1, -1)


def unshuffled(x: Tensor, patch: Grid) -> Tensor:
    size = patch[1]
    y = F.pixel_unshuffle(x.movedim(-1, 2).flatten(0, 1), size).unflatten(1, (-1, size * size))
    return y.mean(2).unflatten(0, x.shape[:2]).movedim(2, -1)


def sampled(x: Tensor, patch: Grid) -> Tensor:
    return x[:, :: patch[0], :: patch[1], :: patch[2]]


class Program:
    """A random attention layer and how to make its inputs."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.seed = seed
        self.patch: Grid = draw.choice([(1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 1, 1)])
        self.patchify = draw.choice([averaged, convolved, unshuffled, sampled])
        if self.patch[0] != 1 and self.patchify is unshuffled:
            self.patchify = averaged
        self.sides: Grid = (draw.choice([2, 3, 4]), draw.choice([4, 6, 8]), draw.choice([6, 8, 10]))
        self.latent = draw.choice(["BCTHW", "BTCHW", "BTHWC"])
        self.batch = draw.choice([1, 1, 2])
        self.joined = draw.choice([None, None, None, 1, 2, 3])
        self.on_grid = draw.choice(GRIDDED) if draw.random() < 0.4 else GRIDDED[0]
        self.flatten = draw.choice(FLATTEN) if draw.random() < 0.5 else FLATTEN[0]
        self.on_tokens = draw.choice(SEQUENCE) if draw.random() < 0.5 else SEQUENCE[0]
        self.text = draw.choice([None, "first", "last", "both", "pad"])
        self.on_joint = draw.choice(SEQUENCE) if draw.random() < 0.15 else SEQUENCE[0]
        self.apart = draw.choice([0, 1, 2]) if draw.random() < 0.15 else None
        self.on_apart = draw.choice(SEQUENCE)
        self.on_heads = draw.choice(SEQUENCE) if draw.random() < 0.15 else None
        self.packed = draw.random() < 0.25
        self.angles = draw.choice(["table", "ids", "computed", "batched", None])
        if self.packed and self.angles is not None:  # moving tokens alone would belie positions
            self.on_tokens = self.on_joint = SEQUENCE[0]
        self.mask = draw.choice([None, None, "bool", "added", "bias"])
        self.chunks = draw.random() < 0.1
        self.folded = draw.random() < 0.1
        self.scale = draw.choice([None, 0.4])
        self.dynamic = draw.random() < 0.2
        self.weights = projections(seed)

    def grids(self) -> list[Grid]:
        """The token grids to call it with, one after the other."""
        t, h, w = self.sides
        return [(t, h, w), (t, w, h), (t + 2, h, w + 2)] if self.dynamic else [(t, h, w)]

    def inputs(self, grid: Grid) -> list[Tensor]:
        """latent or tokens, another latent, text, key mask, positions."""
        size: Grid = tuple(a * b for a, b in zip(grid, self.patch, strict=True))  # type: ignore[assignment]
        x = video(size, self.batch, seed=self.seed)
        offset = tuple(size[d] if self.joined == d + 1 else 0 for d in range(3))
        y = video(size, self.batch, offset, seed=self.seed + 1)  # type: ignore[arg-type]
        text = torch.randn(self.batch, 7, WIDTH, generator=torch.Generator().manual_seed(5))
        text[..., :3] = -1.0
        ids = (places(grid).flatten(0, 2) / UNIT).long()
        rates = torch.tensor([1.0, 0.3])
        table = (ids[..., None] * rates).flatten(1)
        positions = {"ids": ids, "batched": table.expand(self.batch, -1, -1).contiguous()}
        valid = torch.rand(self.batch, 4096, generator=torch.Generator().manual_seed(6)) > 0.1
        if self.packed:
            x = self.flatten(video(grid, self.batch, seed=self.seed))
            given = positions.get(self.angles or "", table)
            if given is not table and self.angles == "batched":
                given = self.flatten(given.unflatten(1, grid))
            else:
                given = self.flatten(given.unflatten(0, grid)[None])[0]
            return [x, y, text, valid, given]
        x, y = (self._as_latent(z) for z in (x, y))
        return [x, y, text, valid, table]

    def _as_latent(self, x: Tensor) -> Tensor:
        return x.permute(*("BTHWC".index(side) for side in self.latent)).contiguous()

    def tokens(self, x: Tensor, other: Tensor) -> Tensor:
        """(B, N, C) of the video."""
        if self.packed:
            return self.on_tokens(x)
        x, other = (z.permute(*(self.latent.index(s) for s in "BTHWC")) for z in (x, other))
        if self.joined is not None:
            x = torch.cat([x, other], self.joined)
        return self.on_tokens(self.flatten(self.on_grid(self.patchify(x, self.patch))))

    def __call__(self, attend: Attend, *inputs: Tensor) -> Tensor:
        """The layer's output with `attend` as its attention."""
        x, other, text, valid, positions = inputs
        s = self.tokens(x, other)
        count = s.shape[1]
        text = text[:1].expand(s.shape[0], -1, -1)
        if self.text == "pad":
            s = F.pad(s, (0, 0, 0, 5))
        elif self.text is not None:
            before = [text] if self.text in ("first", "both") else []
            after = [text] if self.text in ("last", "both") else []
            s = torch.cat([*before, s, *after], 1)
        s = self.on_joint(s)
        parts = [s, s, s]
        if self.apart is not None:
            parts[self.apart] = self.on_apart(s)
        q, k, v = (
            F.linear(p, w).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
            for p, w in zip(parts, self.weights, strict=True)
        )
        if self.packed and self.angles is not None and positions.shape[-2] == count:
            q, k = (self.turned(y, positions, count) for y in (q, k))
        if self.on_heads is not None:
            q, k, v = (self.on_heads(y.flatten(0, 1)).unflatten(0, (-1, HEADS)) for y in (q, k, v))
        if self.folded:
            q, k, v = (y.flatten(0, 1).unsqueeze(1) for y in (q, k, v))
        mask = self.masked(valid, q, k)
        queries = q.chunk(2, 2) if self.chunks else [q]
        out = torch.cat([attend(part, k, v, mask, self.scale) for part in queries], 2)
        if self.folded:
            out = out.squeeze(1).unflatten(0, (-1, HEADS))
        return out.transpose(1, 2).flatten(2)

    def turned(self, x: Tensor, positions: Tensor, count: int) -> Tensor:
        """x with its video tokens' positions."""
        if self.angles in ("ids", "computed"):
            ids = positions
            if self.angles == "computed":
                t, h, w = self.sides
                sides = [torch.arange(n) for n in (t, h, w)]
                grid = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1)
                ids = self.flatten(grid[None])[0]
                if ids.shape[0] != count:
                    return x
            positions = (ids[..., None] * torch.tensor([1.0, 0.3])).flatten(-2)
        if positions.dim() == 3:
            positions = positions.unsqueeze(1)
        start = 7 if self.text in ("first", "both") else 0
        before, mine, after = x.split([start, count, x.shape[2] - start - count], 2)
        return torch.cat([before, turn(mine, positions), after], 2)

    def masked(self, valid: Tensor, q: Tensor, k: Tensor) -> Tensor | None:
        """What keeps queries from keys."""
        if self.mask is None:
            return None
        rows = valid[:1, : k.shape[2]].expand(q.shape[0], -1)[:, None, None, :]
        if self.mask == "bool":
            return rows
        low = float("-inf") if self.mask == "added" else -2.0
        return torch.zeros(rows.shape).masked_fill(~rows, low)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    if k.shape[2] != v.shape[2]:
        raise ValueError("CPU kernels would read beyond the values")
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
