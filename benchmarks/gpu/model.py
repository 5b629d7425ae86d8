"""One denoising step of whole models: dense Inductor against the veda backend, no sidecar."""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import time
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import veda_compile
from benchmarks.gpu.attention import DTYPES
from benchmarks.gpu.exact import relative_error
from benchmarks.gpu.machine import missing
from benchmarks.gpu.models import MODELS, SMOKE_MODELS, Inputs, Model
from benchmarks.gpu.stage import Job, Setting, SkippedError, WrongResultError
from benchmarks.gpu.timing import Stopwatch, Timing
from veda_compile.backend import veda

TOLERANCE = 5e-2
"""Largest accepted ||sparse - dense|| / ||dense|| of a whole model at density 1.0."""

_ORDERS = {
    "cudnn, flash, efficient, math": [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ],
    "torch's own": None,
}
"""Which of SDPA's kernels to prefer: the fastest, or what torch chooses where that one fails."""


def jobs(setting: Setting) -> Iterator[Job]:
    """By model: dense, then its densities; the first also checks density 1.0."""
    for model in SMOKE_MODELS if setting.smoke else MODELS:
        torch._dynamo.reset()
        step = _Step(setting, model)
        seconds = 15.0 + 2.0 * model.layers
        yield Job(f"{model.name}, dense", step.dense, seconds)
        for density in model.densities:
            yield Job(f"{model.name}, density {density}", partial(step.sparse, density), seconds)
        if model.masked:
            yield Job(f"{model.name}, dense with its key mask", step.dense_masked, seconds)
        del step
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()


class _Compiled:
    """A compiled model that has run once.

    out: what it returned. compile_s: seconds of that call. order: a key of `_ORDERS`.
    masked: see `Model`, to leave out the mask; it must be left out in every call, or Dynamo would
    trace again.
    """

    def __init__(self, module: Any, inputs: Inputs, masked: str | None = None) -> None:
        self._module, self._inputs, self._masked = module, inputs, masked
        failure: RuntimeError | None = None
        for self.order in _ORDERS:
            began = time.perf_counter()
            try:
                self.out = self.run()
                float(self.out.flatten()[0])  # waits for the device
            except RuntimeError as error:
                failure = error
                continue
            self.compile_s = round(time.perf_counter() - began, 1)
            return
        raise failure or AssertionError("no order to try")

    def run(self) -> torch.Tensor:
        """One step."""
        order = _ORDERS[self.order]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if order is not None:
                stack.enter_context(sdpa_kernel(order, set_priority=True))
            if self._masked is not None:
                stack.enter_context(
                    mock.patch(f"{self._masked}.dispatch_attention_fn", _unmasked(self._masked))
                )
            out: torch.Tensor = self._module(**self._inputs)[0]
            return out


@cache
def _unmasked(module: str) -> Callable[..., torch.Tensor]:
    """diffusers' attention, without the mask that rules nothing out."""
    original = importlib.import_module(module).dispatch_attention_fn

    def attend(*tensors: torch.Tensor, **named: Any) -> torch.Tensor:
        out: torch.Tensor = original(*tensors, **{**named, "attn_mask": None})
        return out

    return attend


class _Step:
    """The measurements of one model; weights and the dense compilation are made once."""

    def __init__(self, setting: Setting, model: Model) -> None:
        self.setting = setting
        self.model = model
        self.watch = Stopwatch(setting.device)
        self._error: float | None = None

    def dense(self) -> dict[str, Any]:
        """The model as torch.compile makes it, without a mask that rules nothing out."""
        (timing,) = self._measure([self._dense.run])
        return self._about(self._dense) | {"dense": timing.to_dict()}

    def dense_masked(self) -> dict[str, Any]:
        """The same with the mask."""
        masked = _Compiled(self._inner(), self._made[1])
        (timing,) = self._measure([masked.run])
        return self._about(masked) | {"dense": timing.to_dict()}

    def sparse(self, density: float) -> dict[str, Any]:
        """The model with backend veda, in turn with the dense one.

        Raises WrongResultError where density 1.0 is not the dense model, or nothing was rewritten.
        """
        dense = self._dense
        if self._error is None:
            self._error = relative_error(self._veda(1.0).out, dense.out)
        if not self._error <= TOLERANCE:
            raise WrongResultError(f"density 1.0 is off the dense model by {self._error:.1e}")
        veda_compile.reset_report()
        sparse = self._veda(density)
        sites = veda_compile.report().sites
        done = [site for site in sites if site.rewritten]
        if not done:
            reasons = sorted({str(site.explanation) for site in sites})
            raise WrongResultError(f"nothing was rewritten: {'; '.join(reasons)}")
        difference = relative_error(sparse.out, dense.out)
        if not math.isfinite(difference):
            raise WrongResultError("the output is not finite")
        times = self._measure([dense.run, sparse.run])
        return self._about(sparse) | {
            "density": density,
            "sites": len(sites),
            "rewritten": len(done),
            "grids": sorted({site.grid for site in done if site.grid is not None}),
            "kept": done[0].density,
            "executor": done[0].executor,
            "difference_to_dense": difference,
            "errors": {"density 1.0 against dense": self._error},
            "dense": times[0].to_dict(),
            "sparse": times[1].to_dict(),
            "speedup": round(times[0].median / times[1].median, 3),
        }

    @cached_property
    def _made(self) -> tuple[torch.nn.Module, Inputs]:
        reason = missing("diffusers")
        if reason is not None:
            raise SkippedError(reason)
        return self.model.make(self.setting.device, DTYPES[self.setting.device])

    @cached_property
    def _dense(self) -> _Compiled:
        return _Compiled(self._inner(), self._made[1], self.model.masked)

    def _inner(self) -> Any:
        inner = "eager" if self.setting.smoke else "inductor"
        return torch.compile(self._made[0], backend=inner, dynamic=False)

    def _veda(self, density: float) -> _Compiled:
        options: dict[str, Any] = {
            "sidecar": None,
            "density": density,
            "executor": self.setting.executor,
        }
        if self.setting.smoke or density == 1.0:
            options["min_tokens"] = 0
        if self.setting.smoke:
            options["inner"] = "eager"
        module, inputs = self._made
        compiled: Any = torch.compile(module, backend=veda, options=options, dynamic=False)
        return _Compiled(compiled, inputs)

    def _measure(self, functions: list[Callable[[], object]]) -> list[Timing]:
        return self.watch.measure(functions, 2 * self.setting.patience * len(functions), 3, 10)

    def _about(self, compiled: _Compiled) -> dict[str, Any]:
        model, cuda = self.model, self.setting.device == "cuda"
        return {
            "model": model.name,
            "grid": model.grid,
            "layers": model.layers,
            "real_layers": model.real_layers,
            "dtype": str(DTYPES[self.setting.device]).removeprefix("torch."),
            "sdpa_order": compiled.order,
            "compile_s": compiled.compile_s,
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda else None,
        }
