"""Other block-sparse kernels on the same lists as ours, which takes turns with them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import torch

from benchmarks.gpu.attention import Layer, forget_tensors
from benchmarks.gpu.exact import kept_pairs, sampled_error
from benchmarks.gpu.flex import FlexLists, block_map, tile_order
from benchmarks.gpu.rivals import RIVALS, Rival
from benchmarks.gpu.sizes import LONG, SMOKE_SIZES, WAN_14B, Size, call_of
from benchmarks.gpu.stage import Job, Setting, SkippedError
from benchmarks.gpu.timing import Timing
from veda_compile.kernels.call import AttentionCall, Selection

DENSITIES = (0.1, 0.05)


def jobs(setting: Setting) -> Iterator[Job]:
    """Dense attention of one size; then by size and density FlexAttention on our tiles, and every
    rival that is installed."""
    sizes = SMOKE_SIZES if setting.smoke else (WAN_14B, LONG)
    yield Job(f"{sizes[0].name}, dense", lambda: Layer(setting, sizes[0]).dense(), 30.0)
    for size in sizes:
        for density in DENSITIES:
            torch._dynamo.reset()  # or FlexAttention would reach the recompile limit
            meeting = Comparison(setting, size, density)
            named = f"{size.name}, density {density}"
            yield Job(f"{named}: flex with our lists", meeting.flex, 20.0)
            for name, rival in RIVALS.items():
                yield Job(f"{named}: {name}", partial(meeting.rival, rival), 20.0)
            del meeting
            forget_tensors(setting.device)


class Comparison:
    """Kernels that meet on one size at one density."""

    def __init__(self, setting: Setting, size: Size, density: float) -> None:
        self.setting, self.density = setting, density
        self.layer = Layer(setting, size)

    def flex(self) -> dict[str, Any]:
        """FlexAttention on the same tiles; bringing tokens in tile order is told apart."""
        call, selection = self._selected(None)
        lists, order = self._flex, self._flex.order
        mask = lists.mask(block_map(call, selection, order))
        q, k, v = (order.sort(x) for x in self.layer.tensors)

        def kernel() -> torch.Tensor:
            return lists.run(q, k, v, call.scale, mask)

        def whole() -> torch.Tensor:
            sorted_ = (order.sort(x) for x in self.layer.tensors)
            return order.restore(lists.run(*sorted_, call.scale, mask))

        error = sampled_error(call, selection, whole())
        dense, ours, alone, permuted, build = self.layer.measure(
            [
                partial(self.layer.best, *self.layer.tensors),
                partial(self.layer.executor(call).attend, call, selection),
                kernel,
                whole,
                lambda: lists.mask(block_map(call, selection, order)),
            ]
        )
        found = self._record("flex with our lists", call, selection, error, dense, ours, alone)
        return found | {"with_permutation": permuted.to_dict(), "plan_ms": build.median}

    def rival(self, rival: Rival) -> dict[str, Any]:
        """Another library's kernel."""
        rival.require(self.setting.device)
        call, selection = self._selected(rival.tile_size)
        try:
            prepared = rival.prepare(call, selection)
        except ImportError as reason:
            raise SkippedError(f"{rival.name} lacks what it needs: {reason}") from reason
        error = sampled_error(call, selection, prepared.restore(prepared.run()))
        dense, ours, alone = self.layer.measure(
            [
                partial(self.layer.best, *self.layer.tensors),
                partial(self.layer.executor(call).attend, call, selection),
                prepared.run,
            ]
        )
        found = self._record(rival.name, call, selection, error, dense, ours, alone)
        return found | {"plan_ms": prepared.plan_ms}

    @cached_property
    def _flex(self) -> FlexLists:
        call = self.layer.call(1.0)
        return FlexLists(tile_order(call), call.plan.tile_size, {})

    def _selected(self, tile_size: int | None) -> tuple[AttentionCall, Selection]:
        """A call and our lists for it. tile_size: None is what the backend would choose."""
        layer = self.layer
        call = call_of(layer.size, layer.tensors, self.density, tile_size)
        return call, layer.executor(call).select(call)

    def _record(
        self, name: str, call: AttentionCall, selection: Selection, error: float,
        dense: Timing, ours: Timing, rival: Timing,
    ) -> dict[str, Any]:  # fmt: skip
        layer, pairs = self.layer, kept_pairs(call, selection)
        return layer.about() | {
            "rival": name,
            "density": self.density,
            "tile": call.plan.tile_shapes[0],
            "kept": round(pairs / layer.size.dense_pairs, 5),
            "executor": layer.executor(call).name,
            "errors": {"exact": error},
            "dense_layer": dense.to_dict(),
            "ours": layer.rated(ours, pairs),
            "kernel": layer.rated(rival, pairs),
            "speedup_kernel": round(dense.median / rival.median, 3),
            "ours_faster": round(rival.median / ours.median, 3),
        }
