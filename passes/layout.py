"""Layout: which tokens of a self-attention are video, on which grid, and which are extra.

Three kinds of evidence, checked against each other: the axes of the latent the tokens come from,
positions computed in the graph (or held in buffers), and the values of positional inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from .codes import NONE, Source
from .positions import Evidence, PositionInput, Told, position_grids
from .reasons import Reason, Refusal
from .token_map import TokenMap, coordinates, varying_axes

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive tokens of one kind. Numbers are hints.

    sides: (source, axis) whose indices number the tokens: three for video, for T, H and W; one
        for extra tokens that run along one axis; () where not known. grid: None for extra tokens.
    """

    start: int
    length: int
    sides: tuple[tuple[Source, int], ...] = ()
    grid: Grid | None = None


@dataclass(frozen=True, eq=False)
class SiteLayout:
    """The runs that make up the sequence, video and extra, in order, and the evidence for them."""

    runs: tuple[Run, ...]
    evidence: Evidence
    position_input: PositionInput | None = None

    @property
    def videos(self) -> tuple[Run, ...]:
        """The runs with a grid."""
        return tuple(run for run in self.runs if run.grid is not None)


def find_layout(
    tokens: TokenMap,
    holders: Mapping[Source, fx.Node],
    values: Mapping[fx.Node, object],
    option: Grid | None,
) -> SiteLayout | Refusal:
    """The layout of one self-attention, or why there is none.

    holders: the node of every source. values: example inputs by placeholder, real tensors where
    they can be read. option: the user's `grid`.
    """
    latent = _latent_runs(tokens)
    if isinstance(latent, Refusal):
        return latent
    if latent:
        videos = [run for run in latent if run.grid is not None]
        if len(videos) == 1:
            told = position_grids(tokens, _rows(videos[0]), holders, values)
            conflict = _conflict(videos[0].grid, told, option)
            if conflict is not None:
                return conflict
        return SiteLayout(_filled(latent, tokens.tokens), Evidence.LATENT)
    return _packed_layout(tokens, holders, values, option)


def _latent_runs(tokens: TokenMap) -> list[Run] | Refusal:
    """Video runs whose source shows three axes, and the other content runs; [] if no video."""
    runs: list[Run] = []
    flat = False
    for source, codes in tokens.content.items():
        for start, stop in _spans(codes != NONE):
            part = codes[start:stop]
            axes = varying_axes(source, part)
            batch_axes = tokens.batch_axes[source] - {0}
            if batch_axes and len(source.shape) > 3 and len(axes) < 3:
                return Refusal(
                    Reason.FACTORISED,
                    f"{source.name}: axes {axes} along the sequence, "
                    f"{sorted(batch_axes)} in the batch",
                )
            flat = flat or (len(axes) == 2 and len(source.shape) > 3)
            video = _video_runs(source, axes, part, start)
            if isinstance(video, Refusal):
                return video
            runs += video or [Run(start, stop - start, _sides(source, axes))]
    if any(run.grid for run in runs):
        return runs
    return Refusal(Reason.ONE_FRAME) if flat else []


def _video_runs(
    source: Source, axes: list[int], codes: torch.Tensor, start: int
) -> list[Run] | Refusal:
    """The copies of a T x H x W grid that a run of codes holds; [] if it is no grid."""
    if len(axes) != 3:
        return []
    places = coordinates(source, codes)
    ranks = [torch.unique(places[axis], return_inverse=True) for axis in axes]
    t, h, w = (int(values.numel()) for values, _ in ranks)
    length = t * h * w
    joint = (ranks[0][1] * h + ranks[1][1]) * w + ranks[2][1]
    if codes.numel() % length or torch.unique(joint).numel() != length:
        return Refusal(Reason.TOKEN_ORDER, f"{codes.numel()} tokens on a {t}x{h}x{w} grid")
    copies = codes.numel() // length
    if not torch.equal(joint, torch.arange(length).repeat(copies)):
        return Refusal(Reason.TOKEN_ORDER, f"{t}x{h}x{w} grid")
    sides = _sides(source, axes)
    return [Run(start + i * length, length, sides, (t, h, w)) for i in range(copies)]


def _sides(source: Source, axes: list[int]) -> tuple[tuple[Source, int], ...]:
    return tuple((source, axis) for axis in axes)


def _packed_layout(
    tokens: TokenMap,
    holders: Mapping[Source, fx.Node],
    values: Mapping[fx.Node, object],
    option: Grid | None,
) -> SiteLayout | Refusal:
    """The layout of tokens that enter the graph as one sequence, by their positions."""
    runs = [
        Run(start, stop - start, _sides(source, varying_axes(source, codes[start:stop])))
        for source, codes in tokens.content.items()
        for start, stop in _spans(codes != NONE)
    ]
    one_axis_positions = False
    for place, run in enumerate(runs):
        told = position_grids(tokens, _rows(run), holders, values)
        known = [(evidence, say) for evidence, say in told.items() if say.found is not None]
        if known:
            evidence, say = known[0]
            found = say.found
            assert found is not None
            conflict = _conflict(found.grid, told, option)
            if conflict is not None:
                return conflict
            if not found.raster:
                return Refusal(Reason.TOKEN_ORDER, f"{found.grid} grid")
            runs[place] = Run(run.start, run.length, say.sides, found.grid)
            values_say = told.get(Evidence.VALUES)
            position = values_say.position_input if values_say is not None else None
            return SiteLayout(_filled(runs, tokens.tokens), evidence, position)
        one_axis_positions = one_axis_positions or bool(told)
    if option is not None:
        fits = [i for i, run in enumerate(runs) if run.length == math.prod(option)]
        if len(fits) == 1:
            run = runs[fits[0]]
            runs[fits[0]] = Run(run.start, run.length, run.sides, option)
            return SiteLayout(_filled(runs, tokens.tokens), Evidence.OPTION)
    detail = f"{tokens.tokens} tokens"
    if option is not None:
        detail += f"; option grid {option} has {math.prod(option)}"
    return Refusal(Reason.TEXT_ONLY if one_axis_positions else Reason.NO_GRID, detail)


def _conflict(grid: Grid | None, told: Told, option: Grid | None) -> Refusal | None:
    """A refusal if other evidence, or the user, names another grid."""
    for evidence, say in told.items():
        if say.found is not None and say.found.grid != grid:
            return Refusal(
                Reason.GRID_CONTRADICTED, f"{grid}, but {evidence.value}: {say.found.grid}"
            )
    if option is not None and option != grid:
        return Refusal(Reason.GRID_CONTRADICTED, f"{grid}, but {Evidence.OPTION.value}: {option}")
    return None


def _filled(runs: list[Run], tokens: int) -> tuple[Run, ...]:
    """Runs in order with gaps filled and neighbouring extra runs merged."""
    ordered: list[Run] = []
    end = 0
    for run in sorted(runs, key=lambda r: r.start):
        if run.start > end:
            _append(ordered, Run(end, run.start - end))
        if run.start >= end:
            _append(ordered, run)
            end = run.start + run.length
    if end < tokens:
        _append(ordered, Run(end, tokens - end))
    return tuple(ordered)


def _append(ordered: list[Run], run: Run) -> None:
    last = ordered[-1] if ordered else None
    if last is not None and last.grid is None and run.grid is None:
        ordered[-1] = Run(last.start, last.length + run.length)
    else:
        ordered.append(run)


def _rows(run: Run) -> slice:
    return slice(run.start, run.start + run.length)


def _spans(mask: torch.Tensor) -> list[tuple[int, int]]:
    """(start, stop) of every run of True."""
    edges = torch.diff(
        mask.to(torch.int8),
        prepend=torch.zeros(1, dtype=torch.int8),
        append=torch.zeros(1, dtype=torch.int8),
    )
    starts = (edges == 1).nonzero().flatten().tolist()
    stops = (edges == -1).nonzero().flatten().tolist()
    return list(zip(starts, stops, strict=True))
