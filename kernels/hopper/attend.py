"""Launching the Hopper forward: one launch per tile shape of the layer, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

from ..call import AttentionCall, Selection, empty_output
from ..plan import TileShape, count_tiles
from ..triton.tables import valid_rows
from .descriptors import box_contents, box_rows, grid_boxes, run_boxes
from .kernel import attend_kernel
from .overlap import side_by_side
from .views import HeadView, Runs, head_view, one_by_one, padded_width, runs_of

ROWS = 64
"""Query rows of one warpgroup."""


@dataclass(frozen=True)
class AttendConfig:
    """How the kernel is launched.

    groups: warpgroups with query rows, each of `ROWS`; a tile is what a program's groups have.
    stages: boxes of keys, and as many of values, in shared memory.
    registers: per thread of the second group; the loading warp has 40, the first group the rest.
    most_registers: per thread at launch, None for all there are; 128 lets two programs share a
        multiprocessor, so that one's softmax meets the other's products.
    """

    groups: int
    stages: int
    registers: int
    most_registers: int | None


# by (head_dim, tile_size); each compiles without register spills
CONFIGS = {
    (64, 64): AttendConfig(1, 4, 0, 128),
    (64, 128): AttendConfig(2, 4, 232, None),
    (96, 64): AttendConfig(1, 3, 0, 128),
    (96, 128): AttendConfig(2, 3, 232, None),
    (128, 64): AttendConfig(1, 3, 0, 128),
    (128, 128): AttendConfig(2, 3, 232, None),
}


def attend(call: AttentionCall, selection: Selection) -> tuple[torch.Tensor, torch.Tensor]:
    """out (B, H, Nq, D) stored as (B, Nq, H, D) and the natural-log LSE (B, H, Nq) float32.

    For calls that `refusal` has nothing against. A row without any key gives 0 and LSE -inf. List
    entries past a row's count are not read. Values of keys that do not count must be finite, as in
    torch's own attention: they are multiplied by 0.
    """
    q = call.q
    out = empty_output(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    lists = Selection(selection.indices.contiguous(), selection.counts.contiguous())
    # all made before any runs: what these allocate belongs to the current stream
    launches = [
        _launch(*part, shape, tuple(heads))
        for part in _parts(call, lists, out, lse)
        for shape, heads in call.plan.groups().items()
    ]
    side_by_side(q.device, launches)
    return out, lse


def _parts(
    call: AttentionCall, lists: Selection, out: torch.Tensor, lse: torch.Tensor
) -> list[tuple[AttentionCall, Selection, torch.Tensor, torch.Tensor]]:
    """All of a call and where its results go, or each batch element of it."""
    if not one_by_one(call.q.shape[3]):
        return [(call, lists, out, lse)]
    parts = []
    for b in range(call.q.shape[0]):
        q, k, v = (x[b : b + 1] for x in (call.q, call.k, call.v))
        valid = None if call.key_valid is None else call.key_valid[b : b + 1]
        chosen = Selection(lists.indices[b : b + 1], lists.counts[b : b + 1])
        element = replace(call, q=q, k=k, v=v, key_valid=valid)
        parts.append((element, chosen, out[b : b + 1], lse[b : b + 1]))
    return parts


def _launch(
    call: AttentionCall,
    lists: Selection,
    out: torch.Tensor,
    lse: torch.Tensor,
    shape: TileShape,
    heads: tuple[int, ...],
) -> Callable[[], None]:
    """What writes the rows of these heads, which all have tiles of this shape."""
    q, k, v = call.q, call.k, call.v
    head_dim, keys = q.shape[3], call.plan.tile_size
    config = CONFIGS[head_dim, keys]
    runs = runs_of(call.layout)
    grid, share = runs.grid, _share(shape, config.groups)
    q_view, k_view, v_view, out_view = _view(q), _view(k), _view(v), _view(out)
    past_keys, past_queries = (
        math.prod(grid) + before for before in (runs.before_keys, runs.before_queries)
    )
    tiles = count_tiles(grid, shape)
    slots = tiles + sum(-(-n // keys) for n in (runs.before_queries, runs.after_queries))
    contents, key_rows = _keys(call, runs, shape)
    return partial(
        attend_kernel[(slots, len(heads), q.shape[0])],
        grid_boxes(q, q_view, runs.before_queries, grid, share),
        grid_boxes(k, k_view, runs.before_keys, grid, shape),
        grid_boxes(v, v_view, runs.before_keys, grid, shape),
        grid_boxes(out, out_view, runs.before_queries, grid, share),
        run_boxes(q, q_view, 0, runs.before_queries, ROWS),
        run_boxes(q, q_view, past_queries, runs.after_queries, ROWS),
        run_boxes(k, k_view, 0, runs.before_keys, keys),
        run_boxes(k, k_view, past_keys, runs.after_keys, keys),
        run_boxes(v, v_view, 0, runs.before_keys, keys),
        run_boxes(v, v_view, past_keys, runs.after_keys, keys),
        run_boxes(out, out_view, 0, runs.before_queries, ROWS),
        run_boxes(out, out_view, past_queries, runs.after_queries, ROWS),
        lse,
        _numbers(heads, q.device),
        lists.indices,
        lists.counts,
        contents,
        key_rows,
        contents.shape[-1],
        q_view.step,
        k_view.step,
        v_view.step,
        out_view.step,
        q.shape[1],
        call.kv_repeat,
        lists.indices.shape[2],
        lists.indices.shape[3],
        q.shape[2],
        *grid,
        -(-grid[1] // shape[1]),
        -(-grid[2] // shape[2]),
        tiles,
        runs.before_keys,
        runs.after_keys,
        runs.before_queries,
        runs.after_queries,
        call.scale * math.log2(math.e),
        BOX=shape,
        SHARE=share,
        HEAD_DIM=padded_width(head_dim),
        GROUPS=config.groups,
        BLOCK_N=keys,
        STAGES=config.stages,
        # whole tiles, no other tokens and none ruled out: no box lacks a key
        MASKED=key_rows is not None
        or contents.shape[-1] > tiles
        or any(n % p for n, p in zip(grid, shape, strict=True)),
        Q_FOLDED=q_view.folded,
        K_FOLDED=k_view.folded,
        V_FOLDED=v_view.folded,
        OUT_FOLDED=out_view.folded,
        REGISTERS=config.registers,
        num_warps=4,
        maxnreg=config.most_registers,
        enable_fp_fusion=True,
    )


def _keys(
    call: AttentionCall, runs: Runs, shape: TileShape
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`contents` and `key_rows` of the kernel."""
    size, device = call.plan.tile_size, call.q.device
    if call.key_valid is None:
        return box_contents(runs, shape, size, device), None
    keys = valid_rows(box_rows(runs, shape, size, device), call.key_valid)
    return keys.log_sizes, keys.rows


def _view(x: torch.Tensor) -> HeadView:
    view = head_view(x)
    if view is None:
        raise AssertionError(f"strides {x.stride()}: `refusal` comes first")
    return view


def _share(shape: TileShape, groups: int) -> TileShape:
    """The box of one of `groups` equal shares of a tile, cut along its first side above 1."""
    if groups == 1:
        return shape
    t, h, w = shape
    if t > 1:
        return (t // groups, h, w)
    return (t, h // groups, w) if h > 1 else (t, h, w // groups)


@lru_cache(maxsize=256)
def _numbers(heads: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(h,) int32 on `device`; cached, read-only."""
    return torch.tensor(heads, dtype=torch.int32, device="cpu").to(device)
