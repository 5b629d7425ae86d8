"""What one attention layer showed on one token grid: curves by shape, moments, trained scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .keep_maps import LADDER
from .kernels.budget import tiles_to_keep
from .kernels.layout import Layout
from .kernels.plan import Plan, TileShape
from .kernels.scores import key_features, query_features, tile_scores
from .kernels.statistics import TileStatistics, tile_statistics
from .kernels.tiles import tile_table
from .observed_call import ObservedCall
from .row_errors import RowSample, head_slices
from .score_training import Lesson
from .second_order import SpreadMoments
from .shape_curves import SEARCHED_KIND, ShapeCurves
from .tile_sample import TileSample, tile_samples

_PROMISING = 1.5
"""A shape that errs this many times as much as a head's best one is not searched any further."""

_SMALL = 1e-4
"""Relative squared errors below this are all alike."""

_SEARCHED_TILES = 4
"""Query tiles that a search of a layout with several video segments measures in a call."""

_SAMPLE_BYTES = 64 << 20
"""Memory for the probabilities of the queries searched at once."""

FACTOR_RANK = 8
"""Rank of the factorised second-order term, at most head_dim."""


@dataclass(eq=False)
class LayerStudy:
    """Everything measured of one layer on one layout.

    curves: by tile shape. searched, studied: calls of the two phases. moments: of the chosen
    shapes' tile statistics.
    """

    layout: Layout
    heads: int
    head_dim: int
    tile_size: int
    curves: dict[TileShape, ShapeCurves] = field(default_factory=dict)
    searched: int = 0
    studied: int = 0
    moments: SpreadMoments = field(init=False)

    def __post_init__(self) -> None:
        self.moments = SpreadMoments(self.heads, self.head_dim)

    def on(self, layout: Layout) -> LayerStudy:
        """The same study, going on with a layout whose extra tokens are another number."""
        self.layout = layout
        for curve in self.curves.values():
            curve.layout = layout
        return self

    def curve(self, shape: TileShape) -> ShapeCurves:
        """The curves of `shape`, empty ones if it is new."""
        if shape not in self.curves:
            self.curves[shape] = ShapeCurves(self.layout, shape, self.heads)
        return self.curves[shape]

    def promising(self, shapes: Sequence[TileShape], density: float) -> tuple[TileShape, ...]:
        """Those of `shapes` that err little more than the best, for at least one head."""
        error = torch.stack([self.curve(shape).least_error(density) for shape in shapes])
        good = (error <= _PROMISING * error.amin(0) + _SMALL).any(1)
        return tuple(shape for shape, is_good in zip(shapes, good.tolist(), strict=True) if is_good)

    @torch.no_grad()
    def search(self, call: ObservedCall, shapes: Sequence[TileShape], tokens: Tensor) -> None:
        """Measure every head under every shape, on the queries `tokens` of one batch element.

        With several video segments on the query tiles that hold the first few of them, all rows.
        """
        if len(self.layout.videos) == 1:
            self._search_queries(call, shapes, tokens)
        else:
            few = tokens[:: max(1, len(tokens) // _SEARCHED_TILES)]
            for shape in shapes:
                plan = Plan.uniform(self.heads, shape, 1.0)
                self._measure(call, plan, shape, list(range(self.heads)), few, "fit")
        self.searched += 1

    def _search_queries(
        self, call: ObservedCall, shapes: Sequence[TileShape], tokens: Tensor
    ) -> None:
        batch = self.searched % call.q.shape[0]
        one = slice(batch, batch + 1)
        kv_heads, repeat = call.k.shape[1], call.q.shape[1] // call.k.shape[1]
        for kv in head_slices(kv_heads, 4 * call.k.shape[2] * repeat * len(tokens), _SAMPLE_BYTES):
            heads = slice(kv.start * repeat, kv.stop * repeat)
            valid = None if call.key_valid is None else call.key_valid[one]
            part = replace(
                call, q=call.q[one, heads], k=call.k[one, kv], v=call.v[one, kv], key_valid=valid
            )
            sample = RowSample.of(part, 0, tokens)
            for shape in shapes:
                curve = self.curve(shape)
                modes, seen = curve.searched_modes, curve.columns[heads]
                found = sample.errors(shape, LADDER, SEARCHED_KIND, modes, seen)
                curve.add_queries(heads, found, len(tokens))

    @torch.no_grad()
    def study(
        self,
        call: ObservedCall,
        shapes: Sequence[TileShape],
        tokens: Tensor,
        split: str,
        projection: Tensor | None,
    ) -> None:
        """Measure every head under its own shape, by all scores there are.

        projection: (2, H, 3D, D) as trained so far, or None.
        """
        factors = None
        if self.studied:
            factors = self.moments.factors(min(FACTOR_RANK, self.head_dim))
        plan = Plan(tuple(shapes), (1.0,) * self.heads)
        for shape, heads in plan.groups().items():
            stats = self._measure(call, plan, shape, heads, tokens, split, factors, projection)
            if split == "fit":
                self.moments.add(heads, stats[0].second, stats[1].variance)
        self.studied += 1

    def lesson(
        self, call: ObservedCall, shapes: Sequence[TileShape], tokens: Tensor, density: float
    ) -> Lesson:
        """A lesson for the layer's scores on batch element 0; heads padded to one size."""
        plan = Plan(tuple(shapes), (1.0,) * self.heads)
        tables = {s: tile_table(self.layout, s, call.q.device) for s in plan.groups()}
        most = max(table.tiles for table in tables.values())
        wide = len(tokens)
        q = call.q.new_zeros((self.heads, wide, 3 * self.head_dim), dtype=torch.float32)
        k = call.q.new_zeros((self.heads, most, 3 * self.head_dim), dtype=torch.float32)
        base = torch.full((self.heads, wide, most), -torch.inf, device=q.device)
        mass, highest = torch.zeros_like(base), torch.zeros_like(base)
        keep = torch.zeros((self.heads, wide), dtype=torch.int64, device=q.device)
        for shape, heads in plan.groups().items():
            table = tables[shape]
            q_stats, k_stats = self._statistics(call, shape, heads, True)
            features = q_stats.second * (0.5 * call.scale**2) @ k_stats.variance.transpose(2, 3)
            fixed = features + torch.log(k_stats.count)[:, :, None]
            budget = tiles_to_keep(self.layout, shape, density).sum(-1)
            pooled_q, pooled_k = _pooled(q_stats)[0], _pooled(k_stats)[0]
            for _, head, sample in self._samples(call, shape, heads, tokens, batch=1):
                place, m, n = heads.index(head), len(sample.tiles), table.tiles
                k[head, :n] = pooled_k[place]
                q[head, :m] = pooled_q[place, sample.tiles]
                base[head, :m, :n] = fixed[0, place, sample.tiles]
                base[head, torch.arange(m), sample.tiles] = -torch.inf
                mass[head, :m, :n] = sample.mass
                highest[head, :m, :n] = sample.highest
                keep[head, :m] = (budget[sample.tiles.cpu()].to(q.device) - 1).clamp(min=0)
        return Lesson(q, k, base, mass, highest, keep)

    def _measure(
        self,
        call: ObservedCall,
        plan: Plan,
        shape: TileShape,
        heads: list[int],
        tokens: Tensor,
        split: str,
        factors: Tensor | None = None,
        projection: Tensor | None = None,
    ) -> tuple[TileStatistics, TileStatistics]:
        stats = self._statistics(call, shape, heads, projection is not None)
        variants = {"closed_form": plan, "mean": Plan(plan.tile_shapes, plan.density, "mean")}
        if factors is not None:
            variants["factors"] = Plan(plan.tile_shapes, plan.density, factors=factors)
        if projection is not None:
            variants["projection"] = Plan(plan.tile_shapes, plan.density, "projection", projection)
        features = {
            name: (
                query_features(stats[0], variant, heads, call.scale),
                key_features(stats[1], variant, heads),
                variant,
            )
            for name, variant in variants.items()
        }
        curve = self.curve(shape)
        for batch, head, sample in self._samples(call, shape, heads, tokens):
            place = heads.index(head)
            rows = stats[1].count[min(batch, len(stats[1].count) - 1)][None]
            scores = {
                name: tile_scores(
                    q[batch, place, sample.tiles][None, None], k[batch, place][None, None], rows, of
                )[0, 0]
                for name, (q, k, of) in features.items()
            }
            curve.add(head, split, sample, scores)
        return stats

    def _samples(
        self,
        call: ObservedCall,
        shape: TileShape,
        heads: list[int],
        tokens: Tensor,
        batch: int | None = None,
    ) -> Iterator[tuple[int, int, TileSample]]:
        valid = call.key_valid
        return tile_samples(
            call.q[:batch],
            call.k[:batch],
            call.v[:batch],
            self.layout,
            shape,
            tokens,
            call.scale,
            None if valid is None else valid[:batch],
            heads,
        )

    def _statistics(
        self, call: ObservedCall, shape: TileShape, heads: list[int], extremes: bool
    ) -> tuple[TileStatistics, TileStatistics]:
        table = tile_table(self.layout, shape, call.q.device)
        repeat = call.q.shape[1] // call.k.shape[1]
        kv_heads = [head // repeat for head in heads]
        return (
            tile_statistics(call.q[:, heads], table.query_rows, None, extremes),
            tile_statistics(call.k[:, kv_heads], table.rows, call.key_valid, extremes),
        )


def _pooled(stats: TileStatistics) -> Tensor:
    """(B, h, n, 3D): [mean | max | min], the paper's TripPool."""
    assert stats.highest is not None and stats.lowest is not None
    return torch.cat([stats.mean, stats.highest, stats.lowest], dim=-1)
