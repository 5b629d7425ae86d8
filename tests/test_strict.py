"""Option `strict` and `report().require()`: dense attention is an error that names every layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distinct_sidecars import refused
from explained_models import Model
from small_transformers import QUICK, Grid, run, wan, wan_inputs
from torch import nn

import veda_compile
from veda_compile.errors import StrictError

GRID: Grid = (3, 4, 4)
LATENT = torch.ones(1, 16, 4, 8, 12)
STRICT = {**QUICK, "strict": True}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    veda_compile.reset_report()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module | None = None, **options: Any) -> Any:
    model = model or Model().requires_grad_(False)
    return torch.compile(model, backend="veda", options={**STRICT, **options})


def test_all_sparse_is_fine() -> None:
    compiled()(LATENT)
    veda_compile.report().require()
    torch.compiler.reset()
    compiled(dense_layers=(0,))(LATENT)  # the user's own choice
    veda_compile.report().require()


def test_too_few_tokens_everywhere() -> None:
    with refused(StrictError, "min_tokens=0", "384"):
        compiled(min_tokens=1000)(LATENT)


def test_every_layer_is_named_with_the_remedy() -> None:
    with refused(StrictError, "no_grad", "layers.0", "layers.1"):
        compiled(Model().requires_grad_(True))(LATENT)


@pytest.mark.parametrize("compile_blocks", [True, False])
def test_on_a_real_model(compile_blocks: bool) -> None:
    model: Any = wan(layers=2)
    if compile_blocks:
        model.compile_repeated_blocks(backend="veda", options=STRICT)
    else:
        model = torch.compile(model, backend="veda", options=STRICT)
    for _ in range(4):
        run(model, wan_inputs(GRID))
    veda_compile.report().require()


def test_a_silent_miss_fails_after_a_pass_that_showed_nothing_new() -> None:
    model = wan()
    model.blocks[0].compile(backend="veda", options=STRICT)
    run(model, wan_inputs(GRID))  # what else this call will bring is not known yet
    run(model, wan_inputs(GRID))  # it brings nothing: the next call knows
    with pytest.raises(StrictError, match=r"blocks\.1\.\.2\.attn1\.\.2 x4.*WanTransformerBlock"):
        run(model, wan_inputs(GRID))


@torch.no_grad()
def test_a_graph_break_in_the_model_fails_too() -> None:
    call = compiled(Model(breaks=True), grid=(4, 8, 12))
    call(LATENT)
    call(LATENT)
    with pytest.raises(StrictError, match=r"layers\.1: .*torch\.compiler\.disable"):
        call(LATENT)


def test_a_call_that_failed_is_not_mistaken_for_a_whole_pass() -> None:
    model = wan()
    model.compile_repeated_blocks(backend="veda", options=STRICT)

    def fail(*_: Any) -> None:
        raise MemoryError

    hook = model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        run(model, wan_inputs(GRID))
    hook.remove()
    for _ in range(4):
        run(model, wan_inputs(GRID))


def test_the_report_can_be_asked_at_once() -> None:
    model = wan()
    model.blocks[0].compile(backend="veda", options=QUICK)
    run(model, wan_inputs(GRID))
    with pytest.raises(StrictError, match=r"blocks\.1\.\.2\.attn1\.\.2 x4"):
        veda_compile.report().require()


def test_an_empty_report_proves_nothing() -> None:
    with pytest.raises(StrictError, match="no attention"):
        veda_compile.report().require()
    with pytest.raises(StrictError, match="compile it with backend='veda'"):
        veda_compile.report(Model()).require()
