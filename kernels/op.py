"""The op contract: `veda::sparse_attention_v1`, what rewritten graphs call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .call import AttentionCall, empty_output
from .errors import LayoutError, PlanError
from .executors import execute
from .layout import INTS_PER_SEGMENT, Layout
from .plan import Plan

OP_NAME = "veda::sparse_attention_v1"
"""The version is part of the name: caches key on it, and a changed contract needs a new one."""

_REST = -1


@torch.library.custom_op(OP_NAME, mutates_args=())
def sparse_attention_v1(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_valid: torch.Tensor | None,
    layout: Sequence[int],
    grids: torch.Tensor | None,
    tile_shapes: torch.Tensor,
    density: torch.Tensor,
    projection: torch.Tensor | None,
    score: str,
    scale: float | None,
    executor: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tile-sparse softmax attention.

    q: (B, H, N, D); k, v: (B, Hkv, N, D); key_valid: (B, N) bool or None.
    layout: `Layout.encode()`, sizes may be symbolic. One extra segment may have the length -1: it
        takes the tokens the others leave.
    grids: (V, 3) int64 on CPU, the grids of the layout's V video segments where the graph cannot
        know them (they replace the layout's), or None.
    tile_shapes: (H, 3) int32 and density: (H,) float64, both on CPU so that reading them is no
        device synchronisation. projection: see `Plan`. scale: None is 1/sqrt(D).
    Returns out (B, H, N, D), stored as (B, N, H, D), and the natural-log LSE (B, H, N) float32.
    Raises LayoutError, PlanError or ExecutorError.
    """
    if q.dim() != 4 or q.shape[3] == 0:
        raise PlanError(f"q of shape {tuple(q.shape)}: must be (B, H, N, D)")
    segments = _completed(list(layout), grids, q.shape[2])
    _check_table("tile_shapes", tile_shapes, 2, torch.int32)
    _check_table("density", density, 1, torch.float64)
    plan = Plan(
        tuple(tuple(shape) for shape in tile_shapes.tolist()),
        tuple(density.tolist()),
        score,
        projection,
    )
    call = AttentionCall(
        q,
        k,
        v,
        Layout.decode(segments),
        plan,
        1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        key_valid,
    )
    out, lse, _ = execute(executor, call)
    return out, lse


@sparse_attention_v1.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, v, key_valid, layout, grids, tile_shapes, density, projection, score, scale, executor
):
    return empty_output(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _check_table(name: str, table: torch.Tensor, dims: int, dtype: torch.dtype) -> None:
    if table.dim() != dims or table.dtype != dtype or table.device.type != "cpu":
        raise PlanError(
            f"{name} is {table.dtype} with {table.dim()} dimensions on {table.device}: must be "
            f"{dtype} with {dims} on cpu"
        )


def _completed(segments: list[int], grids: torch.Tensor | None, tokens: int) -> list[int]:
    """The encoded layout with grids told per call, and "the rest", filled in."""
    if len(segments) % INTS_PER_SEGMENT:
        raise LayoutError(
            f"an encoded layout has {INTS_PER_SEGMENT} integers a segment, got {len(segments)}"
        )
    starts = [i for i in range(0, len(segments), INTS_PER_SEGMENT) if segments[i] == 1]
    if grids is not None:
        if grids.shape != (len(starts), 3) or grids.dtype != torch.int64:
            raise LayoutError(
                f"grids are {grids.dtype} of shape {tuple(grids.shape)} for {len(starts)} video "
                "segments: must be int64 of shape (V, 3)"
            )
        for start, grid in zip(starts, grids.tolist(), strict=True):
            segments[start + 1 : start + INTS_PER_SEGMENT] = grid
    firsts = range(0, len(segments), INTS_PER_SEGMENT)
    rest = [i + 1 for i in firsts if segments[i : i + 2] == [0, _REST]]
    if len(rest) > 1:
        raise LayoutError(f"{len(rest)} segments take the rest of the sequence: at most one can")
    for place in rest:
        known = sum(math.prod(segments[i + 1 : i + 4]) for i in firsts if i + 1 != place)
        segments[place] = tokens - known
        if known > tokens:
            raise LayoutError(
                f"the segments of known size hold {known} tokens but the sequence has {tokens}"
            )
        if segments[place] == 0:
            del segments[place - 1 : place + INTS_PER_SEGMENT - 1]
    return segments
