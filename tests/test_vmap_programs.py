"""Random video programs with torch.vmap in them: sparse on the true grid and order, or dense."""

from __future__ import annotations

import random

import pytest
import torch
from random_moves import FLATTEN, GRIDDED, SEQUENCE, Step
from random_programs import Program
from test_soundness_programs import check
from torch import Tensor

pytestmark = pytest.mark.usefixtures("fresh_compiler")

PROGRAMS = 12


def write_rolled(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, 1:].copy_(y[:, :-1].clone())
    return y


def write_everywhere(y: Tensor) -> Tensor:
    y.copy_(y.flip(1))
    return y * 1.0


INSIDE: list[Step] = [
    lambda y: y,
    lambda y: y * 1.0 + 0.0,
    lambda y: y.flip(1),
    lambda y: y.roll(1, 2),
    lambda y: y.transpose(1, 2) if y.shape[1] == y.shape[2] else y,
    lambda y: torch.cat([y[:, 1:], y[:, :1]], 1),
    lambda y: y + y.mean(1, keepdim=True) * 0,
    lambda y: y.sum(2, keepdim=True).expand_as(y),
    lambda y: torch.stack(y.unbind(1), 1),
    lambda y: y[:, ::2],
    write_rolled, write_everywhere,
]  # fmt: skip
"""(B, S, S', C) to the same or fewer, where one of the sides of a grid is hidden."""


def over_a_side(draw: random.Random) -> Step:
    """(B, T, H, W, C) to another grid: one side hidden, and given back there or elsewhere."""
    side, inside = draw.choice([1, 2, 3]), draw.choice(INSIDE)
    back = side if draw.random() < 0.7 else draw.choice([1, 2, 3])

    def step(x: Tensor) -> Tensor:
        x = x.clone()
        y = torch.vmap(inside, in_dims=side, out_dims=back)(x)
        return x if inside is write_everywhere else y

    return step


def over_samples(step: Step) -> Step:
    """A (B, ...) step, sample by sample."""
    return lambda s: torch.vmap(lambda y: step(y.unsqueeze(0)).squeeze(0))(s)


def over_features(step: Step) -> Step:
    """A (B, N, C) step, feature by feature."""
    return lambda s: torch.vmap(lambda y: step(y.unsqueeze(-1)).squeeze(-1), in_dims=2, out_dims=2)(
        s
    )


def over_samples_and_tokens(step: Step) -> Step:
    """A (B, N, C) step sample by sample, then something token by token inside two of them."""
    by_token = torch.vmap(torch.vmap(lambda y: y * 1.0), in_dims=0)
    return lambda s: by_token(over_samples(step)(s))


class Mapped(Program):
    """A random program some of whose steps are under vmap."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        draw = random.Random(seed + 1000)
        if draw.random() < 0.6:
            self.on_grid = over_a_side(draw)
        elif draw.random() < 0.5:
            self.on_grid = over_samples(draw.choice(GRIDDED))
        around = draw.choice([over_samples, over_features, over_samples_and_tokens])
        simple = draw.random() < 0.6
        self.on_tokens = around(SEQUENCE[0] if simple else draw.choice(SEQUENCE))
        self.flatten = over_samples(draw.choice(FLATTEN) if draw.random() < 0.3 else FLATTEN[0])
        if self.on_heads is not None:
            self.on_heads = over_samples(self.on_heads)


def test_random_programs_with_vmap_are_sparse_on_the_true_grid_or_dense() -> None:
    sites = [site for seed in range(PROGRAMS) for site in check(Mapped(seed))]
    assert sum(site.rewritten for site in sites) > PROGRAMS // 8
    assert sum(not site.rewritten for site in sites) > PROGRAMS // 8
