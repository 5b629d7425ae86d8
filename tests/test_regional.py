"""Regional compilation: few graphs serve all blocks and resolutions, each with its true grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import FAMILIES
from small_transformers import (
    EXACT,
    QUICK,
    Grid,
    Inputs,
    distance,
    run,
    run_uniform,
    wan,
    wan_inputs,
)
from torch._dynamo.utils import counters

import veda_compile
from veda_compile.kernels.layout import Layout, Video

pytestmark = pytest.mark.usefixtures("fresh_compiler")

OPTIONS: dict[str, Any] = {**QUICK, "density": 0.3}
LANDSCAPE, PORTRAIT = (4, 8, 12), (4, 12, 8)


def compiles() -> int:
    return int(counters["stats"]["unique_graphs"])


def sparse_sites() -> list[dict[str, Any]]:
    graphs = veda_compile.report().to_dict()["graphs"]
    return [s for graph in graphs for s in graph["sites"] if s["verdict"] == "rewritten"]


def grids_seen() -> set[Grid]:
    return {tuple(grid) for site in sparse_sites() for grid in site["grids"]}


def by_hand(model: Any, inputs: Inputs, grid: Grid, layers: Sequence[str]) -> torch.Tensor:
    """What a model without text must return: the op told the true grid, in all its layers."""
    return run_uniform(model, inputs, Layout.of(Video(*grid)), layers)


def test_twelve_blocks_are_one_compile() -> None:
    model = wan(layers=12)
    inputs = wan_inputs(LANDSCAPE)
    wanted = by_hand(model, inputs, LANDSCAPE, [f"blocks.{i}.attn1" for i in range(12)])
    dense = run(model, inputs)
    model.compile_repeated_blocks(backend="veda", options=OPTIONS)
    found = run(model, inputs)
    assert distance(found, wanted) <= EXACT
    assert distance(found, dense) > 100 * EXACT  # sparse attention is not dense attention
    assert compiles() == len(veda_compile.report().graphs) == 1
    assert [site["layer"] for site in sparse_sites()] == ["attn1"]


@pytest.mark.parametrize("first", [LANDSCAPE, PORTRAIT])
def test_a_flip_reuses_the_graph_with_the_other_grid(first: Grid) -> None:
    model = wan(layers=2)
    layers = ["blocks.0.attn1", "blocks.1.attn1"]
    second = PORTRAIT if first == LANDSCAPE else LANDSCAPE
    wanted = {g: by_hand(model, wan_inputs(g), g, layers) for g in (first, second)}
    mistaken = by_hand(model, wan_inputs(second), first, layers)
    assert distance(mistaken, wanted[second]) > 100 * EXACT  # a stale grid would be seen
    model.compile_repeated_blocks(backend="veda", options=OPTIONS)
    for grid in (first, second, first, second):
        assert distance(run(model, wan_inputs(grid)), wanted[grid]) <= EXACT
        (site,) = sparse_sites()
        assert grid in site["grids"]
    assert compiles() == 1
    assert grids_seen() == {first, second}


RESOLUTIONS = (LANDSCAPE, PORTRAIT, (5, 6, 10), (3, 10, 14))


def test_four_resolutions_need_no_more_compiles_than_plain_dynamo() -> None:
    layers = [f"blocks.{i}.attn1" for i in range(3)]
    plain = wan()
    wanted = {g: by_hand(plain, wan_inputs(g), g, layers) for g in RESOLUTIONS}
    plain.compile_repeated_blocks(backend="aot_eager")
    for grid in RESOLUTIONS:
        run(plain, wan_inputs(grid))
    needed = compiles()
    torch.compiler.reset()
    counters.clear()

    model = wan()
    model.compile_repeated_blocks(backend="veda", options=OPTIONS)
    for grid in (*RESOLUTIONS, *reversed(RESOLUTIONS)):
        assert distance(run(model, wan_inputs(grid)), wanted[grid]) <= EXACT, grid
    assert compiles() == needed <= 2
    assert grids_seen() == set(RESOLUTIONS)


def test_cogvideox_and_positions_written_in_place() -> None:
    """A buffer of positions that is filled anew holds another grid under the same identity."""
    known = FAMILIES["cogvideox"]
    model = known.build()
    wanted = {
        g: run_uniform(model, known.inputs(g), known.layout(g), known.layers)
        for g in (LANDSCAPE, PORTRAIT)
    }
    for block in model.transformer_blocks:
        block.compile(backend="veda", options=OPTIONS)
    for grid in (LANDSCAPE, PORTRAIT):
        assert distance(run(model, known.inputs(grid)), wanted[grid]) <= EXACT, grid
    held = known.inputs(PORTRAIT)["image_rotary_emb"]
    for grid in (PORTRAIT, LANDSCAPE, PORTRAIT):
        inputs = known.inputs(grid)
        for buffer, value in zip(held, inputs["image_rotary_emb"], strict=True):
            buffer.copy_(value)
        found = run(model, {**inputs, "image_rotary_emb": held})
        assert distance(found, wanted[grid]) <= EXACT, grid
    assert grids_seen() == {LANDSCAPE, PORTRAIT}
    assert compiles() <= 2  # the first block is handed other strides than the rest


GRAPHS = {"hunyuan": 3, "ltx": 1}
"""Graphs with video attention: HunyuanVideo has two kinds of block, and the first block of the
second kind is handed other strides than the rest."""


@pytest.mark.parametrize("family", GRAPHS)
def test_other_families(family: str) -> None:
    known = FAMILIES[family]
    model, inputs_of = known.build(), known.inputs
    grids = (LANDSCAPE, PORTRAIT)
    wanted = {g: run_uniform(model, inputs_of(g), known.layout(g), known.layers) for g in grids}
    dense = run(model, inputs_of(LANDSCAPE))
    model.compile_repeated_blocks(backend="veda", options=OPTIONS)
    for grid in (*grids, LANDSCAPE):
        assert distance(run(model, inputs_of(grid)), wanted[grid]) <= EXACT, grid
    assert distance(wanted[LANDSCAPE], dense) > 100 * EXACT
    assert grids_seen() == set(grids)
    assert len(sparse_sites()) <= GRAPHS[family]
