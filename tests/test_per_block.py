"""Models without `compile_repeated_blocks`: `block.compile()` on each block, and the true grids."""

from __future__ import annotations

from typing import Any

import pytest
from small_transformers import EXACT, QUICK, Grid, distance, run, run_uniform

import veda_compile
from benchmarks.zoo import entry

pytestmark = pytest.mark.usefixtures("fresh_compiler")

LANDSCAPE, PORTRAIT = (5, 6, 10), (5, 10, 6)
OPTIONS: dict[str, Any] = {**QUICK, "density": 0.3}


def by_hand(name: str, model: Any, inputs: dict[str, Any], grid: Grid) -> Any:
    known = entry(name)
    return run_uniform(model, inputs, known.layouts(grid)[0], known.layers)


@pytest.mark.parametrize("name", ["allegro", "easyanimate", "cosmos", "mochi"])
def test_a_flip_reuses_the_blocks_with_the_other_grid(name: str) -> None:
    """Allegro has one position input per axis; Mochi's positions tell no grid at all."""
    known = entry(name)
    model, _ = known.make(LANDSCAPE)
    inputs = {grid: known.make(grid)[1] for grid in (LANDSCAPE, PORTRAIT)}
    wanted = {grid: by_hand(name, model, inputs[grid], grid) for grid in inputs}
    if name == "mochi":
        veda_compile.attach(model)
    for blocks in known.blocks:
        for block in model.get_submodule(blocks):  # type: ignore[union-attr]
            block.compile(backend="veda", options=OPTIONS)
    with known.settings():
        for grid in (LANDSCAPE, PORTRAIT, LANDSCAPE):
            assert distance(run(model, inputs[grid]), wanted[grid]) <= EXACT, grid
    grids = {tuple(g) for site in veda_compile.report().sites for g in site.grids}
    assert grids == {LANDSCAPE, PORTRAIT}


def test_positions_that_mix_their_axes_are_not_taken_for_text() -> None:
    known = entry("mochi")
    model, inputs = known.make(LANDSCAPE)
    for block in model.transformer_blocks:  # type: ignore[union-attr]
        block.compile(backend="veda", options=OPTIONS)
    with known.settings():
        run(model, inputs)
    sites = veda_compile.report().sites
    assert {site.reason for site in sites} == {"NO_GRID"}
    assert all("veda_compile.attach" in str(site.remedy) for site in sites)
