"""Sparse attention on CPU in plain torch, for machines without a C++ compiler.

The kept key rows of some query tiles are gathered side by side and go through torch's dense
attention kernel with a mask for the rows that do not count.
"""

from __future__ import annotations

import torch

from .call import AttentionCall, Selection, empty_output
from .tiles import TileTable, tile_table

_KEYS_AT_ONCE = 1 << 15  # gathered rows of K and of V; 8 MB each at head_dim 64 in float32


def gather_attend(call: AttentionCall, selection: Selection) -> tuple[torch.Tensor, torch.Tensor]:
    """`Executor.attend` in torch operators."""
    out = empty_output(call.q)
    lse = call.q.new_full(call.q.shape[:3], -torch.inf, dtype=torch.float32)
    for batch in range(call.q.shape[0]):
        valid = None if call.key_valid is None else call.key_valid[batch]
        for head, shape in enumerate(call.plan.tile_shapes):
            table = tile_table(call.layout, shape, call.q.device)
            kv = head // call.kv_repeat
            problem = _Head(
                call.q[batch, head],
                call.k[batch, kv],
                call.v[batch, kv],
                valid,
                call.scale,
                out[batch, head],
                lse[batch, head],
            )
            problem.video(table, selection.indices[batch, head], selection.counts[batch, head])
            problem.extra(table)
    return out, lse


class _Head:
    """One head of one batch element: q, out (Nq, D), lse (Nq,), k, v (Nk, D), valid (Nk,)."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        valid: torch.Tensor | None,
        scale: float,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        self.q, self.k, self.v, self.valid, self.scale = q, k, v, valid, scale
        self.out, self.lse = out, lse

    def extra(self, table: TileTable) -> None:
        """Extra queries attend to every valid key."""
        if table.extra_queries.numel():
            keys = torch.arange(len(self.k), device=self.k.device)
            self._attend(table.extra_queries.long()[None], keys[None])

    def video(self, table: TileTable, indices: torch.Tensor, counts: torch.Tensor) -> None:
        """Video queries attend to the keys in no tile and to the tiles that theirs keeps."""
        size = table.rows.shape[1]
        # tiles with like counts together: the shorter lists are padded to the longest
        order = torch.argsort(counts[: table.tiles], descending=True, stable=True)
        first = 0
        while first < table.tiles:
            width = int(counts[order[first]])
            keys = width * size + table.extra.numel()
            tiles = order[first : first + max(_KEYS_AT_ONCE // max(keys, 1), 1)]
            first += len(tiles)
            numbers = torch.arange(width, device=counts.device)
            listed = numbers < counts[tiles, None]
            kept = indices[tiles][:, numbers.clamp(max=indices.shape[1] - 1)].long()
            kept = torch.where(listed, kept, 0)
            kept = torch.where(counts[tiles, None] == table.tiles, numbers, kept)  # has no list
            rows = table.rows[kept].masked_fill(~listed[..., None], -1).flatten(1)
            extra = table.extra.expand(len(tiles), -1)
            self._attend(table.query_rows[tiles].long(), torch.cat([extra, rows], dim=1).long())

    def _attend(self, queries: torch.Tensor, keys: torch.Tensor) -> None:
        """queries: (t, S) rows of q, keys: (t, L) rows of k and v, -1 for none."""
        counted = keys >= 0
        if self.valid is not None:
            counted &= self.valid[keys.clamp(min=0)]
        real = queries >= 0
        some = counted.any(-1)
        if not bool(some.all()):
            nothing = queries[~some][real[~some]]
            self.out[nothing] = 0.0
            queries, keys, counted, real = (x[some] for x in (queries, keys, counted, real))
            if not len(queries):
                return
        # masked keys may hold NaN, and 0 * NaN is NaN: read a counted key in their place
        stand_in = keys.gather(1, counted.int().argmax(-1, keepdim=True))
        keys = torch.where(counted, keys, stand_in)
        q = self.q[queries.clamp(min=0)][:, None]
        k, v = self.k[keys][:, None], self.v[keys][:, None]
        mask = None
        if not bool(counted.all()):
            mask = q.new_zeros(counted.shape).masked_fill(~counted, -torch.inf)
            mask = mask[:, None, None].expand(-1, -1, q.shape[2], -1)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=mask, scale=self.scale
        )
        self.out[queries[real]] = out[:, 0][real]
        self.lse[queries[real]] = lse[:, 0][real].float()


__all__ = ["gather_attend"]
