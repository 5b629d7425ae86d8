"""The tile-skipping forward for Hopper: the kernel, which hands its roles to warps."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .names import shared_layout
from .roles import ROWS, attend_rows, load


@gluon.jit
def place_of(batch, head, heads, step, FOLDED: gl.constexpr):
    """(leading coordinate, offset on the last axis) of one head in a tensor's boxes."""
    if FOLDED:
        return batch * heads + head, 0
    else:  # noqa: RET505 - both would be compiled
        return batch, head * step


# sizes change no instruction of the loops: one compilation serves all grids and text lengths
SIZES = (
    "boxes",
    "q_step",
    "k_step",
    "v_step",
    "out_step",
    "heads",
    "kv_repeat",
    "list_rows",
    "list_width",
    "queries",
    "grid_t",
    "grid_h",
    "grid_w",
    "tiles_h",
    "tiles_w",
    "tiles",
    "before_keys",
    "after_keys",
    "before_queries",
    "after_queries",
)


@gluon.jit(do_not_specialize=SIZES)
def attend_kernel(
    q_boxes,
    k_boxes,
    v_boxes,
    out_boxes,
    q_before,
    q_after,
    k_before,
    k_after,
    v_before,
    v_after,
    out_before,
    out_after,
    lse_ptr,
    heads_ptr,
    indices_ptr,
    counts_ptr,
    contents_ptr,
    key_rows_ptr,
    boxes,
    q_step,
    k_step,
    v_step,
    out_step,
    heads,
    kv_repeat,
    list_rows,
    list_width,
    queries,
    grid_t,
    grid_h,
    grid_w,
    tiles_h,
    tiles_w,
    tiles,
    before_keys,
    after_keys,
    before_queries,
    after_queries,
    scale,
    BOX: gl.constexpr,
    SHARE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    GROUPS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    Q_FOLDED: gl.constexpr,
    K_FOLDED: gl.constexpr,
    V_FOLDED: gl.constexpr,
    OUT_FOLDED: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """One program computes GROUPS * 64 query rows of one head: a tile, or tokens of no grid.

    Programs of tokens without a grid attend to everything, run longest and come first. BOX is the
    tile shape, SHARE the part of it that one warpgroup has. A descriptor that the sequence has no
    use for is None. `*_step`: elements from one head to the next on a box's last axis. key_rows:
    None, or (B, boxes, BLOCK_N) int32 with the keys of each batch element that count, else -1.
    contents: (boxes,), of all batch elements, or with key_rows (B, boxes): see `hide_absent`.
    """
    slot = gl.program_id(0)
    head = gl.load(heads_ptr + gl.program_id(1))
    batch = gl.program_id(2)
    before_slots = (before_queries + GROUPS * ROWS - 1) // (GROUPS * ROWS)
    extra_slots = before_slots + (after_queries + GROUPS * ROWS - 1) // (GROUPS * ROWS)
    before_steps = (before_keys + BLOCK_N - 1) // BLOCK_N
    extra_steps = before_steps + (after_keys + BLOCK_N - 1) // BLOCK_N

    place = gl.cast(batch, gl.int64) * heads + head
    line = place * list_rows + gl.maximum(slot - extra_slots, 0)
    listed = tiles
    if slot >= extra_slots:
        listed = gl.load(counts_ptr + line)
    tile_list = indices_ptr + line * list_width
    lse = lse_ptr + place * queries
    contents, key_rows = contents_ptr, key_rows_ptr
    if key_rows_ptr is not None:
        contents = contents_ptr + gl.cast(batch, gl.int64) * boxes
        key_rows = key_rows_ptr + gl.cast(batch, gl.int64) * boxes * BLOCK_N
    kv_heads = heads // kv_repeat
    q_at = place_of(batch, head, heads, q_step, Q_FOLDED)
    k_at = place_of(batch, head // kv_repeat, kv_heads, k_step, K_FOLDED)
    v_at = place_of(batch, head // kv_repeat, kv_heads, v_step, V_FOLDED)
    out_at = place_of(batch, head, heads, out_step, OUT_FOLDED)
    grid = (grid_t, grid_h, grid_w)
    across = (tiles_h, tiles_w)

    q_smem = gl.allocate_shared_memory(q_boxes.dtype, [GROUPS, ROWS, HEAD_DIM], shared_layout())
    k_ring = gl.allocate_shared_memory(q_boxes.dtype, [STAGES, BLOCK_N, HEAD_DIM], shared_layout())
    v_ring = gl.allocate_shared_memory(q_boxes.dtype, [STAGES, BLOCK_N, HEAD_DIM], shared_layout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, 1)
    for group in gl.static_range(GROUPS):
        mbarrier.init(turns.index(group), 1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), 1)
        mbarrier.init(v_full.index(stage), 1)
        mbarrier.init(k_free.index(stage), GROUPS)
        mbarrier.init(v_free.index(stage), GROUPS)
    fence_async_shared()  # copies count their bytes on barriers they have to see

    # arguments are spelled out: constants within a tuple that has a name would become variables
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (attend_rows, (q_smem, k_ring, v_ring, q_full, k_full, k_free, v_full, v_free,
                               turns, out_boxes, out_before, out_after, lse, 0,
                               slot, before_slots, extra_slots, tile_list, listed, contents,
                               key_rows, extra_steps, before_queries, after_queries, out_at,
                               tiles, across, grid, scale, BOX, SHARE, GROUPS, BLOCK_N,
                               HEAD_DIM, STAGES, MASKED)),
                (attend_rows, (q_smem, k_ring, v_ring, q_full, k_full, k_free, v_full, v_free,
                               turns, out_boxes, out_before, out_after, lse, 1,
                               slot, before_slots, extra_slots, tile_list, listed, contents,
                               key_rows, extra_steps, before_queries, after_queries, out_at,
                               tiles, across, grid, scale, BOX, SHARE, GROUPS, BLOCK_N,
                               HEAD_DIM, STAGES, MASKED)),
                (load, (q_boxes, k_boxes, v_boxes, q_before, q_after, k_before, k_after,
                        v_before, v_after, q_at, k_at, v_at,
                        q_smem, k_ring, v_ring, q_full, k_full, k_free, v_full, v_free,
                        slot, before_slots, extra_slots, tile_list, listed,
                        before_steps, extra_steps, tiles, across,
                        BOX, SHARE, GROUPS, BLOCK_N, HEAD_DIM, STAGES)),
            ],
            [4, 1],
            [REGISTERS, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (attend_rows, (q_smem, k_ring, v_ring, q_full, k_full, k_free, v_full, v_free,
                               turns, out_boxes, out_before, out_after, lse, 0,
                               slot, before_slots, extra_slots, tile_list, listed, contents,
                               key_rows, extra_steps, before_queries, after_queries, out_at,
                               tiles, across, grid, scale, BOX, SHARE, GROUPS, BLOCK_N,
                               HEAD_DIM, STAGES, MASKED)),
                (load, (q_boxes, k_boxes, v_boxes, q_before, q_after, k_before, k_after,
                        v_before, v_after, q_at, k_at, v_at,
                        q_smem, k_ring, v_ring, q_full, k_full, k_free, v_full, v_free,
                        slot, before_slots, extra_slots, tile_list, listed,
                        before_steps, extra_steps, tiles, across,
                        BOX, SHARE, GROUPS, BLOCK_N, HEAD_DIM, STAGES)),
            ],
            [1],
            [40],
        )  # fmt: skip
