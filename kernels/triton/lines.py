"""Lines: the scored heads of all batch elements, numbered through, and worked on in runs.

Line l is the (l mod h)-th of the h scored heads, of batch element l // h. Features and scores of a
few lines at a time fit into a small workspace, however many heads and tiles there are.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

SIZES = (
    "all_heads",
    "scored_heads",
    "most_tiles",
    "width",
    "first_line",
    "lines",
    "first_row",
    "rows",
)
"""Arguments of kernels that no code is specialised for: other sizes compile nothing anew."""


@triton.jit
def line_head(line, scored_heads, heads_ptr, PICKED: tl.constexpr):
    """(batch element as int64, place among the scored heads, head) of a line.

    PICKED: the i-th scored head is heads[i]; without it, it is i, and heads is not read.
    """
    slot = line % scored_heads
    head = slot
    if PICKED:
        head = tl.load(heads_ptr + slot)
    return (line // scored_heads).to(tl.int64), slot, head


@dataclass(frozen=True, eq=False)
class Lines:
    """The lines from `begin` on, `count` of them.

    heads: (h,) int32 on the device, the scored heads; with `picked` False these are all heads, and
        the tensor is never read. scored_heads: h.
    """

    begin: int
    count: int
    heads: torch.Tensor
    picked: bool
    scored_heads: int
