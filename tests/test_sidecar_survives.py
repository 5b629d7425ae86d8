"""A sidecar distilled from one float32 model serves every way that model is run, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from distinct_sidecars import refused
from small_transformers import (
    EXACT,
    QUICK,
    Grid,
    Inputs,
    distance,
    hunyuan,
    hunyuan_inputs,
    ltx,
    ltx_inputs,
    run,
    run_by_hand,
    wan,
    wan_inputs,
)

import veda_compile
from veda_compile import Sidecar, SidecarError, distill
from veda_compile.fingerprint import fingerprint, module_tensors
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.plan import Plan

pytestmark = pytest.mark.usefixtures("fresh_compiler")

GRID: Grid = (4, 8, 12)
OTHER: Grid = (3, 14, 10)
LAYERS = [f"blocks.{i}.attn1" for i in range(3)]
WAYS = ("whole", "blocks", "regional")

WRONG: dict[str, tuple[Callable[[], Any], Callable[[Grid], Inputs], str]] = {
    "another class": (ltx, ltx_inputs, "transformer_blocks.0.attn1"),
    "more layers": (lambda: wan(layers=5, seed=1), wan_inputs, LAYERS[0]),
    "fewer layers": (lambda: wan(layers=2, seed=1), wan_inputs, LAYERS[0]),
    "other weights": (lambda: wan(seed=1), wan_inputs, LAYERS[0]),
}
"""Models with heads of the sidecar's sizes, their inputs and their first layer."""

SIZES: dict[str, tuple[Callable[[], Any], Callable[[Grid], Inputs], str]] = {
    "another class": (hunyuan, hunyuan_inputs, "2 heads of 32"),
    "more heads": (lambda: wan(heads=4), wan_inputs, "4 heads of 24"),
    "other head_dim": (lambda: wan(head_dim=12), wan_inputs, "2 heads of 12"),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Distilled from the float32 model, compiled whole, on one grid and batch 1."""
    out = tmp_path_factory.mktemp("distilled") / "wan.veda.safetensors"
    model = torch.compile(wan(), backend="eager")
    find = {"min_tokens": 0, "inner": "eager"}
    with distill(model, out, 0.4, share=1.0, options=find, progress=False):  # type: ignore[arg-type]
        for seed in range(4):
            for step in (1000, 750, 500, 250):
                run(model, wan_inputs(GRID, seed) | {"timestep": torch.tensor([step])})  # type: ignore[arg-type]
    return str(out)


def compiled(model: Any, how: str, sidecar: str) -> Any:
    options = {**QUICK, "sidecar": sidecar}
    if how == "whole":
        return torch.compile(model, backend="veda", options=options)
    if how == "blocks":
        for block in model.blocks:
            block.compile(backend="veda", options=options)
    else:
        model.compile_repeated_blocks(backend="veda", options=options)
    return model


def inputs_of(grid: Grid, batch: int, dtype: torch.dtype) -> Inputs:
    """Every batch element its own video and text."""
    each = [wan_inputs(grid, 7 + 2 * number) for number in range(batch)]
    joined: Inputs = {"return_dict": False}
    for name in ("hidden_states", "encoder_hidden_states"):
        joined[name] = torch.cat([inputs[name] for inputs in each]).to(dtype)
    return joined | {"timestep": torch.tensor([500] * batch)}


def own_plans(path: str, grid: Grid) -> list[Plan]:
    loaded = Sidecar.load(path)
    return [loaded.plan_for(name, grid)[0] for name in LAYERS]


def by_hand(model: Any, inputs: Inputs, grid: Grid, plans: list[Plan]) -> torch.Tensor:
    layout = Layout.of(Video(*grid))
    return run_by_hand(model, inputs, layout, dict(zip(LAYERS, plans, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("how", WAYS)
def test_every_layer_has_its_plan(path: str, how: str, dtype: torch.dtype) -> None:
    """On another resolution and batch than it was learned on, in another dtype, block by block."""
    model = wan().to(dtype)
    cases = [(GRID, 1), (OTHER, 2), (OTHER, 1)]
    wanted = []
    for grid, batch in cases:
        inputs, plans = inputs_of(grid, batch, dtype), own_plans(path, grid)
        wanted.append(by_hand(model, inputs, grid, plans))
        shuffled = by_hand(model, inputs, grid, plans[1:] + plans[:1])
        dense = run(model, inputs)
        for wrong in (shuffled, dense):  # plans in other layers, or none, would be seen
            assert distance(wrong, wanted[-1]) > 100 * EXACT
    call = compiled(model, how, path)
    for (grid, batch), right in zip(cases, wanted, strict=True):
        found = run(call, inputs_of(grid, batch, dtype))
        assert found.dtype == dtype and bool(found.isfinite().all())
        assert distance(found, right) <= EXACT, (grid, batch)
    sites = [s for s in veda_compile.report().sites if s.reason != "CROSS_ATTENTION"]
    assert all(site.rewritten for site in sites)
    assert {layer for site in sites for layer in site.layers} == set(LAYERS)
    assert {tuple(grid) for site in sites for grid in site.grids} == {GRID, OTHER}
    veda_compile.report().require()


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("how", ["whole", "regional"])
def test_a_wrong_model_is_refused_by_fingerprint(path: str, how: str, wrong: str) -> None:
    build, make_inputs, first = WRONG[wrong]
    model = build()
    mark = fingerprint(module_tensors(model.get_submodule(first)))
    assert mark is not None
    layer = first if how == "whole" else first.rpartition(".")[2]
    with refused(SidecarError, path, "WanTransformer3DModel", mark, f"layer {layer} of"):
        run(compiled(model, how, path), make_inputs(GRID))


@pytest.mark.parametrize("wrong", SIZES)
@pytest.mark.parametrize("how", ["whole", "regional"])
def test_a_model_of_other_sizes_is_refused(path: str, how: str, wrong: str) -> None:
    build, make_inputs, sizes = SIZES[wrong]
    with refused(SidecarError, path, "WanTransformer3DModel", sizes):
        run(compiled(build(), how, path), make_inputs(GRID))
