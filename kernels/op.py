"""The op contract: `veda::sparse_attention_v2`, what rewritten graphs call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .call import AttentionCall, empty_output
from .errors import LayoutError, PlanError
from .executors import execute
from .layout import CONTEXT, EXTRA, INTS_PER_SEGMENT, VIDEO, Layout
from .plan import Plan
from .static_modes import decode_modes

OP_NAME = "veda::sparse_attention_v2"
"""The version is part of the name: caches key on it, and a changed contract needs a new one."""

_REST = -1


@torch.library.custom_op(OP_NAME, mutates_args=())
def sparse_attention_v2(
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
    keep_all: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    modes: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tile-sparse softmax attention.

    q: (B, H, Nq, D); k, v: (B, Hkv, Nk, D); key_valid: (B, Nk) bool or None.
    layout: `Layout.encode()`, sizes may be symbolic. One extra segment may have the length -1: it
        takes the queries the others leave. So may one context segment, for the keys.
    grids: (V, 3) int64 on CPU, the grids of the layout's V video segments where the graph cannot
        know them (they replace the layout's), or None.
    tile_shapes: (H, 3) int32 and density: (H,) float64, both on CPU so that reading them is no
        device synchronisation. projection, factors: see `Plan`. scale: None is 1/sqrt(D).
    keep_all: () bool on q's device or None; see `AttentionCall`. Read on the device alone there.
    modes: (H, 3) int32 and columns: (H, C, 3) float32, both on CPU, as `encode_modes` makes them,
        or None: the static modes of heads that are not scored.
    Returns out (B, H, Nq, D), stored as (B, Nq, H, D), and the natural-log LSE (B, H, Nq) float32.
    Raises LayoutError, PlanError or ExecutorError.
    """
    if q.dim() != 4 or q.shape[3] == 0:
        raise PlanError(f"q of shape {tuple(q.shape)}: must be (B, H, N, D)")
    if k.dim() != 4:
        raise PlanError(f"k of shape {tuple(k.shape)}: must be (B, Hkv, N, D)")
    segments = completed_layout(list(layout), grids, q.shape[2], k.shape[2])
    _check_table("tile_shapes", tile_shapes, 2, torch.int32)
    _check_table("density", density, 1, torch.float64)
    plan = Plan(
        tuple(tuple(shape) for shape in tile_shapes.tolist()),
        tuple(density.tolist()),
        score,
        projection,
        factors,
        decode_modes(modes, columns),
    )
    call = AttentionCall(
        q,
        k,
        v,
        Layout.decode(segments),
        plan,
        1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        key_valid,
        keep_all,
    )
    out, lse, _ = execute(executor, call)
    return out, lse


@sparse_attention_v2.register_fake
def _(q, *_, **__):  # type: ignore[no-untyped-def]
    return empty_output(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _check_table(name: str, table: torch.Tensor, dims: int, dtype: torch.dtype) -> None:
    if table.dim() != dims or table.dtype != dtype or table.device.type != "cpu":
        raise PlanError(
            f"{name} is {table.dtype} with {table.dim()} dimensions on {table.device}: must be "
            f"{dtype} with {dims} on cpu"
        )


def completed_layout(
    segments: list[int], grids: torch.Tensor | None, queries: int, keys: int
) -> list[int]:
    """The encoded layout with grids told per call, and "the rest", filled in."""
    if len(segments) % INTS_PER_SEGMENT:
        raise LayoutError(
            f"an encoded layout has {INTS_PER_SEGMENT} integers a segment, got {len(segments)}"
        )
    starts = [i for i in range(0, len(segments), INTS_PER_SEGMENT) if segments[i] == VIDEO]
    if grids is not None:
        if grids.shape != (len(starts), 3) or grids.dtype != torch.int64:
            raise LayoutError(
                f"grids are {grids.dtype} of shape {tuple(grids.shape)} for {len(starts)} video "
                "segments: must be int64 of shape (V, 3)"
            )
        for start, grid in zip(starts, grids.tolist(), strict=True):
            segments[start + 1 : start + INTS_PER_SEGMENT] = grid
    if queries > keys:
        raise LayoutError(
            f"q holds {queries} tokens and k only {keys}: the tokens of q must be among those of k"
        )
    # keys that are no queries stand in context segments, and those hold nothing else
    segments = _without_rest(segments, (EXTRA, VIDEO), EXTRA, queries)
    return _without_rest(segments, (CONTEXT,), CONTEXT, keys - queries)


def _without_rest(segments: list[int], kinds: tuple[int, ...], kind: int, tokens: int) -> list[int]:
    """`segments`, with "the rest" told for the one of `kind`; those of `kinds` hold `tokens`."""
    firsts = [i for i in range(0, len(segments), INTS_PER_SEGMENT) if segments[i] in kinds]
    rest = [i for i in firsts if segments[i : i + 2] == [kind, _REST]]
    if not rest:
        return segments
    if len(rest) > 1:
        raise LayoutError(f"{len(rest)} segments take the rest of the sequence: at most one can")
    known = sum(math.prod(segments[i + 1 : i + 4]) for i in firsts if i != rest[0])
    if known > tokens:
        raise LayoutError(
            f"the segments of known size hold {known} tokens but the sequence has {tokens}"
        )
    left = [kind, tokens - known, 1, 1] if tokens > known else []
    return segments[: rest[0]] + left + segments[rest[0] + INTS_PER_SEGMENT :]
