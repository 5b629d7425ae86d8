"""Plans from a sidecar: exact and nearest grids, and densities for another budget."""

from __future__ import annotations

import dataclasses
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sidecar_samples import FIRST, GRID, WIDE, small_sidecar

from veda_compile.errors import SidecarError
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.plan import least_padding_shape, padding
from veda_compile.kernels.static_modes import StaticMode, mode_density
from veda_compile.sidecar import GridPlan, LayerCard, ModelCard, Sidecar
from veda_compile.sidecar_lookup import GridMatch, density_factor, nearest_grid


def test_exact_plan_of_the_right_layer() -> None:
    made = small_sidecar()
    for plan in made.plans:
        for index, card in enumerate(made.model.layers):
            found, match = made.plan_for(card.name, plan.grid)
            assert match == GridMatch(True, plan.grid)
            assert found.tile_shapes == plan.tile_shapes[index]
            assert found.density == plan.density[index]
            assert (found.score, found.projection) == ("closed_form", None)


def test_projection_of_the_right_layer_and_other_scores() -> None:
    made = small_sidecar("projection")
    for card, projection in zip(made.model.layers, made.projections, strict=True):
        plan, _ = made.plan_for(card.name, GRID)
        assert plan.score == "projection" and plan.projection is not None
        assert torch.equal(plan.projection, projection)
        plan.check(card.heads, card.head_dim)
    plan, _ = made.plan_for(FIRST, GRID, score="mean")
    assert (plan.score, plan.projection) == ("mean", None)
    with pytest.raises(SidecarError, match="holds no projections"):
        small_sidecar().plan_for(FIRST, GRID, score="projection")
    with pytest.raises(SidecarError, match="'best'"):
        made.plan_for(FIRST, GRID, score="best")


def test_nearest_grid_is_announced() -> None:
    plan, match = small_sidecar().plan_for(FIRST, (9, 8, 50))
    assert match == GridMatch(False, WIDE)
    assert plan.tile_shapes[0] == (1, 2, 64)


@pytest.mark.parametrize(
    ("grid", "known", "used"),
    [
        # aspect ratio before everything else
        ((21, 30, 52), [(21, 52, 30), (5, 15, 26)], (5, 15, 26)),
        # wider and narrower by the same factor are equally far: the nearest length decides
        ((5, 10, 10), [(5, 5, 10), (6, 20, 10)], (5, 5, 10)),
        # same aspect ratio, of different sizes: nearest length
        ((21, 45, 80), [(21, 90, 160), (21, 27, 48), (5, 45, 80)], (21, 27, 48)),
        # same aspect ratio and length: nearest number of frames
        ((8, 8, 8), [(128, 2, 2), (2, 16, 16), (8, 16, 16)], (2, 16, 16)),
        # all equal: the smaller one, whatever the order
        ((4, 4, 4), [(8, 4, 4), (2, 4, 4)], (2, 4, 4)),
    ],
)
def test_nearest_grid(
    grid: tuple[int, int, int],
    known: list[tuple[int, int, int]],
    used: tuple[int, int, int],
) -> None:
    assert nearest_grid(grid, known) == GridMatch(False, used)
    assert nearest_grid(grid, known[::-1]) == GridMatch(False, used)
    assert nearest_grid(grid, [*known, grid]) == GridMatch(True, grid)


def test_an_unknown_layer_is_refused() -> None:
    with pytest.raises(SidecarError, match=r"'block\.0\.attn1' \(did you mean 'blocks\.0\.attn1'"):
        small_sidecar().plan_for("block.0.attn1", GRID)


@pytest.mark.parametrize("grid", [(5, 16), (5, 16, 0), (5, 16, 2.0), [5, 16, 24]])
def test_a_bad_grid_is_refused(grid: tuple[int, int, int]) -> None:
    with pytest.raises(SidecarError, match="grid"):
        small_sidecar().plan_for(FIRST, grid)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan"), True, "0.2"])
def test_a_bad_density_is_refused(density: float) -> None:
    with pytest.raises(SidecarError, match=f"{density}.*above 0 and at most 1"):
        small_sidecar().plan_for(FIRST, GRID, density=density)


def test_density_is_the_mean_over_all_layers_and_keeps_ratios() -> None:
    made = small_sidecar()
    plans = [made.plan_for(card.name, GRID, density=0.4)[0] for card in made.model.layers]
    assert fmean([*plans[0].density, *plans[1].density]) == pytest.approx(0.4)
    assert plans[0].density == pytest.approx((0.2, 0.4, 0.6))
    assert plans[1].density == pytest.approx((0.8, 0.1, 0.3))
    assert plans[0].tile_shapes == made.plans[0].tile_shapes[0]


def test_heads_that_are_full_give_their_rest_to_the_others() -> None:
    made = small_sidecar()
    plans = [made.plan_for(card.name, WIDE, density=0.75)[0] for card in made.model.layers]
    values = [*plans[0].density, *plans[1].density]
    assert fmean(values) == pytest.approx(0.75)
    assert max(values) == 1.0
    assert values[1] / values[0] == pytest.approx(2.0)
    full = made.plan_for(FIRST, WIDE, density=1.0)[0]
    assert full.density == (1.0, 1.0, 1.0)


def test_without_a_density_nothing_is_rescaled() -> None:
    made = small_sidecar()
    uneven = dataclasses.replace(made, plans=made.plans[1:])
    assert uneven.plan_for(FIRST, GRID)[0].density == (0.1, 0.2, 0.3)


@given(
    st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=40),
    st.floats(1e-4, 1.0),
)
def test_density_factor_meets_the_mean(densities: list[float], mean: float) -> None:
    factor = density_factor(densities, mean)
    assert fmean(min(1.0, factor * value) for value in densities) == pytest.approx(mean, rel=1e-9)


def test_tiles_that_do_not_fit_an_unknown_grid_are_replaced() -> None:
    """(4, 4, 4) boxes fit 4 x 8 x 24 and pad 5 frames of 7 x 7 to twice the tokens."""
    shapes, modes = ((4, 4, 4), (1, 8, 8)), (StaticMode("diagonal", (1, 0)),) * 2
    plan = GridPlan((4, 8, 24), (shapes,), ((0.3, 0.2),), (modes,))
    made = Sidecar(ModelCard("Model", (LayerCard("a", 2, 16),)), (plan,), "closed_form", 64)
    exact, match = made.plan_for("a", (4, 8, 24))
    assert match.exact and (exact.tile_shapes, exact.modes) == (shapes, modes)
    found, match = made.plan_for("a", (5, 7, 7))
    layout = Layout.of(Video(5, 7, 7))
    assert not match.exact
    # of one frame, or of all rows or columns: the others pad more than 1.35
    assert padding(layout, (4, 4, 4)) > 1.35 >= padding(layout, found.tile_shapes[0])
    assert found.tile_shapes[1] == (1, 8, 8)
    assert found.modes == (None, modes[1]) and found.density == (0.3, 0.2)


def test_static_heads_count_what_their_padding_costs() -> None:
    """So that all heads keep the density asked for, as shares of a grid without padding."""
    grid, shape = (5, 9, 13), (2, 4, 8)
    mode = StaticMode("diagonal", (1, 0))
    plan = GridPlan(grid, ((shape, shape),), ((0.3, 0.3),), ((None, mode),))
    made = Sidecar(ModelCard("Model", (LayerCard("a", 2, 16),)), (plan,), "closed_form", 64)
    found, _ = made.plan_for("a", grid, density=0.4)
    layout = Layout.of(Video(*grid))
    static = mode_density(layout, shape, mode) * padding(layout, shape) ** 2
    assert padding(layout, shape) > 1.2
    assert (found.density[0] + static) / 2 == pytest.approx(0.4)


def test_replaced_tiles_resemble_those_they_replace() -> None:
    """12 rows of 20 columns hold no boxes of 16 columns; 16 frames of them hold flat ones."""
    shapes = ((1, 4, 16), (16, 1, 4))
    plan = GridPlan((16, 16, 16), (shapes,), ((0.2,) * 2,))
    made = Sidecar(ModelCard("Model", (LayerCard("a", 2, 16),)), (plan,), "closed_form", 64)
    found, _ = made.plan_for("a", (16, 12, 20))
    assert found.tile_shapes == ((2, 4, 8), (16, 1, 4))
    assert least_padding_shape(Layout.of(Video(16, 12, 20)), 64) != (2, 4, 8)


def test_static_heads_that_keep_too_much_of_another_grid_become_scored() -> None:
    """A window of 12 tiles is a third of 64 tiles and most of 32."""
    shape = (2, 4, 8)
    wide, narrow = StaticMode("diagonal", (12, 0)), StaticMode("diagonal", (0, 0))
    plan = GridPlan((8, 16, 32), ((shape,) * 3,), ((0.1, 0.3, 0.02),), ((None, wide, narrow),))
    made = Sidecar(ModelCard("Model", (LayerCard("a", 3, 16),)), (plan,), "closed_form", 64)
    exact, _ = made.plan_for("a", (8, 16, 32), density=0.2)
    assert exact.modes == (None, wide, narrow)
    found, match = made.plan_for("a", (4, 16, 32), density=0.25)
    layout = Layout.of(Video(4, 16, 32))
    assert not match.exact and mode_density(layout, shape, wide) > 0.6
    assert found.modes == (None, None, narrow)
    scored = found.density[0] + found.density[1]
    assert (scored + mode_density(layout, shape, narrow)) / 3 == pytest.approx(0.25)
    assert found.density[1] / found.density[0] == pytest.approx(3.0)


def test_static_heads_become_scored_on_grids_of_another_size() -> None:
    """Three times the tiles make another window of one that was measured; a plan that was asked to
    be static stays so."""
    shape, mode = (2, 4, 8), StaticMode("diagonal", (1, 0))
    card = ModelCard("Model", (LayerCard("a", 2, 16),))
    for modes, there in (((None, mode), None), ((mode, mode), (mode, mode))):
        plan = GridPlan((4, 8, 16), ((shape,) * 2,), ((0.3, 0.4),), (modes,))
        made = Sidecar(card, (plan,), "closed_form", 64)
        assert made.plan_for("a", (8, 8, 16))[0].modes == modes
        assert made.plan_for("a", (12, 8, 16))[0].modes == there
