"""Observing: a model computes what it computes dense, and every video attention call is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from observers import QUICK, Notebook, compiles, regionally, wan_layers
from small_transformers import (
    TEXT,
    Grid,
    Inputs,
    cogvideox,
    cogvideox_inputs,
    distance,
    hunyuan,
    hunyuan_inputs,
    run,
    wan,
    wan_inputs,
)
from timed_toys import checkpointed, in_region, timed
from torch import Tensor, nn
from torch._dynamo.utils import counters
from toys import latents

import veda_compile
from veda_compile.fingerprint import fingerprint, module_tensors
from veda_compile.functional import sparse_attention
from veda_compile.kernels.layout import Extra, Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.observing import ObservedCall, observed
from veda_compile.told import running_call

pytestmark = pytest.mark.usefixtures("fresh_compiler", "nothing_waits")

GRID, FLIPPED, LARGER = (4, 8, 12), (4, 12, 8), (5, 6, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["whole", "regional"])
def test_inductor_computes_the_same_bit_for_bit(how: str, dtype: torch.dtype) -> None:
    model, inputs = wan(layers=1).to(dtype), wan_inputs((2, 4, 6))
    inputs = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    if how == "whole":
        wanted = run(torch.compile(model), inputs)
    else:
        wanted = run(regionally(model, "inductor"), inputs)
    note = Notebook()
    with observed(model, note, options={"min_tokens": 0}) as seen:
        assert torch.equal(run(model, inputs), wanted)
        assert note.names == ["blocks.0.attn1"]
        assert note.calls[0].q.dtype == dtype
        seen.active = False
        assert torch.equal(run(model, inputs), wanted)
    assert len(note.calls) == 1


DUAL = [f"transformer_blocks.{i}.attn" for i in range(2)]
SINGLE = [f"single_transformer_blocks.{i}.attn" for i in range(2)]
COG = [f"transformer_blocks.{i}.attn1" for i in range(2)]

FAMILIES: dict[str, tuple[Any, ...]] = {
    "wan": (wan, wan_inputs, wan_layers(3), lambda *g: Layout.of(Video(*g))),
    "hunyuan": (
        hunyuan,
        hunyuan_inputs,
        DUAL + SINGLE,
        lambda *g: Layout.of(Video(*g), Extra(TEXT)),
    ),
    "cogvideox": (
        cogvideox,
        cogvideox_inputs,
        COG,
        lambda *g: Layout.of(Extra(TEXT), Video(*g)),
    ),
}


@pytest.mark.parametrize(
    ("family", "how"),
    [
        *[("wan", how) for how in ("eager", "whole", "compile", "regional")],
        *[(family, how) for family in ("hunyuan", "cogvideox") for how in ("eager", "regional")],
    ],
)
def test_every_layer_is_seen_in_order(family: str, how: str) -> None:
    """Names, fingerprints, grids, masks and timesteps, however the model is compiled."""
    build: Callable[[], Any]
    build, inputs_of, layers, layout_of = FAMILIES[family]
    model = called = build()
    if how == "whole":
        called = torch.compile(model, backend="aot_eager")
    elif how == "compile":
        model.compile(backend="aot_eager")
    elif how == "regional":
        regionally(model, "veda", options={**QUICK, "density": 0.3})
    note = Notebook()
    with observed(called, note, options=QUICK) as seen:
        assert seen.model_class == type(model).__name__
        for grid, time in ((GRID, 900), (FLIPPED, 100), (LARGER, 500), (GRID, 900)):
            inputs: Inputs = inputs_of(grid)
            inputs["timestep"] = torch.full_like(inputs["timestep"], time)
            run(called, inputs)
            calls = note.take()
            assert [call.layer.name for call in calls] == layers
            assert {call.layout for call in calls} == {layout_of(*grid)}
            assert {call.timestep for call in calls} == {float(time)}
            for call in calls:
                assert call.scale == pytest.approx(call.layer.head_dim**-0.5)
                assert call.q.shape[1:] == (2, call.layout.length, call.layer.head_dim)
                valid = call.key_valid
                if family == "hunyuan":
                    assert valid is not None
                    assert valid.sum() == valid.numel() - 3 and not valid[:, -3:].any()
                else:
                    assert valid is None
        assert [card.name for card in seen.layers] == layers
        for card in seen.layers:
            attention = model.get_submodule(card.name)
            assert card.fingerprint == fingerprint(module_tensors(attention))
        if family == "wan":
            assert {site.reason for site in seen.left} == {"CROSS_ATTENTION"}
            assert len(seen.left) == (1 if how == "regional" else 3)


def test_the_operands_are_those_of_the_attention() -> None:
    """Hooks on the eager model see the same queries and keys."""
    model, inputs = wan(), wan_inputs(GRID)
    real, wanted = torch.nn.functional.scaled_dot_product_attention, []

    def spy(query: Tensor, key: Tensor, *rest: Any, **named: Any) -> Tensor:
        if query.shape == key.shape:
            wanted.append((query, key))
        return real(query, key, *rest, **named)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", spy):
        run(model, inputs)
    note = Notebook()
    with observed(model, note, options=QUICK):
        run(model, inputs)
    assert len(wanted) == len(note.calls) == 3
    for (query, key), call in zip(wanted, note.calls, strict=True):
        assert distance(query, call.q) <= 1e-5 and distance(key, call.k) <= 1e-5


def test_no_more_compiles_than_the_backend() -> None:
    grids: tuple[Grid, ...] = (GRID, FLIPPED, LARGER, (3, 10, 14), GRID)
    regionally(model := wan(), "veda", options=QUICK)
    for grid in grids:
        run(model, wan_inputs(grid))
    needed = compiles()
    torch.compiler.reset()
    counters.clear()
    note = Notebook()
    with observed(model, note, options=QUICK):
        for grid in grids:
            run(model, wan_inputs(grid))
    assert compiles() == needed <= 2
    assert [call.layout for call in note.calls[::3]] == [Layout.of(Video(*g)) for g in grids]


def test_dynamic_stays_as_it_was_asked_for() -> None:
    model = wan()
    for block in model.blocks:
        block.compile(backend="veda", options=QUICK, dynamic=False)
    with observed(model, Notebook(), options=QUICK):
        for grid in (GRID, LARGER, (3, 10, 14)):
            run(model, wan_inputs(grid))
        assert compiles() == 3


def test_the_same_parameters_under_other_names() -> None:
    """Layers that are alike in all small parameters are still told apart."""
    model = wan()
    for block in model.blocks[1:]:
        with torch.no_grad():
            for mine, first in zip(block.parameters(), model.blocks[0].parameters(), strict=True):
                mine.copy_(first)
    note = Notebook()
    with observed(regionally(model, "veda", options=QUICK), note, options=QUICK):
        run(model, wan_inputs(GRID))
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
        run(model, wan_inputs(GRID))
    assert note.names == wan_layers(3) * 2


@pytest.mark.parametrize("run_block", [checkpointed, in_region])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_inside_nested_graphs(run_block: Callable[[nn.Module, Tensor], Tensor], inner: str) -> None:
    model, time, note = timed(run_block=run_block), torch.tensor([900.0]), Notebook()
    with torch.no_grad():
        wanted = torch.compile(model, backend=inner)(latents(), timestep=time)
        with observed(model, note, options={**QUICK, "inner": inner}):
            assert torch.equal(model(latents(), timestep=time), wanted)
    assert note.names == ["blocks.0", "blocks.1"]
    assert {call.timestep for call in note.calls} == {900.0}


class Shuffled(nn.Module):
    """A toy whose tokens stand in another order than raster."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = timed()
        self.order: Tensor
        self.register_buffer(
            "order", torch.randperm(72, generator=torch.Generator().manual_seed(3))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.toy.embed(self.toy.tokens(x))[:, self.order]
        for block in self.toy.blocks:
            x = self.toy.step(block, x)
        return x[:, self.order.argsort()]


def test_other_orders_are_brought_into_raster_order() -> None:
    model, note = Shuffled(), Notebook()
    plain, expected = timed(), Notebook()
    with torch.no_grad():
        with observed(model, note, options=QUICK):
            model(latents())
        with observed(plain, expected, options=QUICK):
            plain(latents())
    assert note.names == ["toy.blocks.0", "toy.blocks.1"]
    for found, wanted in zip(note.calls, expected.calls, strict=True):
        assert found.layout == wanted.layout
        assert distance(found.q, wanted.q) <= 1e-5 and distance(found.k, wanted.k) <= 1e-5


def test_an_observer_may_learn() -> None:
    """Gradients of its own, and sparse attention of what it sees."""
    model, weight = wan(), torch.ones(24, requires_grad=True)
    losses = []

    def learn(call: ObservedCall) -> None:
        plan = Plan.uniform(2, (4, 4, 4), 1.0)
        full = sparse_attention(call.q, call.k, call.v, layout=call.layout, plan=plan)
        dense = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v)
        assert distance(full, dense) <= 1e-5
        with torch.enable_grad():
            loss = (call.q * weight).square().mean()
            loss.backward()
        losses.append(float(loss))

    with observed(model, learn, options=QUICK):
        run(model, wan_inputs(GRID))
    assert len(losses) == 3
    assert weight.grad is not None and bool(weight.grad.abs().sum() > 0)


def test_what_the_user_attached_still_tells_the_grid() -> None:
    model, note = timed(), Notebook()
    veda_compile.attach(model, grid=(3, 4, 6))
    regionally(model, "veda", options=QUICK)
    with torch.no_grad(), observed(model, note, options=QUICK):
        model(latents(), timestep=torch.tensor([300.0]))
    assert note.names == ["blocks.0", "blocks.1"]
    assert {call.layout for call in note.calls} == {Layout.of(Video(3, 4, 6))}
    assert running_call() is None


def test_what_would_stay_dense_is_not_observed() -> None:
    """A block without positions shows no grid; a short video is faster dense."""
    model, note = regionally(timed(), "veda", options=QUICK), Notebook()
    with torch.no_grad(), observed(model, note, options=QUICK) as seen:
        model(latents())
    assert note.calls == [] and [site.reason for site in seen.left] == ["NO_GRID"]
    short = wan()
    with observed(short, note) as seen:
        run(short, wan_inputs((2, 4, 6)))
    assert note.calls == []
    assert {site.reason for site in seen.left} == {"CROSS_ATTENTION", "TOO_FEW_TOKENS"}
    named = wan()
    with observed(named, note, options={**QUICK, "dense_layers": ["blocks.1.attn1"]}):
        run(named, wan_inputs(GRID))
    assert note.names == ["blocks.0.attn1", "blocks.2.attn1"]
