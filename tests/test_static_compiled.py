"""Compiled models under sidecars with static heads and factors: every layer has its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from distinct_sidecars import distinct_plans, layer_card
from small_transformers import (
    EXACT,
    QUICK,
    Grid,
    distance,
    run,
    run_by_hand,
    wan,
    wan_inputs,
)
from torch._dynamo.utils import counters

import veda_compile
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.static_modes import StaticMode, mode_density
from veda_compile.sidecar import GridPlan, ModelCard, Sidecar

NAME = "model.veda.safetensors"
DIAGONAL, FRAMES = StaticMode("diagonal", (2, 0)), StaticMode("multi_diagonal", (1, 0))
STRIPE = StaticMode("stripe", columns=((0.0, 0.5, 0.7), (0.5, 0.0, 0.0)))
LAYERS = [f"blocks.{i}.attn1" for i in range(3)]


SQUARE: Grid = (4, 8, 12)


FLIPPED: Grid = (4, 12, 8)


@pytest.fixture
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    veda_compile.reset_report()
    yield
    torch.compiler.reset()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixed_plans(score: str) -> list[Plan]:
    """Layer 0 has no static head, 1 one stripe, 2 none but static ones; ranks 2, none and 3."""
    layers = [(None, None), (None, STRIPE), (DIAGONAL, FRAMES)]
    ranks = (2, None, 3)
    plans = []
    for place, plan in enumerate(distinct_plans(3)):
        projection = 0.3 * normal(2, 2, 72, 24, seed=place) if score == "projection" else None
        rank = ranks[place]
        # large, so that they matter next to projections
        weights = None if rank is None else 9.0 * normal(2, 2, 24, rank, seed=place + 9)
        plans.append(
            Plan(plan.tile_shapes, plan.density, score, projection, weights, layers[place])
        )
    return plans


def saved(path: Path, model: Any, plans: list[Plan]) -> str:
    shapes = tuple(plan.tile_shapes for plan in plans)
    density = tuple(plan.density for plan in plans)
    made = Sidecar(
        ModelCard(type(model).__name__, tuple(layer_card(model, name, 24) for name in LAYERS)),
        (GridPlan(SQUARE, shapes, density, tuple(plan.modes for plan in plans)),),
        plans[0].score,
        64,
        projections=tuple(plan.projection for plan in plans if plan.projection is not None),
        factors=tuple(plan.factors for plan in plans),
    )
    made.save(path)
    return str(path)


def by_hand(model: Any, plans: list[Plan], grid: Grid) -> torch.Tensor:
    named = dict(zip(LAYERS, plans, strict=True))
    return run_by_hand(model, wan_inputs(grid), Layout.of(Video(*grid)), named)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("score", ["closed_form", "projection"])
@pytest.mark.parametrize("how", ["whole", "regional"])
def test_every_layer_of_a_compiled_model_has_its_own(tmp_path: Path, how: str, score: str) -> None:
    model, plans = wan(layers=3), mixed_plans(score)
    options = {**QUICK, "sidecar": saved(tmp_path / NAME, model, plans)}
    wanted = {grid: by_hand(model, plans, grid) for grid in (SQUARE, FLIPPED)}
    scored = [dataclasses.replace(plan, modes=None) for plan in plans]
    plain = [dataclasses.replace(plan, factors=None) for plan in plans]
    for wrong in (scored, plain):
        assert distance(by_hand(model, wrong, SQUARE), wanted[SQUARE]) > 100 * EXACT
    call = model
    if how == "whole":
        call = torch.compile(model, backend="veda", options=options, dynamic=True)
    else:
        model.compile_repeated_blocks(backend="veda", options=options)
    made = []
    for grid, right in [*wanted.items(), (SQUARE, wanted[SQUARE])]:
        assert distance(run(call, wan_inputs(grid)), right) <= EXACT
        made.append(counters["stats"]["unique_graphs"])
    # whole models are compiled twice by torch itself, however many resolutions follow
    assert made == ([1, 2, 2] if how == "whole" else [1, 1, 1])


@pytest.mark.usefixtures("fresh")
def test_the_report_tells_what_static_heads_keep(tmp_path: Path) -> None:
    model, plans = wan(layers=3), mixed_plans("closed_form")
    options = {**QUICK, "sidecar": saved(tmp_path / NAME, model, plans)}
    run(torch.compile(model, backend="veda", options=options), wan_inputs(SQUARE))
    layout, last = Layout.of(Video(*SQUARE)), plans[2]
    kept = [mode_density(layout, last.tile_shapes[i], mode) for i, mode in enumerate(last.modes)]
    site = veda_compile.report().to_dict()["graphs"][0]["sites"]
    found = {layer: s["density"] for s in site for layer in s["layers"]}
    assert found[LAYERS[2]] == pytest.approx(fmean(kept))


@pytest.mark.usefixtures("fresh")
def test_a_compiled_model_at_density_one_is_dense(tmp_path: Path) -> None:
    model, plans = wan(layers=3), mixed_plans("closed_form")
    options = {**QUICK, "sidecar": saved(tmp_path / NAME, model, plans), "density": 1.0}
    dense = run(model, wan_inputs(SQUARE))
    model.compile_repeated_blocks(backend="veda", options=options)
    assert distance(run(model, wan_inputs(SQUARE)), dense) <= EXACT


@pytest.mark.usefixtures("fresh")
def test_inductor_takes_the_added_inputs(tmp_path: Path) -> None:
    model, plans = wan(layers=3), mixed_plans("closed_form")
    options = {"min_tokens": 0, "sidecar": saved(tmp_path / NAME, model, plans)}
    wanted = by_hand(model, plans, SQUARE)
    model.compile_repeated_blocks(backend="veda", options=options)
    assert distance(run(model, wan_inputs(SQUARE)), wanted) <= 2 * EXACT
