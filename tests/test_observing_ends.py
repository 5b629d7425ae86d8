"""Observing ends: in peace, in error or in an interrupt, everything is as it was before."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from observers import QUICK, Notebook, compiles, regionally, state, wan_layers
from small_transformers import (
    distance,
    run,
    wan,
    wan_inputs,
)
from timed_toys import timed
from torch import Tensor
from toys import latents

import veda_compile
from veda_compile.errors import LayoutError, OptionsError
from veda_compile.observing import ObservedCall, observed

pytestmark = pytest.mark.usefixtures("fresh_compiler", "nothing_waits")

GRID = (4, 8, 12)


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
    options = {**QUICK, "density": 0.3, "sidecar": None}
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
