"""A sweep of launch configurations: what belongs in kernels/triton/configs.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.attention import DTYPES
from benchmarks.gpu.exact import kept_pairs, sampled_error
from benchmarks.gpu.sizes import Size, call_of, video_tensors
from benchmarks.gpu.stage import Job, Setting, SkippedError
from benchmarks.gpu.timing import Stopwatch

DENSITY = 0.2
KINDS = ((128, 128), (128, 64), (64, 128), (64, 64), (96, 128), (96, 64))
"""(head_dim, tile size), most important first."""


def jobs(setting: Setting) -> Iterator[Job]:
    """One job per configuration; the shipped one is the first of its kind."""
    grid = (2, 8, 8) if setting.smoke else (21, 45, 80)
    for head_dim, tile_size in ((64, 64),) if setting.smoke else KINDS:
        sweep = _Sweep(setting, Size("tune", grid, 2 if setting.smoke else 8, head_dim=head_dim))
        for change in _changes(tile_size, setting.smoke):
            shown = ", ".join(f"{name} {value}" for name, value in change.items()) or "as shipped"
            case = f"head_dim {head_dim}, tile {tile_size}: {shown}"
            yield Job(case, partial(sweep.measure, tile_size, change), 2.0)


def _changes(tile_size: int, smoke: bool) -> Iterator[dict[str, int]]:
    """What differs from the shipped configuration, by field."""
    yield {}
    block_ms = (tile_size,) if smoke or tile_size == 64 else (tile_size, tile_size // 2)
    block_ns = (32,) if smoke else tuple(n for n in (64, 128, 32) if n <= tile_size)
    warps, stages = ((4,), (2,)) if smoke else ((4, 8), (2, 3, 4, 5))
    for m, n, w, s in itertools.product(block_ms, block_ns, warps, stages):
        yield {"block_m": m, "block_n": n, "num_warps": w, "num_stages": s}


class _Sweep:
    """One head_dim; the tensors are made once."""

    def __init__(self, setting: Setting, size: Size) -> None:
        self.setting = setting
        self.size = size
        self._tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def measure(self, tile_size: int, change: dict[str, int]) -> dict[str, Any]:
        """The forward kernel alone under one configuration, checked first."""
        if self.setting.executor_name != "triton":
            raise SkippedError("only the triton executor has launch configurations")
        from triton.runtime.errors import OutOfResources

        from veda_compile.kernels.triton import attend
        from veda_compile.kernels.triton.executor import TritonExecutor

        dtype = torch.float16 if self.setting.device == "cpu" else DTYPES["cuda"]
        if self._tensors is None:
            self._tensors = video_tensors(self.size, dtype, self.setting.device, self.setting.seed)
        call = call_of(self.size, self._tensors, DENSITY, tile_size)
        executor, shipped = TritonExecutor(), attend.attend_config
        used = []

        def chosen(*arguments: Any, **named: Any) -> Any:
            used.append(replace(shipped(*arguments, **named), **change))
            return used[-1]

        selection = executor.select(call)
        with mock.patch.object(attend, "attend_config", chosen):
            run = partial(executor.attend, call, selection)
            try:
                error = sampled_error(call, selection, run()[0])
            except OutOfResources as reason:
                raise SkippedError(str(reason)) from reason
            (timing,) = Stopwatch(self.setting.device).measure([run], self.setting.patience / 3)
        if not used:
            raise SkippedError("attend no longer asks attend_config for its launch")
        rate = self.size.flops(kept_pairs(call, selection)) / (timing.median * 1e9)
        return {
            "head_dim": self.size.head_dim,
            "tile_size": tile_size,
            "dtype": str(dtype).removeprefix("torch."),
            "shipped": not change,
            "config": asdict(used[-1]),
            "errors": {"exact": error},
            "attend": timing.to_dict() | {"tflops": round(rate, 2)},
        }
