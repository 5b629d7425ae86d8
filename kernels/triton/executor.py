"""The Triton executor: the whole path on the GPU, a handful of launches for all heads at once."""

from __future__ import annotations

import torch
import triton

from ..call import DTYPES, AttentionCall, Selection
from ..executors import YES, Answer, Traits, on_device
from .attend import attend
from .configs import HEAD_DIMS, TILE_SIZES
from .place import place
from .select import list_tables, select_scored
from .tables import key_rows, layer_tables


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: the one way to run them on a CPU."""
    return bool(triton.knobs.runtime.interpret)


class TritonExecutor:
    """GPU kernels. Neither step waits for device data: list widths come from budgets alone."""

    name = "triton"

    def verify(self, traits: Traits) -> Answer:
        """Yes for what `configs` has launches for; tiles must be powers of two for the kernels."""
        devices = ("cuda", "cpu") if interpreted() else ("cuda",)
        wanted: tuple[tuple[str, object, tuple[object, ...]], ...] = (
            ("device", traits.device, devices),
            ("dtype", traits.dtype, DTYPES),
            ("head_dim", traits.head_dim, HEAD_DIMS),
            ("tile size", traits.tile_size, TILE_SIZES),
        )
        for name, value, allowed in wanted:
            if value not in allowed:
                choices = ", ".join(str(choice) for choice in allowed)
                return Answer(False, f"{name} {value} is not one of {choices}")
        return YES

    def select(self, call: AttentionCall) -> Selection:
        """As `select_tiles`, on the device; `indices` is as wide as the longest list can be.

        Rows that keep every tile, with `keep_all` all of them, have no list. Scores are computed
        for scored heads alone.
        """
        plan, device = call.plan, call.q.device
        tables = layer_tables(call.layout, plan.tile_shapes, device)
        lists = list_tables(
            call.layout, plan.tile_shapes, plan.density, plan.modes, tables.most_tiles, device
        )
        sizes = (*call.q.shape[:2], tables.most_tiles)
        selection = Selection(
            torch.empty((*sizes, lists.width), dtype=torch.int32, device=device),
            torch.empty(sizes, dtype=torch.int32, device=device),
        )
        with on_device(device):
            keys = key_rows(tables, call.key_valid)
            select_scored(call, tables, keys, lists, selection)
            if lists.static is not None:
                place(lists.static, keys, tables, selection, call.keep_all)
        return selection

    def attend(
        self, call: AttentionCall, selection: Selection
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact softmax over the kept tokens. A row without any key gives 0 and LSE -inf."""
        tables = layer_tables(call.layout, call.plan.tile_shapes, call.q.device)
        keys = key_rows(tables, call.key_valid)
        with on_device(call.q.device):
            return attend(call, selection, tables, keys)
