"""Many resolutions and lengths in a row: few compilations, and the true grid in every call."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from compiling import sparse_calls
from families import FAMILIES
from small_transformers import EXACT, QUICK, Grid, distance, run, run_uniform
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import veda_compile
from benchmarks.zoo import call, entry
from veda_compile.kernels.layout import Layout, Video

pytestmark = pytest.mark.usefixtures("fresh_compiler")

OPTIONS: dict[str, Any] = {**QUICK, "density": 0.3}
RESOLUTIONS = [(5, 6, 10), (5, 10, 6), (5, 8, 8), (5, 8, 12), (5, 12, 8), (5, 4, 14)]
"""Flips keep the number of tokens, one is square, and twice 6 is the number of text tokens."""
GRIDS: list[Grid] = [*RESOLUTIONS, (3, 6, 10), (7, 6, 10), (9, 6, 10)]


def by_hand(name: str, model: Any, grid: Grid) -> torch.Tensor:
    known = FAMILIES[name]
    return run_uniform(model, known.inputs(grid), known.layout(grid), known.layers)


def compilations() -> int:
    """Of the graph that was compiled most often, among those with video attention."""
    graphs = [g for g in veda_compile.report().graphs if any(s.rewritten for s in g.sites)]
    return max(Counter(graph.compile_id.partition("/")[0] for graph in graphs).values())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_model_compiled_for_all_sizes(name: str) -> None:
    """One compilation, and a second because one text length equals one height."""
    known = FAMILIES[name]
    model, inputs_of = known.build(), known.inputs
    wanted = {grid: by_hand(name, model, grid) for grid in GRIDS}
    fn = torch.compile(model, backend="veda", options=OPTIONS, dynamic=True)
    for grid in GRIDS:
        assert distance(run(fn, inputs_of(grid)), wanted[grid]) <= EXACT, grid
    assert counters["stats"]["unique_graphs"] <= 2
    assert {tuple(g) for s in veda_compile.report().sites for g in s.grids} == set(GRIDS)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_compiled_for_all_sizes(name: str) -> None:
    known = FAMILIES[name]
    model, inputs_of = known.build(), known.inputs
    wanted = {grid: by_hand(name, model, grid) for grid in GRIDS}
    if name == "cogvideox":
        for block in model.transformer_blocks:
            block.compile(backend="veda", options=OPTIONS, dynamic=True)
    else:
        model.compile_repeated_blocks(backend="veda", options=OPTIONS, dynamic=True)
    for grid in GRIDS:
        assert distance(run(model, inputs_of(grid)), wanted[grid]) <= EXACT, grid
    assert compilations() <= 2
    assert {tuple(g) for s in veda_compile.report().sites for g in s.grids} == set(GRIDS)


def test_by_default_torch_alone_decides_when_to_compile() -> None:
    """It makes a side symbolic once it has changed, so that a new length is one more compilation
    after new resolutions; the backend adds none."""
    model, inputs_of = FAMILIES["wan"].build(), FAMILIES["wan"].inputs
    counter = CompileCounterWithBackend("eager")
    plain = torch.compile(model, backend=counter)
    for grid in GRIDS:
        run(plain, inputs_of(grid))
    torch.compiler.reset()
    counters.clear()
    wanted = {grid: by_hand("wan", model, grid) for grid in GRIDS}
    fn = torch.compile(model, backend="veda", options=OPTIONS)
    for grid in GRIDS:
        assert distance(run(fn, inputs_of(grid)), wanted[grid]) <= EXACT, grid
    assert counters["stats"]["unique_graphs"] == counter.frame_count


@pytest.mark.parametrize("name", ["wan vace", "cogvideox 2b", "easyanimate"])
def test_sides_that_share_a_symbol_or_are_specialised(name: str) -> None:
    """Duck shaping gives equal sides one symbol; some models fix sides by asking for them."""
    known = entry(name)
    model, _ = known.make((5, 8, 8))
    fn = torch.compile(model, backend="veda", dynamic=True, options={**QUICK, "density": 1.0})
    for grid in [(5, 8, 8), (5, 6, 10), (5, 10, 6), (3, 8, 12), (4, 4, 4)]:
        _, inputs = known.make(grid)
        veda_compile.reset_report()
        with torch.no_grad():
            error = (call(fn, inputs) - call(model, inputs)).abs().max()
        assert error <= EXACT, grid
        met = [site for site in veda_compile.report().sites if site.rewritten]
        assert all(site.grid == grid for site in met), grid


def test_sizes_that_no_compilation_knows() -> None:
    known = entry("plain fused qkv")
    model, _ = known.make(GRIDS[0])
    fn = torch.compile(model, backend="veda", options={**QUICK, "density": 1.0})
    for grid in [(5, 8, 8), (5, 6, 10), (5, 10, 6), (3, 8, 12)]:
        _, inputs = known.make(grid)
        for side in (2, 3, 4):
            torch._dynamo.decorators.mark_unbacked(inputs["latents"], side)
        with torch.no_grad(), sparse_calls() as calls:
            assert distance(call(fn, inputs), call(model, inputs)) <= EXACT
        assert [made.layout for made, _ in calls] == [Layout.of(Video(*grid))] * 2
    assert counters["stats"]["unique_graphs"] == 1
