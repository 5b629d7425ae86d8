"""Random video attention layers whose tokens carry their places through all that moves them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int, int]
Step = Callable[[Tensor], Tensor]
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


def swap_by_view(s: Tensor) -> Tensor:
    y, half = s.clone(), s.shape[1] // 2
    y[:, :half].copy_(s[:, half : 2 * half])
    y[:, half : 2 * half] = s[:, :half]
    return y


def write_strided(s: Tensor) -> Tensor:
    y = torch.empty_like(s)
    even, odd = s[:, ::2], s[:, 1::2]
    y[:, : even.shape[1]] = even
    y.narrow(1, even.shape[1], odd.shape[1]).copy_(odd)
    return y


def write_through_transpose(s: Tensor) -> Tensor:
    y = torch.zeros_like(s)
    y.transpose(1, 2).copy_(s.flip(1).transpose(1, 2))
    return y


def multiplied(s: Tensor, by: int = 7) -> Tensor:
    return s[:, (torch.arange(s.shape[1]) * by) % s.shape[1]]


def by_matrix(s: Tensor) -> Tensor:
    order = (torch.arange(s.shape[1]) * 7) % s.shape[1]
    return torch.eye(s.shape[1])[order] @ s


def sorted_by_norm(s: Tensor) -> Tensor:
    order = s[..., 5].argsort(1)
    return s.gather(1, order.unsqueeze(-1).expand_as(s))


def dropped(s: Tensor) -> Tensor:
    keep = s[..., 5].topk(s.shape[1] * 3 // 4, dim=1).indices.sort(1).values
    return s.gather(1, keep.unsqueeze(-1).expand(-1, -1, s.shape[2]))


def swapped_pairs(s: Tensor) -> Tensor:
    even = (torch.arange(s.shape[1]) % 2 == 0)[None, :, None]
    return torch.where(even, s.roll(-1, 1), s.roll(1, 1))


def scattered(s: Tensor) -> Tensor:
    order = (torch.arange(s.shape[1]) * 5) % s.shape[1]
    return torch.zeros_like(s).scatter(1, order[None, :, None].expand_as(s), s)


def second_reversed(s: Tensor) -> Tensor:
    return torch.cat([s[:1], s[1:].flip(1)])


SEQUENCE: list[Step] = [
    lambda s: s,
    lambda s: s.flip(1),
    lambda s: s.roll(5, 1),
    lambda s: torch.cat([s, s], 1),
    lambda s: s.repeat_interleave(2, 1),
    lambda s: s[:, ::2],
    lambda s: s[:, :-3],
    lambda s: torch.cat(s.chunk(3, 1)[::-1], 1),
    lambda s: torch.stack(s.unbind(1)[::-1], 1) if s.shape[1] < 100 else s.flip(1),
    lambda s: F.pad(s, (0, 0, 2, 3)),
    lambda s: s + s.mean(1, keepdim=True) * 0,
    lambda s: s.index_select(1, torch.arange(s.shape[1] - 1, -1, -1)),
    lambda s: s.index_copy(1, torch.arange(4), s[:, 4:8]),
    multiplied, by_matrix, sorted_by_norm, dropped, swapped_pairs, scattered, second_reversed,
    swap_by_view, write_strided, write_through_transpose,
]  # fmt: skip
"""(B, N, C) to (B, N', C)."""

GRIDDED: list[Step] = [
    lambda x: x,
    lambda x: x.flip(3),
    lambda x: x.flip(1, 2),
    lambda x: x.roll((1, 2), (2, 3)),
    lambda x: x[:, ::2],
    lambda x: x[:, :, ::2, 1::2],
    lambda x: torch.cat([x[:, :1], x], 1),
    lambda x: torch.cat([x, x + x.new_tensor([0, 0, 0.5] + [0] * 13)], 3),
    lambda x: torch.cat([x, x.flip(1)], 1),
    lambda x: x.unfold(1, 2, 1).movedim(-1, 2).flatten(0, 1),
    lambda x: x.flatten(0, 1).unsqueeze(1),
    lambda x: x.unflatten(3, (2, -1)).movedim(3, 1).flatten(0, 1),
    lambda x: torch.where(x[:, :1, :1, :1, 5:6] > 0, x.transpose(2, 3), x)
    if x.shape[2] == x.shape[3] else x,
]  # fmt: skip
"""(B, T, H, W, C) to another grid."""

FLATTEN: list[Step] = [
    *(
        lambda x, order=order: x.permute(0, *order, 4).flatten(1, 3)
        for order in itertools.permutations((1, 2, 3))
    ),
    lambda x: x.unflatten(3, (2, -1)).transpose(2, 3).flatten(1, 4),
    lambda x: x.unflatten(2, (2, -1)).unflatten(4, (2, -1)).transpose(3, 4).flatten(1, 5),
    lambda x: torch.cat([x[:, t].flip(1).flatten(1, 2) for t in range(x.shape[1])], 1),
]
"""(B, T, H, W, C) to (B, N, C)."""


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
