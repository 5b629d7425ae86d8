"""`attach`: the grid of every call reaches blocks compiled alone, and only where it fits."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from small_transformers import EXACT, QUICK, Grid, distance, run, run_uniform
from torch import nn
from torch._dynamo.utils import counters

import veda_compile
from benchmarks.zoo import entry
from veda_compile.errors import LayoutError
from veda_compile.kernels.layout import Extra, Layout, Video
from veda_compile.told import told_grids

pytestmark = pytest.mark.usefixtures("fresh_compiler")

OPTIONS: dict[str, Any] = {**QUICK, "density": 0.3}
LANDSCAPE, PORTRAIT = (5, 6, 10), (5, 10, 6)
GRIDS = [LANDSCAPE, PORTRAIT, (3, 8, 12), (7, 4, 6), LANDSCAPE]


def made(name: str, grid: Grid = LANDSCAPE) -> tuple[Any, dict[str, Any]]:
    model, inputs = entry(name).make(grid)
    return model, inputs


def compile_blocks(model: nn.Module, name: str, options: dict[str, Any] = OPTIONS) -> None:
    for blocks in entry(name).blocks:
        for block in model.get_submodule(blocks):
            block.compile(backend="veda", options=options)
    if not entry(name).blocks:
        model.compile_repeated_blocks(backend="veda", options=options)  # type: ignore[operator]


def by_hand(name: str, model: Any, inputs: dict[str, Any], layout: Layout) -> torch.Tensor:
    return run_uniform(model, inputs, layout, entry(name).layers)


def sites() -> list[Any]:
    return veda_compile.report().sites


@pytest.mark.parametrize("first", ["attach", "compile"])
def test_blocks_without_positions_follow_every_call(first: str) -> None:
    name = "cogvideox 2b"
    model, _ = made(name)
    wanted = {
        grid: by_hand(name, model, made(name, grid)[1], Layout.of(Extra(12), Video(*grid)))
        for grid in GRIDS
    }
    mistaken = Layout.of(Extra(12), Video(*LANDSCAPE))
    stale = by_hand(name, model, made(name, PORTRAIT)[1], mistaken)
    assert distance(stale, wanted[PORTRAIT]) > 100 * EXACT
    if first == "attach":
        veda_compile.attach(model)
    compile_blocks(model, name)
    if first == "compile":
        veda_compile.attach(model)
    for grid in GRIDS:
        assert distance(run(model, made(name, grid)[1]), wanted[grid]) <= EXACT, grid
    assert {site.evidence for site in sites()} == {"veda_compile.attach"}
    assert {tuple(g) for site in sites() for g in site.grids} == set(GRIDS)


def test_it_costs_no_compilation_and_no_graph_break() -> None:
    name = "cogvideox 2b"
    counted = []
    for attached in (False, True):
        torch.compiler.reset()
        counters.clear()
        model, _ = made(name)
        if attached:
            veda_compile.attach(model)
        compile_blocks(model, name)
        for grid in GRIDS:
            run(model, made(name, grid)[1])
        assert not counters["graph_break"]
        counted.append(counters["stats"]["unique_graphs"])
    assert counted[0] == counted[1]


def test_a_whole_model_may_be_attached_too() -> None:
    model, inputs = made("wan t2v")
    veda_compile.attach(model)
    fn = torch.compile(model, backend="veda", options=OPTIONS, fullgraph=True)
    veda_compile.attach(fn)
    wanted = by_hand("wan t2v", model, inputs, Layout.of(Video(*LANDSCAPE)))
    assert distance(run(fn, inputs), wanted) <= EXACT
    assert counters["stats"]["unique_graphs"] == 1
    assert told_grids() is None


def test_it_says_when_it_comes_too_late(caplog: pytest.LogCaptureFixture) -> None:
    name = "cogvideox 2b"
    model, inputs = made(name)
    compile_blocks(model, name)
    dense = run(model, inputs)
    caplog.clear()
    veda_compile.attach(model)
    (message,) = [r.message for r in caplog.records if "veda_compile.attach" in r.message]
    assert "2 attention calls of CogVideoXTransformer3DModel" in message
    assert "torch.compiler.reset()" in message
    assert torch.equal(run(model, inputs), dense)
    torch.compiler.reset()
    assert distance(run(model, inputs), dense) > 100 * EXACT
    caplog.clear()
    veda_compile.attach(made(name)[0])
    assert not caplog.records


WINDOWS = {
    "helios": (Extra(162), Video(*LANDSCAPE)),
    "framepack": (Extra(159), Video(*LANDSCAPE), Extra(14)),
}
"""Other videos come first, and their positions stand in the same rotary table."""


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("how", ["attach", "option"])
def test_the_main_video_among_others(name: str, how: str) -> None:
    model, inputs = made(name)
    wanted = by_hand(name, model, inputs, Layout(WINDOWS[name]))
    options = OPTIONS
    if how == "attach":
        veda_compile.attach(model)
    else:
        options = {**OPTIONS, "grid": LANDSCAPE}
    compile_blocks(model, name, options)
    assert distance(run(model, inputs), wanted) <= EXACT
    assert {site.grid for site in sites() if site.rewritten} == {LANDSCAPE}


def test_all_videos_of_a_sequence() -> None:
    model, inputs = made("helios")
    layout = entry("helios").layouts(LANDSCAPE)[0]
    veda_compile.attach(model, lambda *_, **__: [video.grid for _, video in layout.videos])
    wanted = by_hand("helios", model, inputs, layout)
    compile_blocks(model, "helios")
    assert distance(run(model, inputs), wanted) <= EXACT


@pytest.mark.parametrize(("name", "grid"), [
    ("helios", (5, 10, 6)),
    ("framepack", (5, 10, 6)),
    ("framepack", (6, 5, 10)),
    ("cogvideox 2b", (5, 6, 9)),
    ("cogvideox 2b", (5, 6, 11)),
])  # fmt: skip
def test_a_grid_that_does_not_fit_is_refused(name: str, grid: Grid) -> None:
    model, inputs = made(name)
    dense = run(model, inputs)
    veda_compile.attach(model, grid)
    compile_blocks(model, name)
    assert torch.equal(run(model, inputs), dense)
    refused = [site for site in sites() if site.reason == "NO_GRID"]
    assert refused and not any(site.rewritten for site in sites())
    assert all("x".join(map(str, grid)) in site.explanation for site in refused)


@pytest.mark.parametrize(("name", "lie"), [
    ("helios", (5, 10, 6)), ("framepack", (5, 10, 6)), ("cogvideox 2b", (5, 6, 9)),
])  # fmt: skip
def test_a_grid_that_fits_no_more_is_an_error(name: str, lie: Grid) -> None:
    model, inputs = made(name)
    told = [LANDSCAPE]
    veda_compile.attach(model, lambda *_, **__: told[0])
    compile_blocks(model, name)
    run(model, inputs)
    told[0] = lie
    with pytest.raises(LayoutError):
        run(model, inputs)
    told[0] = LANDSCAPE
    run(model, inputs)
    assert told_grids() is None


def test_without_it_a_compiled_block_says_what_is_missing() -> None:
    name = "cogvideox 2b"
    model, inputs = made(name)
    attachment = veda_compile.attach(model)
    compile_blocks(model, name)
    run(model, inputs)
    attachment.remove()
    with pytest.raises(LayoutError, match="call veda_compile"):
        run(model, inputs)


def test_models_in_two_threads_do_not_mix() -> None:
    name = "cogvideox 2b"
    both = {grid: made(name, grid) for grid in (LANDSCAPE, PORTRAIT)}
    met = threading.Barrier(2)
    wanted: dict[Grid, torch.Tensor] = {}
    found: dict[Grid, torch.Tensor] = {}
    for grid, (model, inputs) in both.items():
        wanted[grid] = by_hand(name, model, inputs, Layout.of(Extra(12), Video(*grid)))
        veda_compile.attach(model)
        compile_blocks(model, name)
        run(model, inputs)

    def wait(*_: Any) -> None:
        met.wait(60)

    def work(grid: Grid) -> None:
        model, inputs = both[grid]
        model.patch_embed.register_forward_hook(wait)
        found[grid] = run(model, inputs)

    threads = [threading.Thread(target=work, args=(grid,)) for grid in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(distance(found[grid], wanted[grid]) <= EXACT for grid in both)
