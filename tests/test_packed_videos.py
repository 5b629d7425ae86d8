"""Sequences that hold several videos, and batches of samples made one by one.

Nothing but positions that the graph makes tells the grids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiling import run, sparse_calls
from torch import Tensor
from torch.fx.experimental import _config as symbols

import veda_compile
from benchmarks.zoo import entry
from benchmarks.zoo.measure import Setup, measure

pytestmark = pytest.mark.usefixtures("fresh_compiler")

Grid = tuple[int, int, int]
FIRST: Grid = (3, 4, 6)
SECOND: Grid = (2, 3, 4)
TURNED: Grid = (3, 6, 4)
CUBE: Grid = (4, 4, 4)
PADDING = 5
WEIGHT = torch.nn.Parameter(torch.eye(12), requires_grad=False)


def places(*grids: Grid) -> Tensor:
    """(N, 3) places of the tokens of videos behind each other, the frames counted on."""
    parts, frames = [], 0
    for t, h, w in grids:
        sides = (torch.arange(frames, frames + t), torch.arange(h), torch.arange(w))
        parts.append(torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).flatten(0, 2))
        frames += t
    return torch.cat(parts)


def padded(rows: Tensor, count: int) -> Tensor:
    """(N, 3) places with rows of zeros behind them."""
    return F.pad(rows, (0, 0, 0, count - rows.shape[0]))


def attend(x: Tensor, rows: Tensor, mask: Tensor | None = None) -> Tensor:
    """Self-attention of (B, N, 12) tokens turned by places (B, N, 3)."""
    angles = (rows[..., None] * torch.tensor([1.0, 0.1])).flatten(-2).unsqueeze(1)
    h = F.linear(x, WEIGHT).unsqueeze(1)
    a, b = h.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return F.scaled_dot_product_attention(turned, turned, h, mask)


def sequence(count: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, count, 12, generator=torch.Generator().manual_seed(2))


def packed(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Two videos and padding in every sample."""
    rows = [padded(places(FIRST, SECOND), x.shape[1]) for _ in range(x.shape[0])]
    return attend(x, torch.stack(rows), mask)


TOKENS = 72 + 24 + PADDING


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_videos_and_padding_behind_each_other(batch: int, masked: bool) -> None:
    x = sequence(TOKENS, batch)
    mask = (torch.arange(TOKENS) < TOKENS - PADDING).expand(batch, 1, 1, -1) if masked else None
    out, (site,) = run(packed, x, mask)
    assert site.layout == f"video 72 + video 24 + extra {PADDING}"
    torch.testing.assert_close(out, packed(x, mask), atol=2e-5, rtol=0.0)
    with sparse_calls() as calls:
        run(packed, x, mask, density=0.3)
    ((call, _),) = calls
    assert [video.grid for _, video in call.layout.videos] == [FIRST, SECOND]


def test_any_of_several_grids_may_be_named() -> None:
    x = sequence(TOKENS)
    for grid in (FIRST, SECOND):
        _, (site,) = run(packed, x, grid=grid)
        assert site.rewritten and site.layout == f"video 72 + video 24 + extra {PADDING}"
    _, (site,) = run(packed, x, grid=TURNED)
    assert site.reason == "GRID_CONTRADICTED"


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["joyimage edit plus", "joyimage edit plus reference"])
def test_packed_patches_of_a_real_model(name: str, batch: int) -> None:
    known = entry(name)
    outcome = measure(known, Setup(known.fit(FIRST), batch))
    assert outcome.problems == []
    assert (outcome.rewritten, outcome.wrong) == (known.sites, 0)


def one_by_one(*grids: Grid) -> Callable[[Tensor], Tensor]:
    """A batch whose samples have places of their own."""

    def model(x: Tensor) -> Tensor:
        return attend(x, torch.stack([places(grid) for grid in grids]))

    return model


def turned_cube(x: Tensor) -> Tensor:
    """Both samples are cubes, the second of them counted from another side."""
    second = places(CUBE).view(*CUBE, 3).transpose(0, 2).flatten(0, 2)
    return attend(x, torch.stack([places(CUBE), second]))


def half_placed(x: Tensor) -> Tensor:
    """The second sample has no positions."""
    return attend(x, torch.stack([places(FIRST), torch.zeros(72, 3, dtype=torch.long)]))


def placed_twice(x: Tensor) -> Tensor:
    """The second sample has positions on two grids."""
    return attend(x, torch.stack([places(FIRST), places(FIRST) + 7 * places(TURNED)]))


def placed_by_its_own_input(x: Tensor, rows: Tensor) -> Tensor:
    return attend(x, torch.stack([places(FIRST), rows]))


def dealt_out(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Places of both samples, put in order by an index tensor for each."""
    return attend(x, torch.stack([places(FIRST)[first], places(FIRST)[second]]))


STRAIGHT, BACKWARDS = torch.arange(72), torch.arange(72).flip(0)


@pytest.mark.parametrize(
    ("model", "batch", "rows"),
    [
        (one_by_one(FIRST, TURNED), 2, ()),
        (one_by_one(FIRST, FIRST, TURNED), 3, ()),
        (turned_cube, 2, ()),
        (half_placed, 2, ()),
        (placed_twice, 2, ()),
        (placed_by_its_own_input, 2, (places(FIRST),)),
        (dealt_out, 2, (STRAIGHT, BACKWARDS)),
        (dealt_out, 2, (STRAIGHT, STRAIGHT.clone())),  # nothing checks that the second stays so
    ],
    ids=["turned", "last turned", "cube", "half", "twice", "input", "backwards", "indexed"],
)
def test_samples_that_are_not_proven_alike(
    model: Callable[..., Tensor], batch: int, rows: tuple[Tensor, ...]
) -> None:
    x = sequence(64 if model is turned_cube else 72, batch)
    out, (site,) = run(model, x, *rows, density=0.3)
    assert site.reason == "TOKEN_ORDER"
    assert torch.equal(out, model(x, *rows))


def test_samples_that_are_proven_alike() -> None:
    with sparse_calls() as calls:
        run(one_by_one(FIRST, FIRST, FIRST), sequence(72, 3), density=0.3)
    assert [str(call.layout) for call, _ in calls] == ["[video 3x4x6]"]


def listed(*latents: Tensor) -> Tensor:
    """A batch made of a list of (1, 12, T, H, W) latents, without any positions."""
    tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in latents])
    h = F.linear(tokens, WEIGHT).unsqueeze(1)
    return F.scaled_dot_product_attention(h, h, h)


def sized(x: Tensor, *sizes: Tensor) -> Tensor:
    """Samples with the sides of `sizes`, whose values count for nothing."""
    return attend(x, torch.stack([places(tuple(size.shape)) for size in sizes]))


def latent(grid: Grid) -> Tensor:
    return torch.randn(1, 12, *grid, generator=torch.Generator().manual_seed(3))


def both(model: Callable[..., Tensor], first: Grid, second: Grid) -> list[Any]:
    """The arguments of two samples of these grids."""
    if model is listed:
        return [latent(first), latent(second)]
    return [sequence(72, 2), torch.empty(first), torch.empty(second)]


@pytest.mark.parametrize("model", [listed, sized])
@pytest.mark.parametrize("shared", [False, True])
def test_samples_of_equal_grids_whose_sizes_may_come_apart(
    model: Callable[..., Tensor], shared: bool
) -> None:
    """Unless equal sizes share a symbol, one graph serves samples of unequal grids."""
    fn = torch.compile(
        model, backend="veda", dynamic=True,
        options={"min_tokens": 0, "sidecar": None, "density": 0.3, "inner": "eager"},
    )  # fmt: skip
    with symbols.patch(use_duck_shape=shared), torch.no_grad(), sparse_calls() as calls:
        fn(*both(model, FIRST, FIRST))
        assert [str(call.layout) for call, _ in calls] == ["[video 3x4x6]"] * shared
        calls.clear()
        uneven = both(model, FIRST, TURNED)
        assert torch.equal(fn(*uneven), model(*uneven))
    assert calls == []
    assert {s.reason for s in veda_compile.report().sites if s.reason} == {"TOKEN_ORDER"}
