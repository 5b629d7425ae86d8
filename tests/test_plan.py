import math

import pytest
import torch

from veda_compile.kernels.errors import PlanError
from veda_compile.kernels.layout import Extra, Layout, Video
from veda_compile.kernels.plan import (
    Plan,
    count_tiles,
    factorisations,
    ideal_tiles,
    least_padding_shape,
)


def test_uniform_and_groups():
    plan = Plan.uniform(3, (1, 8, 8), 0.25)
    assert (plan.heads, plan.tile_size, plan.score) == (3, 64, "closed_form")
    mixed = Plan(((1, 8, 8), (4, 4, 4), (1, 8, 8)), (0.1, 0.2, 0.3))
    assert mixed.groups() == {(1, 8, 8): [0, 2], (4, 4, 4): [1]}
    assert list(mixed.groups()) == [(1, 8, 8), (4, 4, 4)]


@pytest.mark.parametrize(
    ("shapes", "density", "score", "message"),
    [
        ((), (), "mean", "at least one head"),
        (((1, 8, 8),), (0.1, 0.2), "mean", "2 densities for 1 heads"),
        (((1, 8),), (0.1,), "mean", "three sides"),
        (((0, 8, 8),), (0.1,), "mean", "three sides of at least 1"),
        (((1, 8, 8), (1, 8, 16)), (0.1, 0.1), "mean", r"\[64, 128\].*share one size"),
        (((1, 8, 8),), (0.0,), "mean", "density 0.0"),
        (((1, 8, 8),), (1.1,), "mean", "density 1.1"),
        (((1, 8, 8),), (math.nan,), "mean", "density nan"),
        (((1, 8, 8),), (0.1,), "best", "'best': must be one of closed_form"),
        (((1, 8, 8),), (0.1,), "projection", "do not go together"),
    ],
)
def test_plans_that_cannot_be(shapes, density, score, message):
    with pytest.raises(PlanError, match=message):
        Plan(shapes, density, score)


def test_projection_must_fit_heads_and_head_dim():
    shapes, density = ((1, 8, 8),) * 2, (0.1, 0.1)
    plan = Plan(shapes, density, "projection", torch.zeros(2, 2, 24, 8))
    plan.check(2, 8)
    with pytest.raises(PlanError, match="head_dim 8, the call has 16"):
        plan.check(2, 16)
    for wrong in ((2, 3, 24, 8), (1, 2, 24, 8), (2, 2, 16, 8), (2, 24, 8)):
        with pytest.raises(PlanError, match="projection of shape"):
            Plan(shapes, density, "projection", torch.zeros(wrong))
    with pytest.raises(PlanError, match="do not go together"):
        Plan(shapes, density, "mean", torch.zeros(2, 2, 24, 8))


def test_check_refuses_other_head_counts():
    with pytest.raises(PlanError, match="for 4 heads but the call has 2"):
        Plan.uniform(4, (1, 8, 8), 0.1).check(2, 64)


@pytest.mark.parametrize(("size", "number"), [(128, 36), (64, 28), (12, 18), (1, 1)])
def test_factorisations(size, number):
    found = factorisations(size)
    assert len(found) == len(set(found)) == number
    assert {math.prod(shape) for shape in found} == {size}


def test_tile_counts():
    assert count_tiles((5, 9, 16), (4, 4, 4)) == 2 * 3 * 4
    assert count_tiles((1, 1, 1), (4, 4, 8)) == 1
    assert ideal_tiles(Video(5, 9, 16), 64) == 12  # 720 tokens
    assert ideal_tiles(Video(1, 1, 1), 64) == 1


@pytest.mark.parametrize(
    ("layout", "size", "shape"),
    [
        (Layout.of(Video(4, 4, 4)), 64, (4, 4, 4)),
        (Layout.of(Video(1, 16, 16), Extra(7)), 64, (1, 8, 8)),  # (1, 4, 16) covers it as well
        (Layout.of(Video(1, 4, 4)), 8, (1, 2, 4)),  # as good as (1, 4, 2); longer along w
        (Layout.of(Video(64, 1, 1)), 64, (64, 1, 1)),
        (Layout.of(Video(1, 1, 1)), 64, (4, 4, 4)),
        (Layout.of(Video(8, 1, 2), Video(1, 1, 2)), 8, (4, 1, 2)),
    ],
)
def test_least_padding_shape(layout, size, shape):
    assert least_padding_shape(layout, size) == shape


def test_least_padding_shape_needs_the_fewest_tiles():
    layout = Layout.of(Video(5, 9, 13), Video(1, 9, 13))

    def tiles(shape):
        return sum(count_tiles(video.grid, shape) for _, video in layout.videos)

    assert tiles(least_padding_shape(layout, 128)) == min(map(tiles, factorisations(128)))
