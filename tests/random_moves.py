"""Ways to move the tokens of a video about, as sequences and on their grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[Tensor], Tensor]


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
