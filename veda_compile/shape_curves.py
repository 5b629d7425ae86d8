"""Error against density of every head of a layer, under one tile shape, as calls come by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .keep_maps import LADDER, keep_maps
from .kernels.layout import Layout
from .kernels.plan import TileShape, padding
from .kernels.static_modes import StaticMode, mode_density, static_lists
from .kernels.tiles import tile_table
from .row_errors import RowErrors
from .searched_modes import SearchedModes
from .static_candidates import STRIPE_COLUMNS, stripe_of, window_candidates
from .tile_sample import TileSample

KINDS = ("oracle", "closed_form", "mean", "factors", "projection")
"""Scores whose error is measured. oracle: the true mass, which no score can beat by much."""

SEARCHED_KIND = "closed_form"
"""The score that shapes are chosen by; every sample measures it."""

SPLITS = ("fit", "held_out")
"""What is learned from, and what it is judged by."""


@dataclass(eq=False)
class ShapeCurves:
    """Sums over sampled query tiles, float64 on CPU; splits and kinds in the order above.

    error: (splits, kinds, H, K) squared output error at `LADDER`'s densities. kept, best: the same
    for the mass kept, and for what the oracle keeps of the same samples. energy: (splits, kinds, H)
    squared norm of the dense output of those samples: not all kinds are measured in every call, but
    the closed form is. static_error: (splits, H, M) of the static modes: `windows`, then a stripe
    of each of `STRIPE_COLUMNS`. queries: (splits, H) how many were sampled. columns: (H, n) mass on
    each key tile, "fit" alone.
    """

    layout: Layout
    shape: TileShape
    heads: int
    error: Tensor = field(init=False)
    kept: Tensor = field(init=False)
    best: Tensor = field(init=False)
    energy: Tensor = field(init=False)
    static_error: Tensor = field(init=False)
    queries: Tensor = field(init=False)
    columns: Tensor = field(init=False)

    def __post_init__(self) -> None:
        splits, rungs = len(SPLITS), len(LADDER)
        modes = len(self.windows) + len(STRIPE_COLUMNS)
        tiles = tile_table(self.layout, self.shape, torch.device("cpu")).tiles

        def sums(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.float64, device="cpu")

        self.error = sums(splits, len(KINDS), self.heads, rungs)
        self.kept = sums(splits, len(KINDS), self.heads, rungs)
        self.best = sums(splits, len(KINDS), self.heads, rungs)
        self.energy = sums(splits, len(KINDS), self.heads)
        self.static_error = sums(splits, self.heads, modes)
        self.queries = sums(splits, self.heads)
        self.columns = sums(self.heads, tiles)

    @property
    def windows(self) -> tuple[StaticMode, ...]:
        """The static modes without columns, in the order of `static_error`."""
        return window_candidates(self.layout, self.shape)

    def add(self, head: int, split: str, sample: TileSample, scores: Mapping[str, Tensor]) -> None:
        """Measure one sample of a head.

        scores: by kind, (m, n) of the sampled query tiles for all key tiles; "oracle" is added.
        """
        at, mass = SPLITS.index(split), sample.mass
        maps, kinds = [], []
        for kind, score in {"oracle": mass.log(), **scores}.items():
            # log of no mass is -inf, which would mean a tile without keys
            score = score.nan_to_num(neginf=-1e30) if kind == "oracle" else score
            maps.append(keep_maps(score, sample.tiles, self.layout, self.shape))
            kinds.append(KINDS.index(kind))
        static = self._static_maps(head, sample)
        errors = sample.errors(torch.cat([*maps, static])).double().cpu()
        rungs = len(LADDER)
        kept = [(keep * mass).sum((1, 2)).double().cpu() for keep in maps]
        energy = sample.energy.double().cpu()
        for place, row in enumerate(kinds):
            self.error[at, row, head] += errors[place * rungs : (place + 1) * rungs]
            self.kept[at, row, head] += kept[place]
            self.best[at, row, head] += kept[0]  # the oracle's
            self.energy[at, row, head] += energy
        self.static_error[at, head] += errors[len(maps) * rungs :]
        self.queries[at, head] += int(sample.real.sum())
        if split == "fit":
            self.columns[head] += mass.sum(0).double().cpu()

    def add_queries(self, heads: slice, found: RowErrors, count: int) -> None:
        """Add what `count` single queries of some heads showed: closed form and `searched_modes`.

        They count as split "fit".
        """
        at, row = SPLITS.index("fit"), KINDS.index(SEARCHED_KIND)
        self.error[at, row, heads] += found.scored.double().cpu()
        self.energy[at, row, heads] += found.energy.double().cpu()
        static = found.static.double().cpu()
        self.static_error[at, heads, : static.shape[1]] += static
        self.queries[at, heads] += count
        self.columns[heads] += found.columns.double().cpu()

    @property
    def searched_modes(self) -> SearchedModes:
        """The static modes as `RowSample` measures them; of a layout with one video segment."""
        ((_, video),) = self.layout.videos
        _, rows, columns = (
            -(-side // step) for side, step in zip(video.grid, self.shape, strict=True)
        )
        tiles = self.columns.shape[1]
        stripes = tuple(count for count in STRIPE_COLUMNS if count <= tiles // 2)
        return SearchedModes(tiles, rows * columns, self.windows, stripes, ())

    def relative(self, split: str, kind: str) -> Tensor:
        """(H, K) relative squared error at `LADDER`'s densities; NaN where nothing was measured."""
        place = (SPLITS.index(split), KINDS.index(kind))
        return self.error[place] / self.energy[place][:, None]

    def least_error(self, density: float) -> Tensor:
        """(H,) relative squared error on "fit" of the score or the static mode that errs least.

        At the density of `LADDER` nearest to `density`, and at no more than that.
        """
        rung = min(range(len(LADDER)), key=lambda place: abs(LADDER[place] - density))
        scored = self.relative("fit", SEARCHED_KIND)[:, rung]
        static = self.static_relative("fit")
        costs = [
            [1.0 if mode is None else mode[1] for mode in self.modes(head)]
            for head in range(self.heads)
        ]
        padded = padding(self.layout, self.shape) ** 2
        dear = torch.tensor(costs, device="cpu") * padded > density
        return torch.minimum(scored, static.masked_fill(dear, torch.inf).amin(1))

    def retained(self, split: str, kind: str) -> Tensor:
        """(H, K) mass kept as a share of what the oracle keeps; NaN where nothing was measured."""
        place = (SPLITS.index(split), KINDS.index(kind))
        return self.kept[place] / self.best[place]

    def static_relative(self, split: str) -> Tensor:
        """(H, M) relative squared error of the static modes of `modes`; NaN where unmeasured."""
        at = SPLITS.index(split)
        return self.static_error[at] / self.energy[at, KINDS.index(SEARCHED_KIND)][:, None]

    def modes(self, head: int) -> list[tuple[StaticMode, float] | None]:
        """(mode, share of tile pairs it keeps) in `static_error`'s order; None where there is none.

        Stripes run through the tiles that have been heaviest so far.
        """
        stripes = [
            stripe_of(self.columns[head], self.layout, self.shape, count)
            for count in STRIPE_COLUMNS
        ]
        return [
            None if mode is None else (mode, mode_density(self.layout, self.shape, mode))
            for mode in (*self.windows, *stripes)
        ]

    def _static_maps(self, head: int, sample: TileSample) -> Tensor:
        """(M, m, n) bool; a stripe that does not exist keeps all, and `modes` has None for it."""
        rows = sample.tiles.cpu()
        seen = self.columns[head]
        mass = seen if bool(seen.any()) else sample.mass.sum(0).double().cpu()
        modes: list[StaticMode | None] = [*self.windows]
        modes += [stripe_of(mass, self.layout, self.shape, count) for count in STRIPE_COLUMNS]
        maps = [
            torch.ones(sample.mass.shape, dtype=torch.bool, device="cpu")
            if mode is None
            else static_lists(self.layout, self.shape, mode).map(rows)
            for mode in modes
        ]
        return torch.stack(maps).to(sample.tiles.device)
