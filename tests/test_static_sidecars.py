"""Sidecars with static heads and factors: files, and plans for another density."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from sidecar_samples import FIRST, GRID, WIDE, file_parts, small_sidecar, write_parts
from typer.testing import CliRunner

from veda_compile.cli import app
from veda_compile.errors import SidecarError
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.plan import padding
from veda_compile.kernels.static_modes import StaticMode, mode_density
from veda_compile.sidecar import GridPlan, Sidecar

NAME = "model.veda.safetensors"
DIAGONAL, SKIP, FULL = StaticMode("diagonal", (2, 0)), StaticMode("skip"), StaticMode("full")
FRAMES = StaticMode("multi_diagonal", (1, 0))
STRIPE = StaticMode("stripe", columns=((0.0, 0.5, 0.7), (0.5, 0.0, 0.0)))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixed_sidecar(score: str = "closed_form") -> Sidecar:
    """Static heads in one layer on the first grid and in both on the second; factors in one."""
    made = small_sidecar(score)
    first, second = made.plans
    plans = (
        dataclasses.replace(first, modes=((None, DIAGONAL, None), None)),
        dataclasses.replace(second, modes=((SKIP, None, FRAMES), (STRIPE, None, None))),
    )
    factors = () if score == "mean" else (None, normal(2, 3, 8, 4))
    return dataclasses.replace(made, plans=plans, factors=factors)


@pytest.mark.parametrize("score", ["closed_form", "mean", "projection"])
def test_round_trip_is_exact(tmp_path: Path, score: str) -> None:
    made = mixed_sidecar(score)
    made.save(tmp_path / NAME)
    read = Sidecar.load(tmp_path / NAME)
    assert read.plans == made.plans and read.model == made.model
    assert len(read.factors) == len(made.factors)
    if made.factors:
        assert read.factors[0] is None and torch.equal(read.factors[1], made.factors[1])
    assert read.columns == made.columns == 2
    _, tensors = file_parts(tmp_path / NAME)
    assert f"{FIRST}/modes" in tensors and f"{FIRST}/columns" not in tensors
    assert tensors["blocks.1.attn1/columns"].shape == (2, 3, 2, 3)


def test_a_sidecar_without_static_heads_has_no_such_tensors(tmp_path: Path) -> None:
    none = ((None,) * 3, (None,) * 3)
    made = small_sidecar()
    plans = tuple(dataclasses.replace(plan, modes=none) for plan in made.plans)
    made = dataclasses.replace(made, plans=plans, factors=(None, None))
    made.save(tmp_path / NAME)
    assert {name.split("/")[1] for name in file_parts(tmp_path / NAME)[1]} == {
        "tile_shapes", "density",
    }  # fmt: skip
    assert Sidecar.load(tmp_path / NAME).plans == small_sidecar().plans
    assert (made.columns, made.plans[0].modes) == (None, None)


def test_plans_of_the_right_layer_and_grid() -> None:
    made = mixed_sidecar("projection")
    for plan in made.plans:
        for index, card in enumerate(made.model.layers):
            found, _ = made.plan_for(card.name, plan.grid)
            assert found.modes == plan.modes_of(index)
            assert found.factors is made.factors[index]
            found.check(card.heads, card.head_dim)
    assert made.plan_for("blocks.1.attn1", GRID, score="closed_form")[0].factors is not None
    assert made.plan_for("blocks.1.attn1", GRID, score="mean")[0].factors is None


def static_cost(grid: tuple[int, int, int], shape: tuple[int, int, int]) -> float:
    """What a diagonal head keeps, as a share of the tile pairs of a grid without padding."""
    layout = Layout.of(Video(*grid))
    return mode_density(layout, shape, DIAGONAL) * padding(layout, shape) ** 2


def test_another_density_leaves_static_heads_and_meets_the_mean() -> None:
    made = mixed_sidecar()
    static = static_cost(GRID, (1, 8, 16))
    plans = [made.plan_for(card.name, GRID, density=0.4)[0] for card in made.model.layers]
    values = [*plans[0].density, *plans[1].density]
    assert plans[0].modes == (None, DIAGONAL, None)
    values[1] = static
    assert fmean(values) == pytest.approx(0.4)
    assert values[2] / values[0] == pytest.approx(3.0)  # the ratios of scored heads stay
    # a grid that has no plan: static heads count with what they keep there
    other = (5, 16, 40)
    found = [made.plan_for(card.name, other, density=0.4)[0] for card in made.model.layers]
    values = [*found[0].density, *found[1].density]
    values[1] = static_cost(other, (1, 8, 16))
    assert values[1] != static and fmean(values) == pytest.approx(0.4)


def test_density_one_keeps_everything_in_static_heads_too() -> None:
    plan, _ = mixed_sidecar().plan_for(FIRST, WIDE, density=1.0)
    assert plan.modes is None and plan.density == (1.0, 1.0, 1.0)


def test_a_density_that_static_heads_forbid_is_refused() -> None:
    made = mixed_sidecar()
    full = dataclasses.replace(made.plans[0], modes=((FULL, FULL, None), None))
    half = dataclasses.replace(made, plans=(full,))
    with pytest.raises(SidecarError, match=r"0\.3 cannot be met .* 2 of 6 heads .* above 0\.5363"):
        half.plan_for(FIRST, GRID, density=0.3)
    skip = dataclasses.replace(made.plans[0], modes=((SKIP, SKIP, None), None))
    half = dataclasses.replace(made, plans=(skip,))
    with pytest.raises(SidecarError, match=r"0\.7 cannot be met .* at most 0\.6667, or 1\.0"):
        half.plan_for(FIRST, GRID, density=0.7)
    assert half.plan_for(FIRST, GRID, density=4 / 6)[0].density[2] == 1.0
    everyone = dataclasses.replace(made.plans[0], modes=((SKIP,) * 3, (DIAGONAL,) * 3))
    with pytest.raises(SidecarError, match=r"6 of 6 heads .* give none, or 1\.0"):
        dataclasses.replace(made, plans=(everyone,)).plan_for(FIRST, GRID, density=0.2)


def test_static_heads_alone_are_taken_where_they_all_but_keep_the_density() -> None:
    made = mixed_sidecar()
    shapes = made.plans[0].tile_shapes[0]
    everyone = dataclasses.replace(
        made.plans[0], tile_shapes=(shapes,) * 2, modes=((SKIP,) * 3, (DIAGONAL,) * 3)
    )
    static = dataclasses.replace(made, plans=(everyone,))
    kept = sum(static_cost(GRID, shape) for shape in shapes) / 6
    for density in (kept, 1.03 * kept):
        plan, _ = static.plan_for(FIRST, GRID, density=density)
        assert plan.modes == (SKIP,) * 3
    for density in (0.98 * kept, 1.2 * kept):
        with pytest.raises(SidecarError, match="cannot be met"):
            static.plan_for(FIRST, GRID, density=density)


def test_layer_independent_sees_modes_and_factors() -> None:
    made = small_sidecar()
    plan = made.plans[0]
    alike = GridPlan(GRID, plan.tile_shapes[:1] * 2, plan.density[:1] * 2)
    made = dataclasses.replace(made, plans=(alike,))
    assert made.layer_independent

    def remade(modes: Any = None, factors: Any = ()) -> Sidecar:
        plans = (dataclasses.replace(alike, modes=modes),)
        return dataclasses.replace(made, plans=plans, factors=factors)

    mixed, factors = (None, SKIP, STRIPE), normal(2, 3, 8, 2)
    assert remade((mixed, mixed), (factors, factors.clone())).layer_independent
    assert not remade((mixed, None)).layer_independent
    assert not remade(factors=(factors, None)).layer_independent
    assert not remade(factors=(None, factors)).layer_independent
    assert not remade(factors=(factors, 2 * factors)).layer_independent


def modes(*layers: Any) -> Callable[[], Sidecar]:
    plan = small_sidecar().plans[0]
    return lambda: dataclasses.replace(
        small_sidecar(), plans=(dataclasses.replace(plan, modes=layers),)
    )


def factors(*layers: Any, score: str = "closed_form") -> Callable[[], Sidecar]:
    return lambda: dataclasses.replace(small_sidecar(score), factors=layers)


INVALID = {
    "modes-layers": (modes((SKIP,) * 3), "modes for 1 layers and tile shapes for 2"),
    "modes-heads": (modes((SKIP,) * 2, None), "2 modes for 3 heads"),
    "modes-text": (modes(("skip",) * 3, None), "'skip': must be a StaticMode"),
    "modes-number": (modes(3, None), "StaticMode or None per layer and head"),
    "factors-layers": (factors(normal(2, 3, 8, 2)), "factors for 1 of 2 layers"),
    "factors-mean": (factors(None, normal(2, 3, 8, 2), score="mean"), "score 'mean'"),
    "factors-rank": (factors(normal(2, 3, 8, 9), None), "r from 1 to 8"),
    "factors-rank-0": (factors(normal(2, 3, 8, 0), None), "r from 1 to 8"),
    "factors-heads": (factors(None, normal(2, 4, 8, 2)), "must be torch.float32 of shape (2, 3, 8"),
    "factors-dtype": (factors(normal(2, 3, 8, 2).half(), None), "torch.float16"),
    "factors-nan": (factors(torch.full((2, 3, 8, 2), torch.nan), None), "NaN or infinity"),
    "factors-text": (factors("F", None), "'F': must be a Tensor"),
}


@pytest.mark.parametrize(("make", "named"), INVALID.values(), ids=INVALID)
def test_invalid_sidecars_cannot_be_made(make: Callable[[], Sidecar], named: str) -> None:
    with pytest.raises(SidecarError) as caught:
        make()
    assert named in str(caught.value) and "\n" not in str(caught.value)


MODES, COLUMNS, FACTORS = (f"blocks.1.attn1/{x}" for x in ("modes", "columns", "factors"))
BAD_FILES: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], str]] = {
    "static-int": (lambda d, _: d.update(static=1), "static of layer blocks.1.attn1 is 1"),
    "static-false": (lambda d, _: d.update(static=False), "columns of layer blocks.1.attn1 is 2"),
    "columns-65": (lambda d, _: d.update(columns=65), "must be an int from 0 to 64"),
    "columns-1": (lambda d, _: d.update(columns=1), "must be (2, 3, 1, 3)"),
    "rank-9": (lambda d, _: d.update(rank=9), "rank of layer blocks.1.attn1 is 9"),
    "rank-3": (lambda d, _: d.update(rank=3), "must be (2, 3, 8, 3)"),
    "rank-0": (lambda d, _: d.update(rank=0), f"unknown tensor '{FACTORS}'"),
    "no-static": (lambda d, _: d.pop("static"), "'static'"),
    "no-modes": (lambda _, t: t.pop(MODES), f"'{MODES}' is missing"),
    "no-columns": (lambda _, t: t.pop(COLUMNS), f"'{COLUMNS}' is missing"),
    "no-factors": (lambda _, t: t.pop(FACTORS), f"'{FACTORS}' is missing"),
    "modes-int64": (lambda _, t: t.update({MODES: t[MODES].long()}), "dtype 'I64'"),
    "kind-7": (
        lambda _, t: t[MODES][1, 0, 0].fill_(7),
        "attn1 on grid (5, 8, 48): mode 7",
    ),
    "reach": (lambda _, t: t[MODES][1, 0, 1].fill_(4), "(4, 0) of mode 'stripe'"),
    "column-2": (lambda _, t: t[COLUMNS][1, 0, 0, 0].fill_(2.0), "(2.0, 0.5"),
    "column-nan": (lambda _, t: t[COLUMNS][1, 0, 0, 0].fill_(torch.nan), "nan"),
    "column-of-scored": (lambda _, t: t[COLUMNS][1, 1].fill_(0.5), "of a scored head"),
    "factors-nan": (lambda _, t: t[FACTORS][0, 0, 0, 0].fill_(torch.nan), "NaN or infinity"),
}


@pytest.mark.parametrize(("change", "named"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path: Path, change: Callable[..., Any], named: str) -> None:
    path = tmp_path / NAME
    mixed_sidecar().save(path)
    document, tensors = file_parts(path)
    change(document["model"]["layers"][1], tensors)
    write_parts(path, document, tensors)
    with pytest.raises(SidecarError) as caught:
        Sidecar.load(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and named in message


def test_inspect_shows_modes_and_ranks(tmp_path: Path) -> None:
    mixed_sidecar().save(tmp_path / NAME)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / NAME)], env={"COLUMNS": "200"})
    for text in ("scored: 3, skip: 1, multi_diagonal: 1, stripe: 1", "diagonal: 1",
                 "none in 1 layers, 4 in 1 layers"):  # fmt: skip
        assert text in shown.stdout
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / NAME), "--json"])
    facts = json.loads(result.stdout)
    assert facts["factor_ranks"] == [None, 4]
    assert facts["grids"][0]["modes"] == {"scored": 5, "diagonal": 1}
    static = mode_density(Layout.of(Video(*GRID)), (1, 8, 16), DIAGONAL)
    assert facts["grids"][0]["layer_density"][0] == pytest.approx((0.1 + static + 0.3) / 3)
    assert facts["grids"][1]["density"]["min"] == 0.0
