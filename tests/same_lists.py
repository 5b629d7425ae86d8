"""Lists of kept tiles: whether two are the same, and rows that need none."""

from __future__ import annotations

import torch

from veda_compile.kernels.call import AttentionCall, Selection
from veda_compile.kernels.selection import kept_map
from veda_compile.kernels.tiles import tile_table, tiles_with_keys


def assert_lists(
    call: AttentionCall, found: Selection, right: Selection, apart: float = 0.0
) -> None:
    """`found` is well formed and keeps what `right` does, but for a share `apart` of all pairs.

    Tiles without a key that counts do not matter: a row that keeps everything may keep them too.
    """
    assert found.indices.dtype == found.counts.dtype == torch.int32
    different = pairs = 0
    for head, shape in enumerate(call.plan.tile_shapes):
        table = tile_table(call.layout, shape, call.q.device)
        counts = found.counts[:, head, : table.tiles]
        assert (found.counts[:, head, table.tiles :] == 0).all()
        assert ((counts >= 0) & (counts <= table.tiles)).all()
        lists = found.indices[:, head, : table.tiles]
        listed = torch.arange(lists.shape[-1]) < counts.where(counts < table.tiles, 0)[..., None]
        assert torch.all((lists.diff(dim=-1) > 0) | ~listed[..., 1:]), "a list is not ascending"
        assert ((lists >= 0) & (lists < table.tiles) | ~listed).all()
        alive = tiles_with_keys(table, call.key_valid)[:, None]
        kept, wanted = (kept_map(x, [head], table.tiles)[:, 0] & alive for x in (found, right))
        assert torch.equal(kept.sum(-1), wanted.sum(-1)), "other numbers of tiles"
        different += int((kept ^ wanted).sum())
        pairs += kept.numel()
    assert different <= apart * pairs


def unlisted(selection: Selection, call: AttentionCall) -> Selection:
    """The same choice with lists no longer than need be: rows that keep all tiles have none."""
    counts = selection.counts
    shapes = call.plan.tile_shapes
    tiles = [tile_table(call.layout, shape, call.q.device).tiles for shape in shapes]
    whole = counts == torch.tensor(tiles, dtype=torch.int32)[:, None]
    width = max(int(counts.masked_fill(whole, 0).max()), 1)
    unread = whole[..., None] | (torch.arange(width) >= counts[..., None])
    most = torch.iinfo(torch.int32).max
    return Selection(selection.indices[..., :width].masked_fill(unread, most), counts)
