"""Descriptors of boxes for the tensor memory accelerator, over tensors as the model stores them.

A box outside the grid, or past the end of its run of tokens, reads as zeros and is not written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..plan import TileShape
from .views import HeadView, Runs, padded_width

SWIZZLE = 128
"""Bytes of channels that are stored together; rows of boxes are swizzled within them."""


def grid_boxes(
    x: torch.Tensor, view: HeadView, first: int, grid: Sequence[int], box: TileShape
) -> TensorDescriptor:
    """Boxes (1, pt, ph, pw, D) over the video of a (B, H, N, D) tensor, which begins at `first`."""
    _, h, w = grid
    token = x.stride(2)
    return _descriptor(x, view, first, (*grid,), (h * w * token, w * token, token), box)


def run_boxes(
    x: torch.Tensor, view: HeadView, first: int, length: int, rows: int
) -> TensorDescriptor | None:
    """Boxes (1, rows, D) over the `length` tokens from `first` on; None where there are none."""
    if length == 0:
        return None
    return _descriptor(x, view, first, (length,), (x.stride(2),), (rows,))


def _descriptor(
    x: torch.Tensor,
    view: HeadView,
    first: int,
    sides: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
) -> TensorDescriptor:
    batch, heads, _, head_dim = x.shape
    lead = batch * heads if view.folded else batch
    lead_stride = x.stride(1) if view.folded else x.stride(0)
    if lead == 1:  # the stride of a side of 1 may be anything, and misaligned
        lead_stride = sides[0] * strides[0]
    channels = head_dim if view.folded else (heads - 1) * view.step + head_dim
    return TensorDescriptor(
        x[:, :, first:],
        [lead, *sides, channels],
        [lead_stride, *strides, 1],
        [1, *box, padded_width(head_dim)],
        _box_layout(8 * x.element_size(), len(box) + 2),
    )


@lru_cache(maxsize=16)
def _box_layout(bits: int, rank: int) -> gl.NVMMASharedLayout:
    """How boxes lie in shared memory; kept because a launch makes up to twelve of the same."""
    return gl.NVMMASharedLayout(SWIZZLE, bits, rank=rank)


@lru_cache(maxsize=256)
def box_contents(runs: Runs, shape: TileShape, keys: int, device: torch.device) -> torch.Tensor:
    """(n,) int32 on `device`: what each box of `keys` keys has; cached, read-only.

    First the tiles, in the order of `tile_table`, then the boxes of the tokens before and after the
    video. Bytes from the lowest: frames, rows and columns on the grid, tokens before its run ends;
    a whole box has all of `shape` and `keys`.
    """
    lengths = [
        [min(step, side - at) for at in range(0, side, step)]
        for side, step in zip(runs.grid, shape, strict=True)
    ]
    packed = [
        t | h << 8 | w << 16 | keys << 24
        for t in lengths[0]
        for h in lengths[1]
        for w in lengths[2]
    ]
    whole = shape[0] | shape[1] << 8 | shape[2] << 16
    for length in (runs.before_keys, runs.after_keys):
        packed += [whole | min(keys, length - at) << 24 for at in range(0, length, keys)]
    # the highest byte reaches into the sign
    return torch.tensor(packed, dtype=torch.int64, device="cpu").to(torch.int32).to(device)


@lru_cache(maxsize=256)
def box_rows(runs: Runs, shape: TileShape, keys: int, device: torch.device) -> torch.Tensor:
    """(n, keys) int32 on `device`: the key at each place of each box, -1 where a box lacks one.

    Boxes as in `box_contents`; keys are numbered as the call's. Cached, read-only.
    """
    boxes = [-(-side // step) for side, step in zip(runs.grid, shape, strict=True)]
    sides = [count * step for count, step in zip(boxes, shape, strict=True)]
    t, h, w = runs.grid
    video = torch.full(sides, -1, dtype=torch.int32, device="cpu")
    past = runs.before_keys + t * h * w
    numbers = torch.arange(runs.before_keys, past, dtype=torch.int32, device="cpu")
    video[:t, :h, :w] = numbers.view(t, h, w)
    split = [part for pair in zip(boxes, shape, strict=True) for part in pair]
    parts = [video.view(split).permute(0, 2, 4, 1, 3, 5).reshape(-1, keys)]
    for first, length in ((0, runs.before_keys), (past, runs.after_keys)):
        run = torch.full((-(-length // keys) * keys,), -1, dtype=torch.int32, device="cpu")
        run[:length] = torch.arange(first, first + length, dtype=torch.int32, device="cpu")
        parts.append(run.view(-1, keys))
    return torch.cat(parts).to(device)
