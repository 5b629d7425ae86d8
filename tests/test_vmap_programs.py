"""Random video programs with torch.vmap in them: sparse on the true grid and order, or dense."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled
from random_moves import FLATTEN, GRIDDED, SEQUENCE, Step
from random_programs import Program
from test_soundness_programs import check
from torch import Tensor
from toys import latents, toy

import veda_compile

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


def pairs_of(count: int) -> Callable[[Tensor], Tensor]:
    """Looks at every pair of the first `count` tokens, by vmap within vmap."""

    def apply(x: Tensor) -> Tensor:
        first = x[0, 0, :count, 0].clamp(0.0, 0.0)
        sums = torch.vmap(lambda i: torch.vmap(lambda j: i + j)(first))(first)
        return x + sums.sum()

    return apply


@pytest.mark.parametrize(("count", "told"), [(60, False), (70, True)])
def test_slices_of_several_levels_multiply(count: int, told: bool) -> None:
    """All pairs of a sequence would take its length squared to follow: 4,096 are the most."""
    attend, apply = F.scaled_dot_product_attention, pairs_of(count)
    fn = compiled(toy(lambda q, k, v: attend(apply(q), apply(k), v), 1))
    with torch.no_grad():
        fn(latents((5, 6, 10)))
    (graph,) = veda_compile.report().graphs
    assert ("add (more than 4096 slices)" in graph.unknown) is told
