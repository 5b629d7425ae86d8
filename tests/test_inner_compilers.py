"""What compiles the rewritten graph: the same numbers from each, and settings for it alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch._inductor.compile_fx
from small_transformers import QUICK, Grid, distance, run, wan, wan_inputs
from torch._inductor import config

import veda_compile

GRID: Grid = (4, 8, 12)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    veda_compile.reset_report()
    yield
    torch.compiler.reset()


def compiled(**options: Any) -> Any:
    model = wan(layers=2)
    chosen = {**QUICK, "density": 0.3, **options}
    model.compile_repeated_blocks(backend="veda", options=chosen)
    return model


def test_every_inner_compiler_gives_the_same_numbers() -> None:
    wanted = run(compiled(), wan_inputs(GRID))
    for inner in ("aot_eager", "inductor"):
        torch.compiler.reset()
        assert distance(run(compiled(inner=inner), wan_inputs(GRID)), wanted) <= 1e-4, inner
    assert veda_compile.report().to_dict()["totals"]["rewritten"] >= 1


def test_a_mode_is_for_its_graph_alone() -> None:
    """Settings reach Inductor as patches of one call; the global ones stay as they were."""
    before = copy.deepcopy(config.get_config_copy())
    patches: list[Any] = []
    during: list[bool] = []

    def compile_fx(gm: Any, inputs: Any, config_patches: Any = None) -> Any:
        patches.append(config_patches)
        during.append(config.max_autotune)
        return gm.forward

    with mock.patch.object(torch._inductor.compile_fx, "compile_fx", compile_fx):
        run(compiled(inner="inductor", mode="max-autotune-no-cudagraphs"), wan_inputs(GRID))
        torch.compiler.reset()
        run(compiled(inner="inductor"), wan_inputs(GRID))
    assert patches[0] == torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    assert patches[0]["max_autotune"] and not patches[1]
    assert during == [config.max_autotune] * 2
    assert config.get_config_copy() == before


def test_the_mode_argument_of_torch_compile() -> None:
    seen: list[Any] = []

    def compile_fx(gm: Any, inputs: Any, config_patches: Any = None) -> Any:
        seen.append(config_patches)
        return gm.forward

    with mock.patch.object(torch._inductor.compile_fx, "compile_fx", compile_fx):
        call = torch.compile(torch.sin, backend="veda", mode="max-autotune-no-cudagraphs")
        call(torch.ones(3))
    assert seen == [torch._inductor.list_mode_options("max-autotune-no-cudagraphs")]


def test_reset_compiles_anew() -> None:
    model = compiled()
    first = run(model, wan_inputs(GRID))
    torch.compiler.reset()
    veda_compile.reset_report()
    assert torch.equal(run(model, wan_inputs(GRID)), first)
    assert len(veda_compile.report().graphs) == 1
