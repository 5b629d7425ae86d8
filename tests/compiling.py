"""Compiling models in tests: graphs captured from Dynamo, and watching what runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

import veda_compile
from benchmarks.zoo import call, entry
from veda_compile.backend import veda
from veda_compile.kernels import op
from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.executors import execute
from veda_compile.report import SiteRecord

GRID = (5, 6, 10)
QUICK = {"min_tokens": 0, "sidecar": None, "inner": "eager"}

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "full cpu": {**QUICK, "density": 1.0, "executor": "cpu"},
    "full reference": {**QUICK, "density": 1.0, "executor": "reference"},
    "sparse cpu": {**QUICK, "density": 0.3, "executor": "cpu"},
    "sparse reference": {**QUICK, "density": 0.3, "executor": "reference"},
}


def compiled(model: Any, **options: Any) -> Any:
    """`model` compiled by the backend without Inductor, sparse however short the video."""
    return torch.compile(model, backend="veda", options={**QUICK, "density": 1.0, **options})


def run(model: Any, *args: Any, **options: Any) -> tuple[Tensor, list[SiteRecord]]:
    """The output of a freshly compiled model or function, and its attention calls."""
    veda_compile.reset_report()
    with torch.no_grad():
        out = compiled(model, **options)(*args)
    return out, veda_compile.report().sites


@dataclass
class Captured:
    """A Dynamo graph and the inputs its backend was given."""

    gm: fx.GraphModule
    inputs: list[Any]


def capture(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Captured:
    """The one graph Dynamo makes of a call."""
    graphs: list[Captured] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(Captured(gm, list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend, fullgraph=True)(*args, **kwargs)
    assert len(graphs) == 1
    return graphs[0]


class DenseCalls(TorchFunctionMode):
    """Counts calls of dense attention."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch._C._nn.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@dataclass
class Ran:
    """One compiled variant of a model: its output, report and the attention that really ran."""

    out: Tensor
    sites: list[SiteRecord]
    sparse: list[tuple[AttentionCall, Tensor]]
    dense: int


@contextmanager
def sparse_calls() -> Iterator[list[tuple[AttentionCall, Tensor]]]:
    """Every call of the sparse op with its output, as it reaches the executors."""
    seen: list[tuple[AttentionCall, Tensor]] = []

    def spy(requested: str, attention: AttentionCall) -> Any:
        result = execute(requested, attention)
        seen.append((attention, result[0]))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "execute", spy)
        yield seen


@dataclass
class Traced:
    """A model of the zoo, traced once and compiled with all `SETTINGS`."""

    dense: Tensor
    captured: Captured
    ran: dict[str, Ran] = field(default_factory=dict)


@cache
def traced(name: str, dtype: torch.dtype = torch.float32) -> Traced:
    """Compile and run a model of the zoo; tracing is what takes the time, so it is done once."""
    model, inputs = entry(name).make(GRID)
    model, inputs = model.to(dtype), {key: _as(value, dtype) for key, value in inputs.items()}
    traces: list[Traced] = []
    outs: dict[str, Any] = {}
    with torch.no_grad():
        dense = call(model, inputs)

        def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            trace = Traced(dense, Captured(gm, list(example_inputs)))
            traces.append(trace)
            variants: dict[str, Any] = {}
            for setting, options in SETTINGS.items():
                variants[setting] = veda(gm, example_inputs, options=options)
                trace.ran[setting] = Ran(dense, veda_compile.report().sites[:], [], 0)
                veda_compile.reset_report()

            def run_all(*args: Any) -> Any:
                for setting, variant in variants.items():
                    with sparse_calls() as sparse, DenseCalls() as mode:
                        outs[setting] = variant(*args)
                    trace.ran[setting].sparse = sparse
                    trace.ran[setting].dense = mode.count
                return outs["full cpu"]

            return run_all

        veda_compile.reset_report()
        torch._dynamo.reset()
        torch.compile(model, backend=backend, dynamic=False)(**inputs)
    assert len(traces) == 1, f"{name}: {len(traces)} graphs"
    for setting, out in outs.items():
        traces[0].ran[setting].out = out[0]
    return traces[0]


def _as(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return tuple(_as(part, dtype) for part in value) if isinstance(value, tuple) else value
