"""Rounding alone: our kernel and dense attention on the very same tokens, against float64.

The queries of some tiles, with the keys these tiles keep. Dense attention gets these keys alone,
gathered, in the same dtype; so both compute the same sums, and what differs is rounding.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.baselines import Attention
from benchmarks.gpu.exact import kept_tiles
from veda_compile.kernels.call import AttentionCall, Selection
from veda_compile.kernels.tiles import tile_table

_TILES = 12


def rounding_errors(
    call: AttentionCall,
    selection: Selection,
    out: torch.Tensor,
    dense: dict[str, Attention],
    seed: int = 0,
) -> dict[str, float]:
    """Relative L2 errors against float64: "ours", of `out` (B, H, Nq, D), and by name of `dense`.

    Over the rows of up to 12 query tiles of two heads; a dense attention that does not take such
    short calls is left out. Calls with `key_valid` are not taken.
    """
    assert call.key_valid is None
    generator = torch.Generator().manual_seed(seed)
    batch, heads = call.q.shape[0] - 1, call.q.shape[1]
    wrong: dict[str, float] = dict.fromkeys(("ours", *dense), 0.0)
    energy = 0.0
    for head in sorted({0, heads - 1}):
        table = tile_table(call.layout, call.plan.tile_shapes[head], call.q.device)
        for tile in torch.randperm(table.tiles, generator=generator)[:_TILES].tolist():
            rows = _real(table.query_rows[tile])
            kept = kept_tiles(selection, batch, head, tile, table.tiles)
            keys = torch.cat([_real(table.rows[kept].flatten()), table.extra.long()])
            kv_head = head // call.kv_repeat
            q = call.q[batch, head, rows][None, None]
            k, v = (x[batch, kv_head, keys][None, None] for x in (call.k, call.v))
            logits = q.double() @ k.double().transpose(-1, -2) * call.scale
            right = torch.softmax(logits, -1) @ v.double()
            energy += float(right.square().sum())
            wrong["ours"] += _squared(out[batch, head, rows][None, None], right)
            for name in [name for name in dense if name in wrong]:
                try:
                    wrong[name] += _squared(dense[name](q, k, v), right)
                except RuntimeError:
                    del wrong[name]
    return {name: (value / energy) ** 0.5 for name, value in wrong.items()}


def _real(rows: torch.Tensor) -> torch.Tensor:
    """The tokens of rows that are not padding."""
    return rows[rows >= 0].long()


def _squared(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right).square().sum())
