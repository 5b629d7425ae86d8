"""Per-layer plans: the right one in every layer, however layers are compiled, moved or replaced."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from distinct_sidecars import distinct_plans, refused, save_sidecar, swap_contents
from small_transformers import (
    EXACT,
    QUICK,
    TEXT,
    Grid,
    distance,
    hunyuan,
    hunyuan_inputs,
    run,
    run_by_hand,
    wan,
    wan_inputs,
)
from torch._dynamo.utils import counters

import veda_compile
from veda_compile.binding import LayerMark
from veda_compile.errors import SidecarError
from veda_compile.kernels.layout import Extra, Layout, Video
from veda_compile.kernels.plan import Plan

GRID: Grid = (4, 8, 12)
FLIPPED: Grid = (4, 12, 8)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    veda_compile.reset_report()
    yield
    torch.compiler.reset()


def names(count: int) -> list[str]:
    return [f"blocks.{i}.attn1" for i in range(count)]


def by_hand(model: Any, plans: list[Plan], grid: Grid = GRID, seed: int = 0) -> torch.Tensor:
    layout = Layout.of(Video(*grid))
    named = dict(zip(names(len(plans)), plans, strict=True))
    return run_by_hand(model, wan_inputs(grid, seed), layout, named)


def compiled(model: Any, how: str, sidecar: str, **options: Any) -> Any:
    chosen = {**QUICK, "sidecar": sidecar, **options}
    if how == "whole":
        return torch.compile(model, backend="veda", options=chosen)
    model.compile_repeated_blocks(backend="veda", options=chosen)
    return model


def sparse_sites() -> list[dict[str, Any]]:
    graphs = veda_compile.report().to_dict()["graphs"]
    return [s for graph in graphs for s in graph["sites"] if s["verdict"] == "rewritten"]


@pytest.mark.parametrize("how", ["whole", "regional"])
def test_every_layer_has_its_own_plan(tmp_path: Path, how: str) -> None:
    plans = distinct_plans(4)
    swapped = [plans[1], plans[0], *plans[2:]]
    model = wan(layers=4)
    path = save_sidecar(tmp_path / "a.veda.safetensors", model, names(4), plans, [GRID, FLIPPED])
    wanted = {grid: by_hand(model, plans, grid) for grid in (GRID, FLIPPED)}
    wrong = by_hand(model, swapped)
    call = compiled(model, how, path)
    for grid in (GRID, FLIPPED, GRID):
        if how == "whole" and grid == FLIPPED:
            continue  # another resolution is another compile there
        assert distance(run(call, wan_inputs(grid)), wanted[grid]) <= EXACT
    assert distance(wrong, wanted[GRID]) > 100 * EXACT  # two swapped plans would be seen
    served = [layer for site in sparse_sites() for layer in site["layers"]]
    assert served == names(4)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("how", ["whole", "regional"])
def test_the_same_model_with_swapped_plans(tmp_path: Path, how: str) -> None:
    plans = distinct_plans(2)[::-1]
    model = wan(layers=2)
    path = save_sidecar(tmp_path / "a.veda.safetensors", model, names(2), plans, [GRID])
    wanted = by_hand(model, plans)
    assert distance(run(compiled(model, how, path), wan_inputs(GRID)), wanted) <= EXACT


def test_two_kinds_of_block(tmp_path: Path) -> None:
    layers = [f"transformer_blocks.{i}.attn" for i in range(2)]
    layers += [f"single_transformer_blocks.{i}.attn" for i in range(2)]
    plans = distinct_plans(4)
    model = hunyuan()
    path = save_sidecar(tmp_path / "h.veda.safetensors", model, layers, plans, [GRID], 32)
    layout = Layout.of(Video(*GRID), Extra(TEXT))
    wanted = run_by_hand(model, hunyuan_inputs(GRID), layout, dict(zip(layers, plans, strict=True)))
    call = compiled(model, "regional", path)
    assert distance(run(call, hunyuan_inputs(GRID)), wanted) <= EXACT
    assert {layer for site in sparse_sites() for layer in site["layers"]} == set(layers)


def test_plans_follow_the_contents_of_parameters(tmp_path: Path) -> None:
    plans = distinct_plans(2)
    model = wan(layers=2)
    path = save_sidecar(tmp_path / "a.veda.safetensors", model, names(2), plans, [GRID])
    original = copy.deepcopy(model.state_dict())
    wanted = by_hand(model, plans)
    first, second = (block.attn1 for block in model.blocks)
    swap_contents(first, second)
    crossed = by_hand(model, plans[::-1])
    stale = by_hand(model, plans)
    swap_contents(first, second)
    assert distance(stale, crossed) > 100 * EXACT

    call = compiled(model, "regional", path)
    assert distance(run(call, wan_inputs(GRID)), wanted) <= EXACT
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert distance(run(call, wan_inputs(GRID)), wanted) <= EXACT

    swap_contents(first, second)  # in place: the same parameters and the same memory
    assert distance(run(call, wan_inputs(GRID)), crossed) <= EXACT
    for _ in range(2):  # other memory, twice, so that addresses come back with other contents
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            if a.dim() == 1:
                a.data, b.data = b.data.clone(), a.data.clone()
    assert distance(run(call, wan_inputs(GRID)), crossed) <= EXACT

    with torch.no_grad():
        second.norm_q.weight.mul_(1.5)
    with refused(SidecarError, path, "other weights"):
        run(call, wan_inputs(GRID))
    model.load_state_dict(original)
    assert distance(run(call, wan_inputs(GRID)), wanted) <= EXACT
    assert counters["stats"]["unique_graphs"] == 1


def test_memory_is_not_given_away_under_a_known_parameter() -> None:
    """Data assigned twice may lie where the first lay, and assigning counts no version."""
    values = numpy.ones(8, dtype=numpy.float32)
    memory = weakref.ref(values)
    parameter = torch.nn.Parameter(torch.from_numpy(values))
    mark = LayerMark([0])
    before = mark([parameter])
    del values
    parameter.data = torch.zeros(8)
    assert memory() is not None
    assert mark([parameter]) not in (None, before)


def test_parameters_made_in_inference_mode_are_read_on_every_call() -> None:
    with torch.inference_mode():
        parameter = torch.nn.Parameter(torch.ones(8), requires_grad=False)
        mark = LayerMark([0])
        before = mark([parameter])
        parameter.copy_(torch.zeros(8))
        assert mark([parameter]) not in (None, before)


@pytest.mark.parametrize("how", ["whole", "regional"])
def test_replaced_parameters_need_no_new_graph(tmp_path: Path, how: str) -> None:
    plans = distinct_plans(2)
    model = wan(layers=2)
    path = save_sidecar(tmp_path / "a.veda.safetensors", model, names(2), plans, [GRID])
    call = compiled(model, how, path)
    wanted = run(call, wan_inputs(GRID))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fresh_one = torch.nn.Parameter(parameter.detach().clone(), requires_grad=True)
            setattr(module, name, fresh_one)
    assert distance(run(call, wan_inputs(GRID)), wanted) <= EXACT
    assert counters["stats"]["unique_graphs"] == 1


def test_two_models_with_two_sidecars_take_turns(tmp_path: Path) -> None:
    models = [wan(layers=2, seed=seed) for seed in (0, 1)]
    calls, wanted = [], []
    for place, model in enumerate(models):
        plans = distinct_plans(2, turn=place)
        path = save_sidecar(tmp_path / f"{place}.veda.safetensors", model, names(2), plans, [GRID])
        wanted.append([by_hand(model, plans, seed=seed) for seed in (0, 5)])
        calls.append(compiled(model, "regional", path))
    for seed_place, seed in enumerate((0, 5)):
        for place in (0, 1, 0, 1):
            found = run(calls[place], wan_inputs(GRID, seed))
            assert distance(found, wanted[place][seed_place]) <= EXACT
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("how", ["whole", "regional"])
def test_a_sidecar_of_other_weights_is_refused(tmp_path: Path, how: str) -> None:
    plans = distinct_plans(2)
    owner = wan(layers=2, seed=0)
    path = save_sidecar(tmp_path / "a.veda.safetensors", owner, names(2), plans, [GRID])
    other = wan(layers=2, seed=1)
    with refused(SidecarError, path, "WanTransformer3DModel", "other weights"):
        run(compiled(other, how, path), wan_inputs(GRID))
    run(compiled(owner, how, path), wan_inputs(GRID))
    with refused(SidecarError, path):  # on the owner's graph this time, where one is shared
        run(compiled(other, how, path), wan_inputs(GRID))


def test_a_model_loaded_in_bfloat16_is_the_same_model(tmp_path: Path) -> None:
    plans = distinct_plans(2)
    model = wan(layers=2)
    path = save_sidecar(tmp_path / "a.veda.safetensors", model, names(2), plans, [GRID])
    for block in model.blocks:
        block.attn1.to(torch.bfloat16)
    for block in model.blocks:  # the rest of the model stays float32, as norms often do
        block.attn1.register_forward_pre_hook(
            lambda _, args, kwargs: (
                tuple(a.bfloat16() if torch.is_tensor(a) else a for a in args), kwargs
            ),
            with_kwargs=True,
        )  # fmt: skip
    wanted = by_hand(model, plans)
    call = compiled(model, "regional", path)
    assert distance(run(call, wan_inputs(GRID)), wanted) <= EXACT
    assert sparse_sites()[0]["layers"] == names(2)


def _as_trained(_: Any) -> None:
    """Nothing happens to the model."""


def _with_data_swapped(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _with_new_parameters(model: Any) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            fresh_one = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
            setattr(module, name, fresh_one)


@pytest.mark.parametrize("change", [_as_trained, _with_data_swapped, _with_new_parameters])
@pytest.mark.parametrize("how", ["whole", "regional"])
def test_a_shuffled_sidecar_shows_in_the_result(tmp_path: Path, how: str, change: Any) -> None:
    """What the other tests compare with would not be met by plans in other layers."""
    plans = distinct_plans(3)
    shuffled = [plans[2], plans[0], plans[1]]
    model = wan(layers=3)
    wanted = by_hand(model, plans)
    for given, right in ((plans, True), (shuffled, False)):
        torch.compiler.reset()
        path = tmp_path / f"{right}.veda.safetensors"
        call = compiled(model, how, save_sidecar(path, model, names(3), given, [GRID]))
        run(call, wan_inputs(GRID))
        change(model)
        found = distance(run(call, wan_inputs(GRID)), wanted)
        assert found <= EXACT if right else found > 100 * EXACT


@pytest.mark.parametrize("how", ["whole", "regional"])
def test_two_models_of_one_class_with_shuffled_sidecars(tmp_path: Path, how: str) -> None:
    plans = distinct_plans(3)
    shuffled = [plans[1], plans[2], plans[0]]
    for right in (True, False):
        torch.compiler.reset()
        calls, wanted = [], []
        for seed in (0, 1):
            model = wan(layers=3, seed=seed)
            path = tmp_path / f"{right} {seed}.veda.safetensors"
            given = plans if right else shuffled
            wanted.append(by_hand(model, plans))
            calls.append(compiled(model, how, save_sidecar(path, model, names(3), given, [GRID])))
        for place in (0, 1, 0):
            found = distance(run(calls[place], wan_inputs(GRID)), wanted[place])
            assert found <= EXACT if right else found > 100 * EXACT
