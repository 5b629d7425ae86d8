"""Observing: a model computes what it computes dense, and every video attention call is seen."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
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
from veda_compile.errors import LayoutError, OptionsError
from veda_compile.fingerprint import fingerprint, module_tensors
from veda_compile.functional import sparse_attention
from veda_compile.kernels.layout import Extra, Layout, Video
from veda_compile.kernels.observe_op import waiting
from veda_compile.kernels.plan import Plan
from veda_compile.observing import ObservedCall, observed
from veda_compile.sidecar_schema import LayerCard
from veda_compile.told import running_call

pytestmark = pytest.mark.usefixtures("fresh_compiler", "nothing_waits")

GRID, FLIPPED, LARGER = (4, 8, 12), (4, 12, 8), (5, 6, 16)
QUICK: dict[str, Any] = {"min_tokens": 0, "inner": "eager"}


@pytest.fixture
def nothing_waits() -> Iterator[None]:
    """Whatever a test does, no run of a graph is left behind in the register."""
    counters.clear()
    yield
    assert waiting() == 0 and running_call() is None


def compiles() -> int:
    return int(counters["stats"]["unique_graphs"])


@dataclass(frozen=True, eq=False)
class Kept:
    """A copy of an observed call, and the dense attention of its operands."""

    layer: LayerCard
    layout: Layout
    scale: float
    timestep: float | None
    q: Tensor
    k: Tensor
    key_valid: Tensor | None


class Notebook:
    """An observer that keeps what it gets."""

    def __init__(self) -> None:
        self.calls: list[Kept] = []

    def __call__(self, call: ObservedCall) -> None:
        valid = None if call.key_valid is None else call.key_valid.clone()
        time = None if call.timestep is None else float(call.timestep)
        assert call.timestep is None or (call.timestep.dim(), call.timestep.dtype) == (
            0,
            torch.float32,
        )
        assert not call.q.requires_grad
        self.calls.append(
            Kept(call.layer, call.layout, call.scale, time, call.q.clone(), call.k.clone(), valid)
        )

    @property
    def names(self) -> list[str]:
        return [call.layer.name for call in self.calls]

    def take(self) -> list[Kept]:
        """What was seen since the last time."""
        calls, self.calls = self.calls, []
        return calls


def regionally(model: Any, backend: Any, **settings: Any) -> Any:
    for kind in ("blocks", "transformer_blocks", "single_transformer_blocks"):
        for block in getattr(model, kind, ()):
            block.compile(backend=backend, **settings)
    return model


def state(model: nn.Module) -> list[tuple[Any, ...]]:
    """What a module is called by, of all modules."""
    return [
        (
            module,
            dict(module.__dict__),
            list(module._forward_pre_hooks.items()),
            list(module._forward_hooks.items()),
        )
        for module in model.modules()
    ]


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


def wan_layers(count: int) -> list[str]:
    return [f"blocks.{i}.attn1" for i in range(count)]


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


def test_calls_pass_unobserved_while_it_is_not_active() -> None:
    model, note = wan(), Notebook()
    with observed(model, note, options=QUICK) as seen:
        seen.active = False
        run(model, wan_inputs(GRID))
        assert (note.calls, seen.layers) == ([], [])
        seen.active = True
        run(model, wan_inputs(GRID))
        assert note.names == wan_layers(3)
        assert compiles() == 1


@pytest.mark.parametrize(
    ("how", "failure"),
    [
        ("eager", ValueError("mine")),
        ("whole", ValueError("mine")),
        ("compile", KeyboardInterrupt()),
        ("regional", KeyboardInterrupt()),
    ],
)
def test_everything_is_as_before(how: str, failure: BaseException) -> None:
    """After an end in peace, in error and in an interrupt, which reach the caller as they are."""
    model = called = wan(layers=2)
    options = {**QUICK, "density": 0.3}
    if how == "whole":
        called = torch.compile(model, backend="veda", options=options)
    elif how == "compile":
        model.compile(backend="veda", options=options)
    elif how == "regional":
        regionally(model, "veda", options=options)
    inputs = wan_inputs(GRID)
    sparse = run(called, inputs)
    before, needed = state(called), compiles()

    def fail(_: ObservedCall) -> None:
        raise failure

    with observed(called, Notebook(), options=QUICK):
        assert how == "eager" or distance(run(called, inputs), sparse) > 1e-3
    assert state(called) == before
    with pytest.raises(type(failure)) as raised, observed(called, fail, options=QUICK):
        run(called, inputs)
    assert raised.value is failure
    assert state(called) == before
    needed = compiles()
    assert torch.equal(run(called, inputs), sparse)
    assert compiles() == needed


def test_one_may_be_caught_inside_and_the_next_call_is_seen() -> None:
    model, inputs = wan(), wan_inputs(GRID)
    note, fails = Notebook(), [True]

    def sometimes(call: ObservedCall) -> None:
        if fails[0]:
            raise ValueError("mine")
        note(call)

    with observed(model, sometimes, options=QUICK):
        with pytest.raises(ValueError, match="mine"):
            run(model, inputs)
        fails[0] = False
        run(model, inputs)
    assert note.names == wan_layers(3)


def test_many_sessions_do_not_reach_the_recompile_limit() -> None:
    if not hasattr(torch._dynamo.eval_frame, "_get_total_cache_entry_count"):
        pytest.skip("this torch keeps the graphs of all backends in one place")
    model, inputs = wan(layers=1), wan_inputs((2, 4, 6))
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        note = Notebook()
        with observed(model, note, options=QUICK):
            run(model, inputs)
        assert note.names == wan_layers(1)


def test_nothing_is_kept() -> None:
    model, inputs = wan(), wan_inputs(GRID)
    seen: list[weakref.ref[Tensor]] = []

    class Watcher:
        def __call__(self, call: ObservedCall) -> None:
            seen.extend(weakref.ref(x) for x in (call.q, call.k, call.v))

    watcher = Watcher()
    held = weakref.ref(watcher)
    with observed(model, watcher, options=QUICK) as found:
        run(model, inputs)
        assert len(seen) == 9 and all(ref() is None for ref in seen)
    del watcher
    gc.collect()
    assert held() is None  # nor the compiled graphs, which call it
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert [card.name for card in found.layers] == wan_layers(3)


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


def test_a_wrong_grid_is_refused_before_anything_is_observed() -> None:
    model, note = regionally(timed(), "veda", options=QUICK), Notebook()
    grids = [(3, 4, 6), (3, 4, 5)]
    attached = veda_compile.attach(model, grid=lambda *_, **__: grids[0])
    with torch.no_grad(), observed(model, note, options=QUICK):
        model(latents())
        grids.pop(0)
        with pytest.raises(LayoutError):
            model(latents())
    attached.remove()
    assert len(note.calls) == 2


def test_wrong_options_are_refused_at_once() -> None:
    model = wan()
    before = state(model)
    wrong = observed(model, Notebook(), options={"min_token": 0})
    with pytest.raises(OptionsError, match="min_token"), wrong:
        pass
    assert state(model) == before
