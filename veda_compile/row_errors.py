"""Output error of tile choices on a sample of single queries: a fast estimate for many tile shapes.

`tile_sample` takes whole query tiles, so every tile shape has logits of its own. Here the sample is
rows: their probabilities over all keys are computed once and serve all shapes, and each row stands
for the query tile that it lies in. The estimate is the same on average, and each row costs a
tile's share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .keep_maps import keep_maps
from .kernels.plan import Plan, TileShape
from .kernels.scores import key_features, query_features, tile_scores
from .kernels.statistics import TileStatistics, tile_statistics
from .kernels.tiles import TileTable, tile_table
from .observed_call import ObservedCall
from .searched_modes import SearchedModes

_CHUNK_BYTES = 128 << 20
"""Memory for what is made of the keys and values of the heads that are measured together."""


@dataclass(frozen=True, eq=False)
class RowErrors:
    """What one tile shape shows on a sample, float32 on the call's device.

    scored: (H, K) squared output error at each density. static: (H, M) that of the windows, then
    of the stripes, of the modes that were asked for. energy: (H,) squared norm of the dense output.
    columns: (H, n) probability that the rows put on each key tile, added up.
    """

    scored: Tensor
    static: Tensor
    energy: Tensor
    columns: Tensor

    @classmethod
    def joined(cls, parts: Iterable[RowErrors]) -> RowErrors:
        """Of more heads."""
        every = list(parts)
        return cls(*(torch.cat([getattr(x, field.name) for x in every]) for field in fields(cls)))


@dataclass(frozen=True, eq=False)
class RowSample:
    """Dense attention of some queries of one batch element of an observed call.

    tokens: (R,) int64, queries of the video. keys: (Hkv, Nk, 2D + gR) float32, of every key its
    vector, its value and its probability for each of the R queries of the g heads that share it.
    """

    call: ObservedCall
    batch: int
    tokens: Tensor
    keys: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, call: ObservedCall, batch: int, tokens: Tensor) -> RowSample:
        """tokens: (R,) on any device."""
        tokens = tokens.to(call.q.device)
        kv_heads, dim = call.k.shape[1], call.q.shape[3]
        rows = call.q[batch].index_select(1, tokens).float().view(kv_heads, -1, dim)
        keys = rows.new_empty((kv_heads, call.k.shape[2], 2 * dim + rows.shape[1]))
        keys[..., :dim] = call.k[batch]
        keys[..., dim : 2 * dim] = call.v[batch]
        # (Nk, R): a key's row is what tiles are gathered from
        logits = keys[..., :dim] @ rows.transpose(1, 2) * call.scale
        if call.key_valid is not None:
            hidden = ~call.key_valid[batch][:, None]
            logits.masked_fill_(hidden, -torch.inf)
            # values of hidden keys may be NaN, and 0 * NaN is NaN
            keys[..., dim : 2 * dim].masked_fill_(hidden, 0.0)
        keys[..., 2 * dim :] = logits.softmax(1).nan_to_num_(0.0)
        return cls(call, batch, tokens, keys)

    @torch.no_grad()
    def errors(
        self,
        shape: TileShape,
        densities: Sequence[float],
        score: str,
        modes: SearchedModes | None = None,
        columns: Tensor | None = None,
    ) -> RowErrors:
        """The errors of choices under a tile shape.

        score: "closed_form" or "mean". modes: static modes to measure, where the layout has one
        video segment. columns: (H, n) probability on each key tile in earlier samples, None where
        there are none. A row's stripe never runs by what the row itself looks at: it is chosen by
        `columns` and by every other row of the sample, as a plan is by what other calls show.
        """
        table = tile_table(self.call.layout, shape, self.call.q.device)
        kv_heads, _, width = self.keys.shape
        step = max(1, _CHUNK_BYTES // (8 * table.rows.numel() * width))
        tiles = table.tile_of_query[self.tokens].long()
        if columns is None:
            columns = tiles.new_zeros((self.call.q.shape[1], table.tiles))
        columns = columns.to(self.keys)
        windows = None
        if modes is not None and modes.windows:
            windows = modes.kept_by_windows(tiles)
        return RowErrors.joined(
            self._errors(
                table, shape, densities, score, modes, windows, columns, first,
                min(first + step, kv_heads),
            )
            for first in range(0, kv_heads, step)
        )  # fmt: skip

    def _errors(
        self,
        table: TileTable,
        shape: TileShape,
        densities: Sequence[float],
        score: str,
        modes: SearchedModes | None,
        windows: Tensor | None,
        columns: Tensor,
        first: int,
        stop: int,
    ) -> RowErrors:
        """`errors` of the query heads that share the KV heads from `first` to `stop`."""
        dim, repeat = self.call.q.shape[3], self.call.q.shape[1] // self.call.k.shape[1]
        kv, count, rows = stop - first, (stop - first) * repeat, len(self.tokens)
        tiles = table.tile_of_query[self.tokens].long()
        n, size = table.rows.shape
        keys = self.keys[first:stop]
        tiled = keys.index_select(1, table.rows.clamp(min=0).long().flatten())
        if _padded(table):
            tiled[..., dim:].masked_fill_((table.rows.flatten() < 0)[:, None], 0.0)
        tiled = tiled.view(kv, n, size, -1)
        scores = self._scores(table, tiles, tiled[..., :dim], shape, score, first, stop)
        keep = keep_maps(
            scores.flatten(0, 1), tiles.repeat(count), self.call.layout, shape, densities
        )

        chances = tiled[..., 2 * dim :]
        part = (chances.transpose(2, 3) @ tiled[..., dim : 2 * dim]).transpose(1, 2)
        part = part.reshape(count * rows, n, dim)
        weight = chances.sum(2).transpose(1, 2).reshape(count * rows, n)
        rest = keys.index_select(1, table.extra.long())
        outside = rest[..., 2 * dim :].transpose(1, 2)
        rest_part = (outside @ rest[..., dim : 2 * dim]).view(count * rows, dim)
        rest_weight = outside.sum(-1).view(count * rows, 1, 1)

        mass = weight.view(count, rows, n)
        maps = [keep]
        if windows is not None:
            maps.append(windows.repeat(1, count, 1))
        if modes is not None and modes.stripes:
            seen = columns[first * repeat : stop * repeat]
            odd = torch.arange(count * rows, device=tiles.device) % rows % 2
            others = torch.stack([mass[:, 1::2].sum(1), mass[:, ::2].sum(1)], 1) + seen[:, None]
            which = torch.arange(count, device=tiles.device).repeat_interleave(rows) * 2 + odd
            maps.append(modes.kept_by_stripes(others.flatten(0, 1), which, tiles.repeat(count)))
        kept = torch.cat(maps).transpose(0, 1).to(part.dtype)  # (count * R, K + M, n)
        full = part.sum(1) + rest_part
        total = kept @ part + rest_part[:, None]
        kept_weight = kept @ weight[..., None] + rest_weight
        out = torch.where(kept_weight > 0, total / kept_weight, 0.0)
        wrong = (out - full[:, None]).square().sum(-1)
        error = wrong.view(count, rows, -1).sum(1)
        energy = full.square().sum(-1).view(count, rows).sum(1)
        scored = len(densities)
        return RowErrors(error[:, :scored], error[:, scored:], energy, mass.sum(1))

    def _scores(
        self,
        table: TileTable,
        tiles: Tensor,
        tiled: Tensor,
        shape: TileShape,
        score: str,
        first: int,
        stop: int,
    ) -> Tensor:
        """(h, R, n) of the rows' query tiles for all key tiles, as executors score them.

        tiled: (kv, n, S, D), the key vectors of all tiles.
        """
        call, batch = self.call, self.batch
        repeat = call.q.shape[1] // call.k.shape[1]
        heads = list(range(first * repeat, stop * repeat))
        plan = Plan.uniform(call.q.shape[1], shape, 1.0, score)
        q = call.q[batch : batch + 1, heads[0] : heads[-1] + 1]
        stats_q = tile_statistics(q, table.query_rows[tiles], None, False)
        if _padded(table) or call.key_valid is not None:
            k = call.k[batch : batch + 1, first:stop]
            valid = None if call.key_valid is None else call.key_valid[batch : batch + 1]
            stats_k = tile_statistics(k, table.rows, valid, False)
        else:  # the same without masks, several times as fast
            mean = tiled.mean(2)
            variance = (tiled - mean[:, :, None]).square_().mean(2)
            counts = table.sizes.float()[None, None]
            stats_k = TileStatistics(counts, mean[None], variance[None], variance[None], None, None)
        features = key_features(stats_k, plan, heads).repeat_interleave(repeat, dim=1)
        wanted = query_features(stats_q, plan, heads, call.scale)
        return tile_scores(wanted, features, stats_k.count, plan)[0]


def _padded(table: TileTable) -> bool:
    """Whether a tile is ragged; known without reading the table from its device."""
    return table.rows.numel() > len(table.tile_of_token) - len(table.extra)
