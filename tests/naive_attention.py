"""A deliberately naive tile-sparse attention in float64, independent of the project's own.

It knows nothing of tile tables or lists: a token's tile is told by its coordinates, and everything
is a loop over tokens or tiles. Tokens are numbered as keys; `queries_of` tells which have queries.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import torch

from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.layout import Context, Layout, Video
from veda_compile.kernels.plan import Plan, TileShape
from veda_compile.kernels.static_modes import StaticMode

Box = tuple[int, int, int, int]
"""A tile: (segment, box along t, along h, along w)."""


def boxes_of_tokens(layout: Layout, shape: TileShape) -> list[Box | None]:
    """The tile of every key, None for extra and context tokens."""
    found: list[Box | None] = []
    for number, segment in enumerate(layout.segments):
        if isinstance(segment, Video):
            for t, h, w in itertools.product(*map(range, segment.grid)):
                found.append((number, t // shape[0], h // shape[1], w // shape[2]))
        else:
            found += [None] * segment.length
    return found


def queries_of(layout: Layout) -> list[int]:
    """The key number of every query, in order."""
    has_query = [not isinstance(s, Context) for s in layout.segments for _ in range(s.length)]
    return [token for token, has in enumerate(has_query) if has]


def naive_attention(
    call: AttentionCall,
) -> tuple[torch.Tensor, torch.Tensor, list[list[dict[Box, list[Box]]]]]:
    """(out, lse, kept): kept[b][h] maps every query tile to the key tiles it keeps."""
    batch, heads, rows, head_dim = call.q.shape
    tokens, queries = call.k.shape[2], queries_of(call.layout)
    assert len(queries) == rows
    out = torch.zeros(batch, heads, rows, head_dim, dtype=torch.float64)
    lse = torch.full((batch, heads, rows), -math.inf, dtype=torch.float64)
    kept: list[list[dict[Box, list[Box]]]] = []
    for b in range(batch):
        kept.append([])
        for h in range(heads):
            kv = h // (heads // call.k.shape[1])
            q = dict(zip(queries, call.q[b, h].double(), strict=True))
            k, v = call.k[b, kv].double(), call.v[b, kv].double()
            valid = [call.key_valid is None or bool(call.key_valid[b, n]) for n in range(tokens)]
            lists = naive_selection(call, h, q, k, valid)
            kept[b].append(lists)
            box_of = boxes_of_tokens(call.layout, call.plan.tile_shapes[h])
            for row, n in enumerate(queries):
                keys = [m for m in range(tokens) if valid[m] and _attends(box_of, lists, n, m)]
                if keys:
                    logits = call.scale * (k[keys] @ q[n])
                    lse[b, h, row] = torch.logsumexp(logits, 0)
                    out[b, h, row] = torch.softmax(logits, 0) @ v[keys]
    return out, lse, kept


def _attends(box_of: list[Box | None], lists: dict[Box, list[Box]], query: int, key: int) -> bool:
    q_box, k_box = box_of[query], box_of[key]
    return q_box is None or k_box is None or k_box in lists[q_box]


def naive_selection(
    call: AttentionCall,
    head: int,
    q: dict[int, torch.Tensor],
    k: torch.Tensor,
    valid: list[bool],
) -> dict[Box, list[Box]]:
    """The key tiles every query tile keeps, by the plan's score or the head's static mode."""
    keep_all = call.keep_all is not None and bool(call.keep_all)
    plan, shape = call.plan, call.plan.tile_shapes[head]
    members: dict[Box, list[int]] = {}
    for token, box in enumerate(boxes_of_tokens(call.layout, shape)):
        if box is not None:
            members.setdefault(box, []).append(token)
    keys = {box: [n for n in rows if valid[n]] for box, rows in members.items()}
    lists: dict[Box, list[Box]] = {}
    for segment in sorted({box[0] for box in members}):
        q_boxes = sorted(box for box in members if box[0] == segment)
        for place, q_box in enumerate(q_boxes):
            lists[q_box] = []
            q_rows = torch.stack([q[token] for token in members[q_box]])
            for k_segment in sorted({box[0] for box in members}):
                k_boxes = sorted(box for box in members if box[0] == k_segment)
                mode = plan.mode(head)
                if mode is not None and not keep_all:
                    kept = naive_static(mode, q_box, q_boxes, k_boxes)
                    lists[q_box] += [box for box in kept if keys[box]]
                    continue
                budget = _budget(
                    plan.density[head],
                    math.prod(shape),
                    sum(len(members[box]) for box in q_boxes),
                    sum(len(members[box]) for box in k_boxes),
                    place,
                    len(q_boxes),
                )
                if keep_all or plan.density[head] == 1.0:
                    budget = len(k_boxes)
                ranked = sorted(
                    (box for box in k_boxes if keys[box]),
                    key=lambda box: (
                        box != q_box,
                        -naive_score(plan, head, q_rows, k[keys[box]], call.scale),
                        box,
                    ),
                )
                lists[q_box] += ranked[: max(budget, 1)]
    return lists


def _budget(density: float, size: int, q_tokens: int, k_tokens: int, place: int, tiles: int) -> int:
    ideal = math.ceil(q_tokens / size) * math.ceil(k_tokens / size)
    share = Fraction(str(density)) * ideal / tiles
    whole, part = divmod(share, 1)
    return int(whole) + int(math.floor((place + 1) * part) > math.floor(place * part))


def naive_score(plan: Plan, head: int, q: torch.Tensor, k: torch.Tensor, scale: float) -> float:
    """Of the rows q of a query tile and the rows k of a key tile, both (rows, D) in float64."""
    means = [q.mean(0), k.mean(0)]
    if plan.score == "mean":
        return scale * float(means[0] @ means[1])
    if plan.projection is not None:
        for side, rows in enumerate((q, k)):
            pooled = torch.cat([rows.mean(0), rows.amax(0), rows.amin(0)])
            means[side] = means[side] + pooled @ plan.projection[side, head].double()
    spread = [(q**2).mean(0), ((k - k.mean(0)) ** 2).mean(0)]
    if plan.factors is not None:
        spread = [x @ plan.factors[side, head].double() for side, x in enumerate(spread)]
    second = scale**2 / 2 * float(spread[0] @ spread[1])
    return math.log(len(k)) + scale * float(means[0] @ means[1]) + second


def naive_static(mode: StaticMode, q_box: Box, q_boxes: list[Box], k_boxes: list[Box]) -> list[Box]:
    """The key tiles of one segment that a static head's query tile keeps."""
    q_sides, k_sides = (
        [1 + max(box[side] for box in boxes) for side in (1, 2, 3)] for boxes in (q_boxes, k_boxes)
    )
    # the tile where the middle of the query tile lies, as a share of each side of the grid
    at = [math.floor(Fraction(2 * x + 1, 2 * q) * k)
          for x, q, k in zip(q_box[1:], q_sides, k_sides, strict=True)]  # fmt: skip
    kept = []
    for box in k_boxes:
        t, h, w = box[1:]
        in_frame = h * k_sides[2] + w - (at[1] * k_sides[2] + at[2])
        in_grid = (t - at[0]) * k_sides[1] * k_sides[2] + in_frame
        if mode.kind == "full":
            keep = True
        elif mode.kind == "skip":
            keep = False
        elif mode.kind == "diagonal":
            keep = abs(in_grid) <= mode.reach[0]
        elif mode.kind == "multi_diagonal":
            keep = abs(t - at[0]) <= mode.reach[0] and abs(in_frame) <= mode.reach[1]
        else:
            columns = [[math.floor(round(share, 6) * side) for share, side
                        in zip(column, k_sides, strict=True)]
                       for column in mode.columns]  # fmt: skip
            keep = [t, h, w] in [*columns, at]
        if keep:
            kept.append(box)
    return kept
