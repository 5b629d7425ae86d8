"""What is right, at sizes where a whole reference does not fit: some query rows, exactly.

Written from the tile table and the lists alone; it shares nothing with the executors.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.stage import WrongResultError
from veda_compile.kernels.call import AttentionCall, Selection
from veda_compile.kernels.selection import kept_map, select_tiles
from veda_compile.kernels.tiles import tile_table, tiles_with_keys

TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest accepted ||out - exact|| / ||exact||."""

LISTS_APART = 0.01
"""Accepted share of kept tile pairs chosen otherwise than by `select_tiles`: near ties."""

_ROWS = 192


def relative_error(found: torch.Tensor, right: torch.Tensor) -> float:
    """||found - right|| / ||right||, in float32."""
    return float((found.float() - right.float()).norm() / right.float().norm())


def sampled_error(
    call: AttentionCall, selection: Selection | None, out: torch.Tensor, seed: int = 0
) -> float:
    """Relative error of `out` (B, H, Nq, D) in some rows of two heads; no selection is dense.

    Raises WrongResultError where it is beyond `TOLERANCE`.
    """
    device = call.q.device
    generator = torch.Generator().manual_seed(seed)
    queries = call.q.shape[2]
    rows = torch.randperm(queries, generator=generator)[: min(_ROWS, queries)]
    rows = torch.cat([rows, torch.tensor([0, queries - 1])]).to(device)
    batch = call.q.shape[0] - 1
    found, right = [], []
    for head in sorted({0, call.q.shape[1] - 1}):
        kv_head = head // call.kv_repeat
        logits = call.q[batch, head, rows].float() @ call.k[batch, kv_head].float().T * call.scale
        if selection is not None:
            seen = _seen(call, selection, batch, head, rows)
            logits = logits.masked_fill(~seen, -torch.inf)
        right.append(torch.softmax(logits, -1) @ call.v[batch, kv_head].float())
        found.append(out[batch, head, rows])
    error = relative_error(torch.cat(found), torch.cat(right))
    if not error <= TOLERANCE[call.q.dtype]:  # also refuses NaN
        raise WrongResultError(f"the output is off by {error:.1e}, relative")
    return error


def lists_apart(call: AttentionCall, selection: Selection) -> float:
    """Share of kept tile pairs that `select_tiles` would not keep.

    Tiles without a key that counts are left out: rows that keep everything may keep these or not.
    Raises WrongResultError where a list is not ascending or not as long as the reference's, or
    where the share is beyond `LISTS_APART`.
    """
    right = select_tiles(call)
    different = total = 0
    for head, shape in enumerate(call.plan.tile_shapes):
        table = tile_table(call.layout, shape, call.q.device)
        _check_form(selection, head, table.tiles)
        alive = tiles_with_keys(table, call.key_valid)[:, None, None]
        found, wanted = (kept_map(s, [head], table.tiles) & alive for s in (selection, right))
        if not torch.equal(found.sum(-1), wanted.sum(-1)):
            raise WrongResultError("other numbers of tiles are kept than by the reference")
        different += int((found & ~wanted).sum())
        total += int(wanted.sum())
    if different > LISTS_APART * total:
        raise WrongResultError(f"{different / total:.1%} of the tiles kept are not the reference's")
    return different / max(total, 1)


def kept_pairs(call: AttentionCall, selection: Selection) -> int:
    """Pairs of a query and a key that are multiplied, over batch and heads, padding left out."""
    batch, _, queries, _ = call.q.shape
    pairs = 0
    for head, shape in enumerate(call.plan.tile_shapes):
        table = tile_table(call.layout, shape, call.q.device)
        sizes = table.sizes.double()
        keys = (kept_map(selection, [head], table.tiles)[:, 0].double() @ sizes).sum(0)
        video = float(sizes @ keys) + batch * float(sizes.sum()) * len(table.extra)
        pairs += int(video) + batch * len(table.extra_queries) * call.k.shape[2]
    if pairs > batch * call.q.shape[1] * queries * call.k.shape[2]:
        raise AssertionError("more pairs than dense attention has")
    return pairs


def kept_tiles(selection: Selection, batch: int, head: int, tile: int, tiles: int) -> torch.Tensor:
    """(m,) int64: what one query tile keeps of the head's `tiles` key tiles."""
    count = int(selection.counts[batch, head, tile])
    if count == tiles:
        return torch.arange(tiles, device=selection.counts.device)
    return selection.indices[batch, head, tile, :count].long()


def _check_form(selection: Selection, head: int, tiles: int) -> None:
    if selection.counts[:, head, tiles:].any() or selection.counts[:, head].max() > tiles:
        raise WrongResultError(f"more than the {tiles} tiles that head {head} has")
    counts = selection.counts[:, head, :tiles, None]
    lists = selection.indices[:, head, :tiles].long()
    places = torch.arange(1, lists.shape[-1], device=lists.device)
    listed = (places < counts) & (counts < tiles)
    if not torch.all((lists.diff(dim=-1) > 0) | ~listed):
        raise WrongResultError("a list is not ascending")


def _seen(
    call: AttentionCall, selection: Selection, batch: int, head: int, rows: torch.Tensor
) -> torch.Tensor:
    """(rows, Nk) bool: the keys that query rows attend to."""
    table = tile_table(call.layout, call.plan.tile_shapes[head], call.q.device)
    key_tile = table.tile_of_token.long()
    seen = (key_tile < 0).repeat(len(rows), 1)
    for i, tile in enumerate(table.tile_of_query[rows].tolist()):
        if tile < 0:
            seen[i] = True
            continue
        kept = torch.zeros(table.tiles + 1, dtype=torch.bool, device=rows.device)
        kept[kept_tiles(selection, batch, head, tile, table.tiles)] = True
        seen[i] |= kept[key_tile]  # -1 is the last entry, which is never kept
    return seen
