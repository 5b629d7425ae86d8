"""What the warps of a program do: one loads boxes, the others multiply and take the softmax.

ROWS query rows make one warpgroup's share, `group` its number. A step is one box of BLOCK_N keys:
first the `listed` tiles, then the boxes of the tokens before and after the video. Steps go round a
ring of STAGES boxes; `(step // STAGES) & 1` is the parity of the ring's current round.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .names import (
    load_box,
    nearly_whole,
    product_layout,
    store_box,
    wait_for_stores,
    whole_box,
)

ROWS = gl.constexpr(64)


@gluon.jit
def corner(tile, tiles_h, tiles_w, BOX: gl.constexpr):
    """The place (t, h, w) on the grid of a tile's first token."""
    line = tile // tiles_w
    return (line // tiles_h) * BOX[0], (line % tiles_h) * BOX[1], (tile % tiles_w) * BOX[2]


@gluon.jit
def share_of(t, h, w, group, BOX: gl.constexpr, SHARE: gl.constexpr):
    """The place of the first token of a warpgroup's share of a query tile."""
    t = t + group * (BOX[0] - SHARE[0])
    h = h + group * (BOX[1] - SHARE[1])
    return t, h, w + group * (BOX[2] - SHARE[2])


@gluon.jit
def box_at(tile_list, step, listed, everything, tiles):
    """The box of a step: its tile, and past the tiles those of tokens without a grid.

    Where `everything` is kept there is no list: a step's tile has the step's own number.
    """
    found = gl.load(tile_list + step, mask=(step < listed) & (everything == 0), other=0)
    return gl.where(step < listed, gl.where(everything != 0, step, found), tiles + step - listed)


@gluon.jit
def load_queries(
    boxes, before, after, at, q_smem, q_full, slot, before_slots, extra_slots, across,
    BOX: gl.constexpr, SHARE: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """All warpgroups' query rows, once per program."""
    lead, last = at
    mbarrier.expect(q_full, GROUPS * ROWS * D * 2)
    for group in gl.static_range(GROUPS):
        if slot >= extra_slots:
            t, h, w = corner(slot - extra_slots, across[0], across[1], BOX)
            t, h, w = share_of(t, h, w, group, BOX, SHARE)
            share = q_smem.index(group).reshape([1, SHARE[0], SHARE[1], SHARE[2], D])
            load_box(boxes, [lead, t, h, w, last], q_full, share)
        if before is not None:
            if slot < before_slots:
                row = (slot * GROUPS + group) * ROWS
                run = q_smem.index(group).reshape([1, ROWS, D])
                load_box(before, [lead, row, last], q_full, run)
        if after is not None:
            if (slot >= before_slots) & (slot < extra_slots):
                row = ((slot - before_slots) * GROUPS + group) * ROWS
                run = q_smem.index(group).reshape([1, ROWS, D])
                load_box(after, [lead, row, last], q_full, run)


@gluon.jit
def load_step(
    boxes, before, after, at, ring, full, free, step, listed, before_steps, t, h, w,
    BOX: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One step's keys, or its values, into the ring, once nobody reads that stage any more."""
    lead, last = at
    stage = step % STAGES
    mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), BLOCK_N * D * 2)
    if step < listed:
        box = ring.index(stage).reshape([1, BOX[0], BOX[1], BOX[2], D])
        load_box(boxes, [lead, t, h, w, last], full.index(stage), box)
    run = step - listed
    if before is not None:
        if (run >= 0) & (run < before_steps):
            rows = ring.index(stage).reshape([1, BLOCK_N, D])
            load_box(before, [lead, run * BLOCK_N, last], full.index(stage), rows)
    if after is not None:
        if (run >= 0) & (run >= before_steps):
            rows = ring.index(stage).reshape([1, BLOCK_N, D])
            place = (run - before_steps) * BLOCK_N
            load_box(after, [lead, place, last], full.index(stage), rows)


@gluon.jit
def load(
    q_boxes, k_boxes, v_boxes, q_before, q_after, k_before, k_after, v_before, v_after,
    q_at, k_at, v_at, q_smem, k_ring, v_ring, q_full, k_full, k_free, v_full, v_free,
    slot, before_slots, extra_slots, tile_list, listed, before_steps, extra_steps, tiles, across,
    BOX: gl.constexpr, SHARE: gl.constexpr, GROUPS: gl.constexpr, BLOCK_N: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp. A step's box is read a step ahead, off the way of the loads."""
    load_queries(
        q_boxes, q_before, q_after, q_at, q_smem, q_full, slot, before_slots, extra_slots, across,
        BOX, SHARE, GROUPS, D,
    )  # fmt: skip
    everything = gl.cast(listed == tiles, gl.int32)
    box = box_at(tile_list, 0, listed, everything, tiles)
    for step in range(listed + extra_steps):
        t, h, w = corner(box, across[0], across[1], BOX)
        box = box_at(tile_list, step + 1, listed, everything, tiles)
        load_step(
            k_boxes, k_before, k_after, k_at, k_ring, k_full, k_free, step, listed, before_steps,
            t, h, w, BOX, BLOCK_N, D, STAGES,
        )  # fmt: skip
        load_step(
            v_boxes, v_before, v_after, v_at, v_ring, v_full, v_free, step, listed, before_steps,
            t, h, w, BOX, BLOCK_N, D, STAGES,
        )  # fmt: skip


@gluon.jit
def hide_absent(logits, found, key_rows, box, BOX: gl.constexpr, BLOCK_N: gl.constexpr):
    """-inf for keys that are none: what a box has outside the grid or past its segment's end.

    found: what the box does have, see `box_contents`; with `key_rows`, the keys at the places of
    all boxes, -1 for those that do not count, it is the log of how many do. Whole boxes, nearly
    all of them, cost one comparison.
    """
    if key_rows is not None:
        if found < nearly_whole(BLOCK_N):
            columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, product_layout(BLOCK_N)))
            there = gl.load(key_rows + box * BLOCK_N + columns) >= 0
            logits = gl.where(there[None, :], logits, -float("inf"))
    elif found != whole_box(BOX, BLOCK_N):
        columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, product_layout(BLOCK_N)))
        # 0, which the compiler cannot see: it would compute the places of all columns before the
        # loop and keep them in registers that the products need
        column = columns + gl.minimum((found >> 24) & 255, 1) - 1
        there = column < (found >> 24) & 255
        there = there & (column // (BOX[1] * BOX[2]) < found & 255)
        there = there & (column // BOX[2] % BOX[1] < (found >> 8) & 255)
        there = there & (column % BOX[2] < (found >> 16) & 255)
        logits = gl.where(there[None, :], logits, -float("inf"))
    return logits


@gluon.jit
def shift_of(highest, scale, key_rows):
    """What the scaled logits are taken against: their maximum, 0 in rows without any key so far.

    -inf - -inf would be NaN. Without `key_rows` every box has a key that counts.
    """
    shift = highest * scale
    if key_rows is not None:
        shift = gl.where(highest == -float("inf"), 0.0, shift)
    return shift


@gluon.jit
def begin_logits(q, ring, full, step, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Start the products of the query rows with a step's keys."""
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    nothing = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, product_layout(BLOCK_N))
    keys = ring.index(step % STAGES).permute((1, 0))
    return warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)


@gluon.jit
def begin_values(p, ring, full, acc, step, STAGES: gl.constexpr):
    """Start adding a step's weighted values."""
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    return warpgroup_mma(p, ring.index(step % STAGES), acc, is_async=True)


@gluon.jit
def attend_rows(
    q_smem, k_ring, v_ring, q_full, k_full, k_free, v_full, v_free, turns,
    out_boxes, out_before, out_after, lse, group: gl.constexpr,
    slot, before_slots, extra_slots, tile_list, listed, contents, key_rows, extra_steps,
    before_queries, after_queries, out_at, tiles, across, grid, scale,
    BOX: gl.constexpr, SHARE: gl.constexpr, GROUPS: gl.constexpr, BLOCK_N: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """A warpgroup's 64 query rows: online softmax over the steps, then output and LSE.

    While the softmax of a step runs, the matrix unit adds the values of the step before. `scale`
    carries log2(e), for exp2, and is positive, so that the maximum can be taken before it.
    """
    LOGITS: gl.constexpr = product_layout(BLOCK_N)
    OUT: gl.constexpr = product_layout(D)
    LOGIT_ROWS: gl.constexpr = gl.SliceLayout(1, LOGITS)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    q = q_smem.index(group)
    highest = gl.full([ROWS], -float("inf"), gl.float32, LOGIT_ROWS)
    total = gl.full([ROWS], 0.0, gl.float32, LOGIT_ROWS)
    acc = gl.full([ROWS, D], 0.0, gl.float32, OUT)
    steps = listed + extra_steps
    everything = gl.cast(listed == tiles, gl.int32)
    mbarrier.wait(q_full, 0)
    if steps > 0:
        if MASKED:
            here = box_at(tile_list, 0, listed, everything, tiles)
            found = gl.load(contents + here)
            box = box_at(tile_list, 1, listed, everything, tiles)
        logits = begin_logits(q, k_ring, k_full, 0, BLOCK_N, STAGES)
        logits = warpgroup_mma_wait(0, deps=[logits])
        mbarrier.arrive(k_free.index(0))
        if MASKED:
            logits = hide_absent(logits, found, key_rows, here, BOX, BLOCK_N)
        highest = gl.max(logits, 1)
        weights = gl.exp2(logits * scale - shift_of(highest, scale, key_rows)[:, None])
        total = gl.sum(weights, 1)
        p = gl.convert_layout(gl.cast(weights, q.dtype), WEIGHTS)
        for step in range(1, steps):
            if MASKED:
                here = box
                found = gl.load(contents + here)
                box = box_at(tile_list, step + 1, listed, everything, tiles)
            if GROUPS == 2:  # in turn, so that one's softmax meets the other's products
                mbarrier.wait(turns.index(group), (step ^ group) & 1)
            logits = begin_logits(q, k_ring, k_full, step, BLOCK_N, STAGES)
            acc = begin_values(p, v_ring, v_full, acc, step - 1, STAGES)
            if GROUPS == 2:
                mbarrier.arrive(turns.index(1 - group))
            logits = warpgroup_mma_wait(1, deps=[logits])
            mbarrier.arrive(k_free.index(step % STAGES))
            if MASKED:
                logits = hide_absent(logits, found, key_rows, here, BOX, BLOCK_N)
            higher = gl.maximum(highest, gl.max(logits, 1))
            shift = shift_of(higher, scale, key_rows)
            weights = gl.exp2(logits * scale - shift[:, None])
            decay = gl.exp2(highest * scale - shift)
            total = total * decay + gl.sum(weights, 1)
            highest = higher
            next_p = gl.convert_layout(gl.cast(weights, q.dtype), WEIGHTS)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_free.index((step - 1) % STAGES))
            acc = acc * gl.convert_layout(decay, OUT_ROWS)[:, None]
            p = next_p
        acc = begin_values(p, v_ring, v_full, acc, steps - 1, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])

    inverse = 1.0 / gl.where(total == 0.0, 1.0, total)
    out = acc * gl.convert_layout(inverse, OUT_ROWS)[:, None]
    # no product reads these query rows any more: the output goes out through their place
    q.store(gl.cast(out, q.dtype))
    fence_async_shared()
    lead, last = out_at
    natural = (highest * scale + gl.log2(total)) * 0.6931471805599453
    row = gl.arange(0, ROWS, layout=LOGIT_ROWS)
    if slot >= extra_slots:
        t, h, w = corner(slot - extra_slots, across[0], across[1], BOX)
        t, h, w = share_of(t, h, w, group, BOX, SHARE)
        store_box(out_boxes, [lead, t, h, w, last], q.reshape([1, SHARE[0], SHARE[1], SHARE[2], D]))
        t_row = t + row // (SHARE[1] * SHARE[2])
        h_row = h + row // SHARE[2] % SHARE[1]
        w_row = w + row % SHARE[2]
        there = (t_row < grid[0]) & (h_row < grid[1]) & (w_row < grid[2])
        place = before_queries + (t_row * grid[1] + h_row) * grid[2] + w_row
        gl.store(lse + place, natural, mask=there)
    if out_before is not None:
        if slot < before_slots:
            first = (slot * GROUPS + group) * ROWS
            store_box(out_before, [lead, first, last], q.reshape([1, ROWS, D]))
            gl.store(lse + first + row, natural, mask=first + row < before_queries)
    if out_after is not None:
        if (slot >= before_slots) & (slot < extra_slots):
            first = ((slot - before_slots) * GROUPS + group) * ROWS
            store_box(out_after, [lead, first, last], q.reshape([1, ROWS, D]))
            past = before_queries + grid[0] * grid[1] * grid[2] + first
            gl.store(lse + past + row, natural, mask=first + row < after_queries)
    wait_for_stores(0)
