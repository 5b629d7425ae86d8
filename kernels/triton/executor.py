"""The Triton executor: the whole path on the GPU, a handful of launches for all heads at once."""

from __future__ import annotations

import contextlib

import torch
import triton

from ..call import DTYPES, AttentionCall, Selection
from ..executors import YES, Answer, Traits
from .attend import attend
from .choose import choose
from .configs import HEAD_DIMS, TILE_SIZES
from .pool import pool
from .tables import KeyRows, LayerTables, budget_table, key_rows, layer_tables


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
        """As `select_tiles`, on the device; `indices` is as wide as the largest budget.

        With `keep_all`, which the host does not read, it is as wide as the tiles are many.
        """
        plan = call.plan
        device = call.q.device
        tables = layer_tables(call.layout, plan.tile_shapes, device)
        keys = key_rows(tables, call.key_valid)
        budgets, width = budget_table(call.layout, plan.tile_shapes, plan.density, device)
        with _on(device):
            q_features, k_features = _features(call, tables, keys)
            scores = q_features @ k_features.transpose(-1, -2)
            sized = plan.score != "mean"
            if call.keep_all is not None:
                width = tables.most_tiles
            indices, counts = choose(scores, sized, keys, tables, budgets, width, call.keep_all)
        return Selection(indices, counts)

    def attend(
        self, call: AttentionCall, selection: Selection
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact softmax over the kept tokens. A row without any key gives 0 and LSE -inf."""
        tables = layer_tables(call.layout, call.plan.tile_shapes, call.q.device)
        keys = key_rows(tables, call.key_valid)
        with _on(call.q.device):
            return attend(call, selection, tables, keys)


def _features(
    call: AttentionCall, tables: LayerTables, keys: KeyRows
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, n, F) float32 features of query and of key tiles, whose products are scores."""
    plan, scale = call.plan, call.scale
    q_rows = tables.query_rows[None]
    if plan.score == "mean":
        return (
            pool(call.q, tables, q_rows, 0, "none", scale),
            pool(call.k, tables, keys.rows, keys.rows_stride, "none"),
        )
    if plan.score == "closed_form":
        return (
            pool(call.q, tables, q_rows, 0, "second", scale, 0.5 * scale * scale),
            pool(call.k, tables, keys.rows, keys.rows_stride, "variance"),
        )
    if plan.projection is None:
        raise AssertionError("score 'projection' needs projections")
    weights = plan.projection.to(device=call.q.device, dtype=torch.float32)
    pooled_q = pool(call.q, tables, q_rows, 0, "extremes")
    pooled_k = pool(call.k, tables, keys.rows, keys.rows_stride, "extremes")
    head_dim = call.q.shape[-1]
    return (
        (pooled_q[..., :head_dim] + pooled_q @ weights[0]) * scale,
        pooled_k[..., :head_dim] + pooled_k @ weights[1],
    )


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
