"""One layer's attention, sparse against dense: from after RoPE to before the output projection."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

from benchmarks.gpu.baselines import Attention, baselines
from benchmarks.gpu.check import config_name
from benchmarks.gpu.exact import (
    TOLERANCE,
    kept_pairs,
    lists_apart,
    relative_error,
    sampled_error,
)
from benchmarks.gpu.kernel_times import kernel_times, steps
from benchmarks.gpu.sizes import SIZES, SMOKE_SIZES, Size, Tensors, call_of, video_tensors
from benchmarks.gpu.stage import Job, Setting, SkippedError, WrongResultError
from benchmarks.gpu.timing import Stopwatch, Timing
from veda_compile.functional import sparse_attention
from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.errors import ExecutorError
from veda_compile.kernels.executors import Executor, Traits, choose_executor
from veda_compile.kernels.plan import Plan

DENSITIES = (0.1, 0.05, 0.2, 0.15, 1.0)
BESIDE_DENSITIES = (0.1, 0.05)
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def jobs(setting: Setting) -> Iterator[Job]:
    """By size: the dense baselines, then each density of ours.

    Last come two executors beside each other, for `kernels/kernel_tables.py`.
    """
    for size in SMOKE_SIZES if setting.smoke else SIZES:
        torch._dynamo.reset()  # or FlexAttention's compilations would reach the recompile limit
        layer = Layer(setting, size)
        yield Job(f"{size.name}, dense", layer.dense, 30.0)
        for density in DENSITIES:
            yield Job(f"{size.name}, density {density}", partial(layer.sparse, density), 10.0)
        for density in BESIDE_DENSITIES:
            yield Job(
                f"{size.name}, hopper beside triton, density {density}",
                partial(layer.beside, "hopper", "triton", density),
                5.0,
            )
        del layer
        forget_tensors(setting.device)


def forget_tensors(device: str) -> None:
    """Give the memory of tensors that nothing refers to back."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


class Layer:
    """The measurements of one size; its tensors are made once."""

    def __init__(self, setting: Setting, size: Size) -> None:
        self.setting = setting
        self.size = size
        self.dtype = DTYPES[setting.device]
        self.watch = Stopwatch(setting.device)

    @cached_property
    def tensors(self) -> Tensors:
        """q, k, v."""
        return video_tensors(self.size, self.dtype, self.setting.device, self.setting.seed)

    def dense(self) -> dict[str, Any]:
        """Every dense baseline, each checked first."""
        call = call_of(self.size, self.tensors, 1.0)
        found: dict[str, Any] = {}
        for name, make in baselines(self.setting.device).items():
            try:
                attend = make()
                error = sampled_error(call, None, attend(*self.tensors))
                (timing,) = self.measure([partial(attend, *self.tensors)])
            except Exception as reason:  # noqa: BLE001 - one baseline less, not all
                found[name] = {"skipped": " ".join(str(reason).split())[:200]}
                continue
            found[name] = self.rated(timing, self.size.dense_pairs) | {"error": error}
        times = {name: row["median"] for name, row in found.items() if "median" in row}
        if not times:
            raise SkippedError("no dense attention runs here")
        best = min(times, key=lambda name: times[name])
        return self.about() | {"baselines": found, "best": best, "dense_ms": times[best]}

    def sparse(self, density: float, plan: Plan | None = None) -> dict[str, Any]:
        """Our kernels, the whole layer and its steps; plan: in place of one shape for all heads."""
        call = self.call(density, plan)
        self._refuse_if_wrong(call)
        executor = self.executor(call)
        selection = executor.select(call)
        apart = lists_apart(call, selection)
        out, _ = executor.attend(call, selection)
        errors = {"exact": sampled_error(call, selection, out), "lists_apart": apart}
        dense_out = self.best(*self.tensors)
        difference = relative_error(out, dense_out)
        if density == 1.0 and not difference <= TOLERANCE[self.dtype]:
            raise WrongResultError(f"density 1.0 is off dense attention by {difference:.1e}")
        del dense_out
        whole = partial(self.whole, call)
        errors["whole call against its steps"] = relative_error(whole(), _joined(out))
        del out
        dense, layer, select, attend = self.measure(
            [
                lambda: _joined(self.best(*self.tensors)),
                whole,
                partial(executor.select, call),
                partial(executor.attend, call, selection),
            ]
        )
        pairs = kept_pairs(call, selection)
        found = self.about() | {
            "density": density,
            "kept": round(pairs / self.size.dense_pairs, 5),
            "tile": call.plan.tile_shapes[0],
            "shapes": len(call.plan.groups()),
            "executor": executor.name,
            "requested": self.setting.executor,
            "baseline": self.best_name,
            "errors": errors,
            "difference_to_dense": difference,
            "dense_layer": dense.to_dict(),
            "layer": layer.to_dict(),
            "select": select.to_dict(),
            "attend": self.rated(attend, pairs),
            "speedup_layer": round(dense.median / layer.median, 3),
            "speedup_kernel": round(dense.median / attend.median, 3),
        }
        if self.setting.device == "cuda":
            try:
                kernels = kernel_times(whole)
            except RuntimeError as reason:  # no profiler here: the times above stand
                return found | {"profiler": str(reason)}
            found |= {"kernels": kernels, "steps": steps(kernels)}
        return found

    def beside(
        self, name: str, other: str, density: float, plan: Plan | None = None
    ) -> dict[str, Any]:
        """The attention of two executors in turn, on the lists of the second.

        plan: in place of one shape for all heads.
        """
        call = self.call(density, plan)
        try:
            executors = [self.executor(call, named) for named in (name, other)]
        except ExecutorError as reason:
            raise SkippedError(str(reason)) from reason
        selection = executors[1].select(call)
        errors = {
            each.name: sampled_error(call, selection, each.attend(call, selection)[0])
            for each in executors
        }
        pairs = kept_pairs(call, selection)
        first, second = self.measure([partial(e.attend, call, selection) for e in executors])
        return self.about() | {
            "density": density,
            "tile": call.plan.tile_shapes[0],
            "shapes": len(call.plan.groups()),
            "errors": errors,
            name: self.rated(first, pairs),
            other: self.rated(second, pairs),
            "speedup": round(second.median / first.median, 3),
        }

    @cached_property
    def best_name(self) -> str:
        """The fastest dense baseline by the results, or the first that runs where there are none.

        Raises SkippedError where none does.
        """
        for record in self.setting.results.records:
            if "dense_ms" in record and record["size"] == self.size.name:
                return str(record["best"])
        few = [x[:, :, :256] for x in self.tensors]
        for name, make in baselines(self.setting.device).items():
            try:
                make()(*few)
            except (RuntimeError, ImportError):
                continue
            return name
        raise SkippedError("no dense attention runs here")

    @cached_property
    def best(self) -> Attention:
        """The fastest dense attention."""
        return baselines(self.setting.device)[self.best_name]()

    def call(self, density: float, plan: Plan | None = None) -> AttentionCall:
        """The call as the backend would make it without a sidecar, or with `plan`."""
        call = call_of(self.size, self.tensors, density)
        return call if plan is None else replace(call, plan=plan)

    def executor(self, call: AttentionCall, name: str | None = None) -> Executor:
        """What runs the call; name: in place of the executor that all is timed with."""
        size = call.plan.tile_size
        traits = Traits(self.setting.device, self.dtype, self.size.head_dim, size)
        return choose_executor(name or self.setting.executor, traits)

    def whole(self, call: AttentionCall) -> torch.Tensor:
        """What a rewritten graph runs; (B, N, H * D)."""
        return _joined(
            sparse_attention(
                *self.tensors, layout=call.layout, plan=call.plan, executor=self.setting.executor
            )
        )

    def _refuse_if_wrong(self, call: AttentionCall) -> None:
        config = config_name(self.size.head_dim, call.plan.tile_size, self.dtype)
        for record in self.setting.results.of("check", "failed"):
            if str(record["case"]).endswith(config):
                raise SkippedError(f"the check '{record['case']}' failed")

    def measure(self, functions: list[Callable[[], object]]) -> list[Timing]:
        """Timings of alternatives that take turns."""
        return self.watch.measure(functions, self.setting.patience * len(functions), least=3)

    def rated(self, timing: Timing, pairs: int) -> dict[str, Any]:
        """A timing with the rate at which it multiplies `pairs`."""
        rate = self.size.flops(pairs) / (timing.median * 1e9)
        return timing.to_dict() | {"tflops": round(rate, 2)}

    def about(self) -> dict[str, Any]:
        """What every record of this size says."""
        size = self.size
        return {
            "size": size.name,
            "tokens": size.tokens,
            "grid": size.grid,
            "text": size.text,
            "heads": size.heads,
            "batch": size.batch,
            "head_dim": size.head_dim,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def _joined(out: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) to (B, N, H * D), what the output projection reads."""
    return out.transpose(1, 2).flatten(2)
