"""FlexAttention over the same tiles as ours: tokens in tile order, our lists as its BlockMask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.gpu.stage import SkippedError
from veda_compile.kernels.call import AttentionCall, Selection
from veda_compile.kernels.selection import kept_map
from veda_compile.kernels.tiles import tile_table

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class TileOrder:
    """All tokens sorted by tile, every tile padded to the full size; text in tiles at the end.

    tokens: (P,) the token at each place, 0 in padding. real: (P,) bool. places: (N,) the place of
    each token. sizes: (n + e,) int32, real rows of each tile. video_tiles: n.
    """

    tokens: torch.Tensor
    real: torch.Tensor
    places: torch.Tensor
    sizes: torch.Tensor
    video_tiles: int

    def sort(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, N, D) to (B, H, P, D), contiguous."""
        return x.index_select(2, self.tokens)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of `sort`."""
        return x.index_select(2, self.places)


def tile_order(call: AttentionCall) -> TileOrder:
    """The order of a call whose heads share one tile shape and that has no context tokens."""
    if len(call.plan.groups()) != 1 or call.layout.contexts:
        raise SkippedError("heads with tile shapes of their own, or context tokens")
    table = tile_table(call.layout, call.plan.tile_shapes[0], call.q.device)
    size = call.plan.tile_size
    extra = table.extra.new_full((-(-len(table.extra) // size) * size,), -1)
    extra[: len(table.extra)] = table.extra
    rows = torch.cat([table.rows, extra.view(-1, size)])
    tokens, real = rows.flatten().clamp(min=0).long(), rows.flatten() >= 0
    places = torch.empty(call.layout.length, dtype=torch.int64, device=call.q.device)
    places[tokens[real]] = real.nonzero()[:, 0]
    return TileOrder(tokens, real, places, (rows >= 0).sum(1).int(), table.tiles)


def block_map(call: AttentionCall, selection: Selection, order: TileOrder) -> torch.Tensor:
    """(B, H, n + e, n + e) bool: which tiles attend to which, text both ways."""
    tiles = len(order.sizes)
    batch, heads = call.q.shape[:2]
    kept = torch.ones(batch, heads, tiles, tiles, dtype=torch.bool, device=call.q.device)
    video = order.video_tiles
    kept[:, :, :video, :video] = kept_map(selection, list(range(heads)), video)
    return kept


class FlexLists:
    """FlexAttention for one size; compiled once, for all densities."""

    def __init__(self, order: TileOrder, tile_size: int, kernel_options: dict[str, Any]) -> None:
        self.order = order
        self._tile_size = tile_size
        real = order.real
        self._mask_mod = lambda batch, head, query, key: real[key]
        fits = {} if tile_size == 128 else {"BLOCK_M": tile_size, "BLOCK_N": tile_size}
        self._options = fits | kernel_options
        self._attend = flex()

    def mask(self, kept: torch.Tensor) -> BlockMask:
        """The lists as a BlockMask; only ragged tiles need their padding masked."""
        whole = self.order.sizes == self._tile_size
        return BlockMask.from_kv_blocks(
            *lists_of_map(kept & ~whole),
            *lists_of_map(kept & whole),
            BLOCK_SIZE=self._tile_size,
            mask_mod=self._mask_mod,
        )

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
            mask: BlockMask) -> torch.Tensor:  # fmt: skip
        """(B, H, P, D) from tensors in tile order."""
        options = self._options if q.is_cuda else None
        return self._attend(q, k, v, block_mask=mask, scale=scale, kernel_options=options)


def flex() -> Callable[..., torch.Tensor]:
    """FlexAttention, compiled: without that it is slow, and looks at no BlockMask's lists."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def lists_of_map(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(counts, indices) of a map: kept tiles first, both int32."""
    order = torch.argsort(kept.to(torch.int8), dim=-1, descending=True, stable=True)
    return kept.sum(-1, dtype=torch.int32), order.int()
