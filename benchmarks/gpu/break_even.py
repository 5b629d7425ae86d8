"""From which length on sparse attention is faster; the cost model is fitted to it, among others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.attention import DTYPES
from benchmarks.gpu.baselines import baselines
from benchmarks.gpu.exact import sampled_error
from benchmarks.gpu.sizes import Size, Tensors, call_of, video_tensors
from benchmarks.gpu.stage import Job, Setting, SkippedError
from benchmarks.gpu.timing import Stopwatch
from veda_compile.functional import sparse_attention
from veda_compile.kernels.executors import Traits, choose_executor

DENSITY = 0.2
GRIDS = (
    (8, 16, 16), (12, 16, 16), (16, 16, 16), (12, 16, 32), (16, 16, 32), (12, 32, 32),
    (16, 32, 32), (24, 32, 32), (32, 32, 32), (48, 32, 32), (64, 32, 32),
)  # fmt: skip
HEADS = (12, 40)


def jobs(setting: Setting) -> Iterator[Job]:
    """One job per length and number of heads."""
    grids = ((2, 8, 8), (4, 8, 8)) if setting.smoke else GRIDS
    for heads in (2,) if setting.smoke else HEADS:
        for grid in grids:
            tokens = math.prod(grid)
            size = Size(f"{tokens} tokens", grid, heads, head_dim=64 if setting.smoke else 128)
            yield Job(f"{tokens} tokens, {heads} heads", partial(_measure, setting, size), 3.0)


def _measure(setting: Setting, size: Size) -> dict[str, Any]:
    """Whole op calls against the best SDPA, which takes turns with them."""
    dtype = DTYPES[setting.device]
    tensors = video_tensors(size, dtype, setting.device, setting.seed)
    call = call_of(size, tensors, DENSITY)
    traits = Traits(setting.device, dtype, size.head_dim, call.plan.tile_size)
    selection = choose_executor(setting.executor, traits).select(call)
    sparse = partial(
        sparse_attention, *tensors, layout=call.layout, plan=call.plan, executor=setting.executor
    )
    error = sampled_error(call, selection, sparse())
    dense = _dense(setting.device, tensors)
    found = Stopwatch(setting.device).measure(
        [sparse, *dense.values()], 2 * setting.patience, least=20
    )
    times = dict(zip(("sparse", *dense), found, strict=True))
    best = min(dense, key=lambda name: times[name].median)
    return {
        "tokens": size.tokens,
        "grid": size.grid,
        "text": size.text,
        "heads": size.heads,
        "batch": size.batch,
        "head_dim": size.head_dim,
        "density": DENSITY,
        "dtype": str(dtype).removeprefix("torch."),
        "tile": call.plan.tile_shapes[0],
        "errors": {"exact": error},
        "best": best,
        "times": {name: timing.to_dict() for name, timing in times.items()},
        "speedup": round(times[best].median / times["sparse"].median, 3),
        "speedup_with_launching": round(
            max(times[best].median, times[best].host)
            / max(times["sparse"].median, times["sparse"].host),
            3,
        ),
    }


def _dense(device: str, tensors: Tensors) -> dict[str, Callable[[], torch.Tensor]]:
    """The kernels of SDPA that run here, by name."""
    found = {}
    for name, make in baselines(device).items():
        if name.startswith("sdpa"):
            run = partial(make(), *tensors)
            try:
                run()
            except RuntimeError:
                continue
            found[name] = run
    if not found:
        raise SkippedError("no SDPA kernel runs here")
    return found
