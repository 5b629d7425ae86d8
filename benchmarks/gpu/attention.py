"""One layer's attention, sparse against dense: from after RoPE to before the output projection."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
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
from benchmarks.gpu.flex import FlexLists, block_map, tile_order
from benchmarks.gpu.kernel_times import kernel_times, steps
from benchmarks.gpu.rivals import RIVALS, Rival
from benchmarks.gpu.sizes import SIZES, SMOKE_SIZES, Size, Tensors, call_of, video_tensors
from benchmarks.gpu.stage import Job, Setting, SkippedError, WrongResultError
from benchmarks.gpu.timing import Stopwatch, Timing
from veda_compile.functional import sparse_attention
from veda_compile.kernels.call import AttentionCall, Selection
from veda_compile.kernels.executors import Executor, Traits, choose_executor

DENSITIES = (0.1, 0.2, 0.05, 0.3, 1.0)
FLEX_DENSITIES = (0.1, 0.2)
RIVAL_DENSITY = 0.1
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def jobs(setting: Setting) -> Iterator[Job]:
    """By size: the dense baselines, then each density of ours and of FlexAttention, then rivals."""
    for size in SMOKE_SIZES if setting.smoke else SIZES:
        torch._dynamo.reset()  # or FlexAttention's compilations would reach the recompile limit
        layer = _Layer(setting, size)
        yield Job(f"{size.name}, dense", layer.dense, 30.0)
        for density in DENSITIES:
            yield Job(f"{size.name}, density {density}", partial(layer.sparse, density), 10.0)
            if density in FLEX_DENSITIES:
                yield Job(
                    f"{size.name}, flex with our lists, density {density}",
                    partial(layer.flex_lists, density),
                    15.0,
                )
        for name, rival in RIVALS.items():
            yield Job(
                f"{size.name}, {name}, density {RIVAL_DENSITY}", partial(layer.rival, rival), 20.0
            )
        del layer
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()


class _Layer:
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
                (timing,) = self._measure([partial(attend, *self.tensors)])
            except Exception as reason:  # noqa: BLE001 - one baseline less, not all
                found[name] = {"skipped": " ".join(str(reason).split())[:200]}
                continue
            found[name] = self._rated(timing, self.size.dense_pairs) | {"error": error}
        times = {name: row["median"] for name, row in found.items() if "median" in row}
        if not times:
            raise SkippedError("no dense attention runs here")
        best = min(times, key=lambda name: times[name])
        return self._about() | {"baselines": found, "best": best, "dense_ms": times[best]}

    def sparse(self, density: float) -> dict[str, Any]:
        """Our kernels, the whole layer and its steps."""
        self._refuse_if_wrong()
        call = call_of(self.size, self.tensors, density)
        executor = self._executor(call)
        selection = executor.select(call)
        apart = lists_apart(call, selection)
        out, _ = executor.attend(call, selection)
        errors = {"exact": sampled_error(call, selection, out), "lists_apart": apart}
        dense_out = self._best(*self.tensors)
        difference = relative_error(out, dense_out)
        if density == 1.0 and not difference <= TOLERANCE[self.dtype]:
            raise WrongResultError(f"density 1.0 is off dense attention by {difference:.1e}")
        del dense_out
        whole = partial(self._whole, call)
        errors["whole call against its steps"] = relative_error(whole(), _joined(out))
        del out
        dense, layer, select, attend = self._measure(
            [
                lambda: _joined(self._best(*self.tensors)),
                whole,
                partial(executor.select, call),
                partial(executor.attend, call, selection),
            ]
        )
        pairs = kept_pairs(call, selection)
        found = self._about() | {
            "density": density,
            "kept": round(pairs / self.size.dense_pairs, 5),
            "tile": call.plan.tile_shapes[0],
            "executor": executor.name,
            "baseline": self._best_name,
            "errors": errors,
            "difference_to_dense": difference,
            "dense_layer": dense.to_dict(),
            "layer": layer.to_dict(),
            "select": select.to_dict(),
            "attend": self._rated(attend, pairs),
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

    def flex_lists(self, density: float) -> dict[str, Any]:
        """FlexAttention on the same tiles; bringing tokens in tile order is told apart."""
        call, selection = self._selected(density, None)
        lists, order = self._flex, self._flex.order
        mask = lists.mask(block_map(call, selection, order))
        q, k, v = (order.sort(x) for x in self.tensors)

        def kernel() -> torch.Tensor:
            return lists.run(q, k, v, call.scale, mask)

        def whole() -> torch.Tensor:
            sorted_ = (order.sort(x) for x in self.tensors)
            return order.restore(lists.run(*sorted_, call.scale, mask))

        error = sampled_error(call, selection, whole())
        pairs = kept_pairs(call, selection)
        dense, alone, permuted, build = self._measure(
            [
                partial(self._best, *self.tensors),
                kernel,
                whole,
                lambda: lists.mask(block_map(call, selection, order)),
            ]
        )
        return self._about() | {
            "rival": "flex with our lists",
            "density": density,
            "kept": round(pairs / self.size.dense_pairs, 5),
            "errors": {"exact": error},
            "dense_layer": dense.to_dict(),
            "kernel": self._rated(alone, pairs),
            "with_permutation": permuted.to_dict(),
            "plan": build.to_dict(),
            "speedup_kernel": round(dense.median / alone.median, 3),
            "speedup_with_permutation": round(dense.median / permuted.median, 3),
        }

    def rival(self, rival: Rival) -> dict[str, Any]:
        """Another library's kernel on our lists."""
        rival.require(self.setting.device)
        call, selection = self._selected(RIVAL_DENSITY, rival.tile_size)
        prepared = rival.prepare(call, selection)
        error = sampled_error(call, selection, prepared.restore(prepared.run()))
        pairs = kept_pairs(call, selection)
        dense, alone = self._measure([partial(self._best, *self.tensors), prepared.run])
        return self._about() | {
            "rival": rival.name,
            "density": RIVAL_DENSITY,
            "kept": round(pairs / self.size.dense_pairs, 5),
            "errors": {"exact": error},
            "dense_layer": dense.to_dict(),
            "kernel": self._rated(alone, pairs),
            "plan_ms": prepared.plan_ms,
            "speedup_kernel": round(dense.median / alone.median, 3),
        }

    @cached_property
    def _flex(self) -> FlexLists:
        call = call_of(self.size, self.tensors, 1.0)
        return FlexLists(tile_order(call), call.plan.tile_size, {})

    @cached_property
    def _best_name(self) -> str:
        """The fastest dense baseline by the results, or the first where none was timed."""
        for record in self.setting.results.of("attention", "ok"):
            if record["size"] == self.size.name and "best" in record:
                return str(record["best"])
        return next(iter(baselines(self.setting.device)))

    @cached_property
    def _best(self) -> Attention:
        return baselines(self.setting.device)[self._best_name]()

    def _selected(self, density: float, tile_size: int | None) -> tuple[AttentionCall, Selection]:
        """A call and our lists for it."""
        call = call_of(self.size, self.tensors, density, tile_size)
        return call, self._executor(call).select(call)

    def _executor(self, call: AttentionCall) -> Executor:
        size = call.plan.tile_size
        traits = Traits(self.setting.device, self.dtype, self.size.head_dim, size)
        return choose_executor(self.setting.executor, traits)

    def _whole(self, call: AttentionCall) -> torch.Tensor:
        """What a rewritten graph runs; (B, N, H * D)."""
        return _joined(
            sparse_attention(
                *self.tensors, layout=call.layout, plan=call.plan, executor=self.setting.executor
            )
        )

    def _refuse_if_wrong(self) -> None:
        call = call_of(self.size, self.tensors, 1.0)
        config = config_name(self.size.head_dim, call.plan.tile_size, self.dtype)
        for record in self.setting.results.of("check", "failed"):
            if str(record["case"]).endswith(config):
                raise SkippedError(f"the check '{record['case']}' failed")

    def _measure(self, functions: list[Callable[[], object]]) -> list[Timing]:
        return self.watch.measure(functions, self.setting.patience * len(functions), least=3)

    def _rated(self, timing: Timing, pairs: int) -> dict[str, Any]:
        rate = self.size.flops(pairs) / (timing.median * 1e9)
        return timing.to_dict() | {"tflops": round(rate, 2)}

    def _about(self) -> dict[str, Any]:
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
