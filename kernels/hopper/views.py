"""How the Hopper kernel sees a call's tensors, and which calls it cannot see.

The tensor memory accelerator copies boxes of at most five dimensions. Three of them are the grid's
and one the channels', so that batch and heads share one, or heads lie along the channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..call import AttentionCall
from ..layout import Context, Layout, Video

ALIGNMENT = 16
"""Bytes that base addresses and strides of the copied tensors are multiples of."""


@dataclass(frozen=True)
class HeadView:
    """Where the heads of a (B, H, N, D) tensor stand among the dimensions of a box.

    folded: batch and heads are one dimension, B * H. Else heads lie `step` elements apart along
    the channels' dimension, as in (B, N, H * D).
    """

    folded: bool
    step: int


@dataclass(frozen=True)
class Runs:
    """The one video of a layout and the tokens without a grid on both its sides.

    Context tokens are keys and no queries, hence the two counts.
    """

    grid: tuple[int, int, int]
    before_keys: int
    after_keys: int
    before_queries: int
    after_queries: int


@lru_cache(maxsize=256)
def runs_of(layout: Layout) -> Runs:
    """The parts of a layout with exactly one video segment; cached."""
    ((first, video),) = layout.videos
    keys, queries = [0, 0], [0, 0]
    side = 0
    for segment in layout.segments:
        if isinstance(segment, Video):
            side = 1
            continue
        keys[side] += segment.length
        queries[side] += 0 if isinstance(segment, Context) else segment.length
    return Runs(video.grid, first, keys[1], *queries)


def padded_width(head_dim: int) -> int:
    """Channels of a box: a power of two. Those past head_dim must lie past the tensor's last."""
    return 1 << (head_dim - 1).bit_length()


def one_by_one(head_dim: int) -> bool:
    """Whether batch elements have to be taken one by one, so that heads may have an axis of their
    own, on which no head's channels follow another's."""
    return padded_width(head_dim) != head_dim


def head_view(x: torch.Tensor) -> HeadView | None:
    """How boxes of a (B, H, N, D) tensor reach its heads; None where no box can."""
    batch, heads, _, head_dim = x.shape
    batch_step, head_step, token_step, _ = x.stride()
    if heads == 1 or head_step == 0:
        return HeadView(False, 0)
    within_token = 0 <= (heads - 1) * head_step + head_dim <= token_step
    if within_token and not one_by_one(head_dim):
        return HeadView(False, head_step)
    if batch == 1 or batch_step == heads * head_step:
        return HeadView(True, 0)
    return None


def refusal(call: AttentionCall) -> str | None:
    """Why the kernel cannot run a call whose traits it accepts; None where it can.

    Head widths, tile sizes and dtypes are traits: see `HopperExecutor.verify`.
    """
    videos = len(call.layout.videos)
    if videos != 1:
        return f"layout {call.layout} has {videos} video segments: must be one"
    if not (call.scale > 0.0 and math.isfinite(call.scale)):
        return f"scale {call.scale}: must be above 0 and finite"
    for name, x in (("q", call.q), ("k", call.k), ("v", call.v)):
        reason = _unreachable(x[:1] if one_by_one(x.shape[3]) else x)
        if reason is not None:
            return f"{name} of shape {tuple(x.shape)} and strides {x.stride()}: {reason}"
    return None


def _unreachable(x: torch.Tensor) -> str | None:
    """Why no box reaches the tokens of a (B, H, N, D) tensor, or None."""
    size = x.element_size()
    if x.shape[3] > 1 and x.stride(3) != 1:
        return "channels must be contiguous"
    if x.data_ptr() % ALIGNMENT:
        return f"the first element must lie at a multiple of {ALIGNMENT} bytes"
    for axis, name in enumerate(("batch", "head", "token")):
        stride = x.stride(axis)
        if x.shape[axis] > 1 and stride * size % ALIGNMENT:
            return f"the {name} stride must be a multiple of {ALIGNMENT} bytes"
        # heads that share their keys lie at one place on the channels' dimension
        if x.shape[axis] > 1 and (stride < 0 or (stride == 0 and name != "head")):
            return f"the {name} stride must be above 0"
    if head_view(x) is None:
        return "heads must lie within a token, or evenly spaced through all batches"
    return None
