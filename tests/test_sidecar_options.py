"""Options beside a sidecar: what they change in its plans, and what they may not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distinct_sidecars import distinct_plans, refused, save_sidecar
from small_transformers import EXACT, QUICK, Grid, distance, run, run_by_hand, wan, wan_inputs

import veda_compile
from veda_compile.errors import OptionsError
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.sidecar import Sidecar

GRID: Grid = (4, 8, 12)
LAYERS = [f"blocks.{i}.attn1" for i in range(2)]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    veda_compile.reset_report()
    yield
    torch.compiler.reset()


@pytest.fixture
def model() -> Any:
    return wan(layers=2)


@pytest.fixture
def path(model: Any, tmp_path: Path) -> str:
    plans = distinct_plans(2)
    return save_sidecar(tmp_path / "wan.veda.safetensors", model, LAYERS, plans, [GRID])


def by_hand(model: Any, plans: dict[str, Plan], grid: Grid = GRID) -> torch.Tensor:
    return run_by_hand(model, wan_inputs(grid), Layout.of(Video(*grid)), plans)


def regional(model: Any, **options: Any) -> Any:
    model.compile_repeated_blocks(backend="veda", options={**QUICK, **options})
    return model


def whole(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="veda", options={**QUICK, **options})


def sites() -> dict[str, dict[str, Any]]:
    graphs = veda_compile.report().to_dict()["graphs"]
    return {site["layer"]: site for graph in graphs for site in graph["sites"]}


def test_density_rescales_the_plans(model: Any, path: str) -> None:
    loaded = Sidecar.load(path)
    plans = {name: loaded.plan_for(name, GRID, density=0.6)[0] for name in LAYERS}
    assert plans[LAYERS[0]].density != distinct_plans(2)[0].density
    wanted = by_hand(model, plans)
    found = run(regional(model, sidecar=path, density=0.6), wan_inputs(GRID))
    assert distance(found, wanted) <= EXACT


def test_density_one_is_dense_attention(model: Any, path: str) -> None:
    wanted = run(model, wan_inputs(GRID))
    found = run(regional(model, sidecar=path, density=1.0), wan_inputs(GRID))
    assert distance(found, wanted) <= EXACT
    assert sites()["attn1"]["density"] == 1.0


def test_score_replaces_the_score_of_the_sidecar(model: Any, path: str) -> None:
    plans = distinct_plans(2, score="mean")
    wanted = by_hand(model, dict(zip(LAYERS, plans, strict=True)))
    own = by_hand(model, dict(zip(LAYERS, distinct_plans(2), strict=True)))
    found = run(regional(model, sidecar=path, score="mean"), wan_inputs(GRID))
    assert distance(found, wanted) <= EXACT
    assert distance(own, wanted) > 100 * EXACT
    assert sites()["attn1"]["score"] == "mean"


@pytest.mark.parametrize("compile_model", [regional, whole])
def test_projections_go_to_their_own_layers(model: Any, tmp_path: Path, compile_model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    plans = [
        Plan(p.tile_shapes, p.density, "projection",
             torch.randn(2, 2, 72, 24, generator=generator))
        for p in distinct_plans(2)
    ]  # fmt: skip
    path = save_sidecar(tmp_path / "p.veda.safetensors", model, LAYERS, plans, [GRID])
    wanted = by_hand(model, dict(zip(LAYERS, plans, strict=True)))
    other = [
        Plan(mine.tile_shapes, mine.density, "projection", theirs.projection)
        for mine, theirs in zip(plans, plans[::-1], strict=True)
    ]
    crossed = by_hand(model, dict(zip(LAYERS, other, strict=True)))
    found = run(compile_model(model, sidecar=path), wan_inputs(GRID))
    assert distance(found, wanted) <= EXACT
    assert distance(crossed, wanted) > 100 * EXACT


@pytest.mark.parametrize("compile_model", [regional, whole])
def test_another_tile_size_is_refused(model: Any, path: str, compile_model: Any) -> None:
    with refused(OptionsError, "tile_size is 128", path, "tile size 64", "leave out tile_size"):
        run(compile_model(model, sidecar=path, tile_size=128), wan_inputs(GRID))


def test_the_same_tile_size_is_fine(model: Any, path: str) -> None:
    run(regional(model, sidecar=path, tile_size=64), wan_inputs(GRID))
    assert sites()["attn1"]["verdict"] == "rewritten"


@pytest.mark.parametrize("entry", ["blocks.0.attn1", "0.attn1", 0])
def test_a_dense_layer_leaves_the_others_their_plans(
    model: Any, path: str, entry: str | int, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = by_hand(model, {LAYERS[1]: distinct_plans(2)[1]})
    found = run(whole(model, sidecar=path, dense_layers=(entry,)), wan_inputs(GRID))
    assert distance(found, wanted) <= EXACT
    assert sites()[LAYERS[0]]["reason"] == "DENSE_LAYER"
    assert sites()[LAYERS[1]]["layers"] == [LAYERS[1]]
    assert "dense_layers" not in caplog.text


@pytest.mark.parametrize("entry", ["blocks.7.attn1", 2, "attn"])
def test_a_dense_layer_that_is_none_is_reported(
    model: Any, entry: str | int, caplog: pytest.LogCaptureFixture
) -> None:
    run(whole(model, dense_layers=(entry,)), wan_inputs(GRID))
    (warning,) = [r for r in caplog.records if r.name.startswith("veda_compile")]
    assert warning.levelno == logging.WARNING
    for text in ("dense_layers", repr(entry), *LAYERS):
        assert text in warning.getMessage()


def test_the_nearest_grid_is_announced_once_and_used(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other plans for a tall grid: the nearest is one of two, not the first or the only one."""
    wide, tall = (distinct_plans(2, turn) for turn in (0, 2))
    made = [
        Sidecar.load(save_sidecar(tmp_path / f"{i}.veda.safetensors", model, LAYERS, plans, [grid]))
        for i, (plans, grid) in enumerate(((wide, (4, 8, 12)), (tall, (4, 12, 8))))
    ]
    path = tmp_path / "both.veda.safetensors"
    Sidecar(made[0].model, made[0].plans + made[1].plans, "closed_form", 64).save(path)
    asked: Grid = (4, 24, 16)
    wanted = by_hand(model, dict(zip(LAYERS, tall, strict=True)), asked)
    call = regional(model, sidecar=str(path))
    for _ in range(2):
        assert distance(run(call, wan_inputs(asked)), wanted) <= EXACT
    (warning,) = [r for r in caplog.records if r.name.startswith("veda_compile")]
    assert warning.levelno == logging.WARNING
    for text in (str(path), str(asked), str((4, 12, 8))):
        assert text in warning.getMessage()
