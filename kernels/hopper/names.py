"""Gluon's names, where they differ between the versions of Triton that this package runs on."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.6 knows the long names alone; later versions keep them only to raise
_SHORT = hasattr(tma, "async_load")
load_box = tma.async_load if _SHORT else tma.async_copy_global_to_shared
store_box = tma.async_store if _SHORT else tma.async_copy_shared_to_global
wait_for_stores = tma.store_wait


@gluon.constexpr_function
def product_layout(columns):
    """How one warpgroup holds the 64 x `columns` result of its matrix products."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def shared_layout():
    """Rows of 2-byte channels as TMA writes and the matrix unit reads them."""
    return gl.NVMMASharedLayout(128, 16, rank=2)


@gluon.constexpr_function
def whole_box(box, keys):
    """What `box_contents` holds for a box that has all its keys."""
    packed = box[0] | box[1] << 8 | box[2] << 16 | keys << 24
    return packed - (1 << 32) if packed >= 1 << 31 else packed


@gluon.constexpr_function
def nearly_whole(keys):
    """Below what the log of the keys that count in a box is, where it lacks some."""
    return math.log(keys - 0.5)
