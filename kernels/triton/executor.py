"""The Triton executor: the whole path on the GPU, a handful of launches for all heads at once."""

from __future__ import annotations

import contextlib

import torch
import triton

from ..call import DTYPES, AttentionCall, Selection
from ..executors import YES, Answer, Traits
from ..scores import Moments, key_features_of, query_features_of
from .attend import attend
from .choose import choose
from .configs import HEAD_DIMS, TILE_SIZES
from .place import place, static_table
from .pool import pool
from .tables import KeyRows, LayerTables, budget_table, head_numbers, key_rows, layer_tables


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

        With `keep_all`, which the host does not read, it is as wide as the tiles are many. Scores
        are computed for scored heads alone.
        """
        plan, layout, device = call.plan, call.layout, call.q.device
        tables = layer_tables(layout, plan.tile_shapes, device)
        keys = key_rows(tables, call.key_valid)
        scored, width = plan.scored, 0
        static = None
        if plan.modes is not None:
            static = static_table(layout, plan.tile_shapes, plan.modes, device)
        if scored:
            shapes = tuple(plan.tile_shapes[head] for head in scored)
            density = tuple(plan.density[head] for head in scored)
            budgets, width = budget_table(layout, shapes, density, tables.most_tiles, device)
        if static is not None:
            width = max(width, static.width)
        if call.keep_all is not None:
            width = tables.most_tiles
        sizes = (*call.q.shape[:2], tables.most_tiles)
        selection = Selection(
            torch.empty((*sizes, width), dtype=torch.int32, device=device),
            torch.empty(sizes, dtype=torch.int32, device=device),
        )
        with _on(device):
            if scored:
                picked = None if static is None else head_numbers(tuple(scored), device)
                q_features, k_features = _features(call, tables, keys, scored, picked)
                scores = q_features @ k_features.transpose(-1, -2)
                sized = plan.score != "mean"
                choose(scores, sized, keys, tables, budgets, selection, call.keep_all, picked)
            if static is not None:
                place(static, keys, tables, selection, call.keep_all)
        return selection

    def attend(
        self, call: AttentionCall, selection: Selection
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact softmax over the kept tokens. A row without any key gives 0 and LSE -inf."""
        tables = layer_tables(call.layout, call.plan.tile_shapes, call.q.device)
        keys = key_rows(tables, call.key_valid)
        with _on(call.q.device):
            return attend(call, selection, tables, keys)


def _features(
    call: AttentionCall,
    tables: LayerTables,
    keys: KeyRows,
    heads: list[int],
    picked: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, h, n, F) float32 features of query and of key tiles, whose products are scores.

    heads: the h that are scored; picked: the same on the device, None where that is all.
    """
    plan, scale = call.plan, call.scale
    q_rows, k_rows, stride = tables.query_rows[None], keys.rows, keys.rows_stride
    if plan.score == "mean":
        return (
            pool(call.q, tables, q_rows, 0, "none", scale, heads=picked),
            pool(call.k, tables, k_rows, stride, "none", heads=picked),
        )
    if plan.projection is None and plan.factors is None:  # the kernel's output is the features
        half = 0.5 * scale * scale
        return (
            pool(call.q, tables, q_rows, 0, "second", scale, half, heads=picked),
            pool(call.k, tables, k_rows, stride, "variance", heads=picked),
        )
    extremes = plan.projection is not None
    pooled_q = pool(call.q, tables, q_rows, 0, "second", extremes=extremes, heads=picked)
    pooled_k = pool(call.k, tables, k_rows, stride, "variance", extremes=extremes, heads=picked)
    return (
        query_features_of(_moments(pooled_q, extremes), plan, heads, scale),
        key_features_of(_moments(pooled_k, extremes), plan, heads),
    )


def _moments(pooled: torch.Tensor, extremes: bool) -> Moments:
    """What `pool` wrote, part by part."""
    parts = pooled.chunk(4 if extremes else 2, dim=-1)
    highest, lowest = parts[1:3] if extremes else (None, None)
    return Moments(parts[0], parts[-1], highest, lowest)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
