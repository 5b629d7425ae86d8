"""Of a layer's attention: memory, rounding, tiles of 64 rows, a tile shape for each head."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.gpu.accuracy import rounding_errors
from benchmarks.gpu.attention import Layer, forget_tensors
from benchmarks.gpu.baselines import Attention, baselines
from benchmarks.gpu.memory import above_dense, peak_of
from benchmarks.gpu.plan_trials import mixed_shapes
from benchmarks.gpu.sizes import LONG, SMOKE_SIZES, WAN_14B, Size, plan_of
from benchmarks.gpu.stage import Job, Setting, SkippedError
from veda_compile.kernels.plan import Plan

DENSITIES = (0.1, 0.05)
SMALL_TILE_DENSITIES = (0.1, 0.05, 0.2)
MIXED_DENSITIES = (0.1, 0.05)


def jobs(setting: Setting) -> Iterator[Job]:
    """Everything for one size, then memory for the longest one."""
    size = SMOKE_SIZES[0] if setting.smoke else WAN_14B
    layer = Layer(setting, size)
    for density in DENSITIES:
        named = f"{size.name}, density {density}"
        yield Job(f"{named}: memory", partial(_memory, layer, density), 5.0)
        yield Job(f"{named}: rounding", partial(_rounding, layer, density), 5.0)
    for density in SMALL_TILE_DENSITIES:
        plan = plan_of(size, density, 64)
        yield Job(
            f"{size.name}, density {density}: tiles of 64",
            partial(layer.sparse, density, plan),
            10.0,
        )
        yield _beside(layer, f"{size.name}, density {density}, tiles of 64", density, plan)
    for density in MIXED_DENSITIES:
        shapes = mixed_shapes(size.heads, 64 if setting.smoke else 128)
        plan = Plan(shapes, (density,) * size.heads)
        yield Job(
            f"{size.name}, density {density}: eight tile shapes",
            partial(layer.sparse, density, plan),
            10.0,
        )
        yield _beside(layer, f"{size.name}, density {density}, eight tile shapes", density, plan)
    del layer
    forget_tensors(setting.device)
    if not setting.smoke:
        yield Job(f"{LONG.name}, density 0.1: memory", partial(_fresh_memory, setting, LONG), 10.0)


def _beside(layer: Layer, named: str, density: float, plan: Plan) -> Job:
    """As in the stage "attention", for `kernels/kernel_tables.py`."""
    work = partial(layer.beside, "hopper", "triton", density, plan)
    return Job(f"{named}: hopper beside triton", work, 5.0)


def _fresh_memory(setting: Setting, size: Size) -> dict[str, Any]:
    return _memory(Layer(setting, size), DENSITIES[0])


def _memory(layer: Layer, density: float) -> dict[str, Any]:
    """Peaks of one whole call each, above q, k and v."""
    if layer.setting.device != "cuda":
        raise SkippedError("only a GPU counts its memory")
    call = layer.call(density)
    dense = peak_of(lambda: layer.best(*layer.tensors))
    sparse = peak_of(partial(layer.whole, call))
    inputs = sum(x.numel() * x.element_size() for x in layer.tensors)
    return layer.about() | {
        "density": density,
        "executor": layer.executor(call).name,
        "baseline": layer.best_name,
        "qkv_bytes": inputs,
        "dense_bytes": dense.peak,
        "sparse_bytes": sparse.peak,
        "cached_bytes": sparse.kept,
        "memory_above_dense": round(above_dense(sparse, dense, inputs), 5),
    }


def _rounding(layer: Layer, density: float) -> dict[str, Any]:
    """Errors against float64, and ours over the smallest of dense attention's."""
    call = layer.call(density)
    executor = layer.executor(call)
    selection = executor.select(call)
    out, _ = executor.attend(call, selection)
    found = rounding_errors(call, selection, out, _dense_kernels(layer.setting.device))
    ours = found.pop("ours")
    if not found:
        raise SkippedError("no dense attention takes a single tile's queries")
    best = min(found, key=lambda name: found[name])
    return layer.about() | {
        "density": density,
        "executor": executor.name,
        "rounding": {"ours": ours, **found},
        "rounding_baseline": best,
        "rounding_ratio": round(ours / found[best], 4),
    }


def _dense_kernels(device: str) -> dict[str, Attention]:
    """SDPA's kernels by name: FlexAttention would be compiled anew for every length."""
    return {name: make() for name, make in baselines(device).items() if name.startswith("sdpa")}
