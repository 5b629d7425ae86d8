"""Runs: stretches of a sequence, and how they are cut and put in order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from .codes import Source
from .given import Grid
from .reasons import Reason, Refusal
from .token_map import coordinates


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive tokens of one kind. Numbers are hints.

    sides: (source, axis) whose indices number the tokens: three for video, for T, H and W; one
        for extra tokens that run along one axis; () where not known. grid: None for extra tokens.
    order: of a video run, its tokens in raster order; None where they stand so. reads: graph inputs
        whose values (index tensors) decided what stands here.
    """

    start: int
    length: int
    sides: tuple[tuple[Source, int], ...] = ()
    grid: Grid | None = None
    order: torch.Tensor | None = None
    reads: frozenset[fx.Node] = frozenset()

    @property
    def stop(self) -> int:
        """The first token after the run."""
        return self.start + self.length

    @property
    def rows(self) -> slice:
        """The run's part of the sequence."""
        return slice(self.start, self.stop)


def split_at(runs: list[Run], spans: Iterable[tuple[int, int]]) -> list[Run]:
    """Runs cut where (start, stop) spans begin or end inside them: the cuts have no sides."""
    for start, stop in spans:
        runs = [part for run in runs for part in _cut(run, start, stop)]
    return runs


def _cut(run: Run, start: int, stop: int) -> list[Run]:
    end = run.start + run.length
    if not run.start <= start < stop <= end or run.length == stop - start:
        return [run]
    edges = sorted({run.start, start, stop, end})
    return [Run(a, b - a, reads=run.reads) for a, b in itertools.pairwise(edges)]


def with_grids(runs: list[Run], start: int, grids: tuple[Grid, ...]) -> list[Run]:
    """`runs` with video runs of the given grids from `start` on."""
    videos, at = [], start
    reads = frozenset(node for run in runs for node in run.reads)
    for grid in grids:
        videos.append(Run(at, math.prod(grid), (), grid, reads=reads))
        at += math.prod(grid)
    kept = [part for run in runs for part in _cut(run, start, at)]
    return [run for run in kept if run.start + run.length <= start or run.start >= at] + videos


def filled_runs(runs: list[Run], tokens: int) -> tuple[Run, ...] | Refusal:
    """The video runs in order, and extra runs between them.

    Of video runs that overlap the longest counts: what else was added to a part of it is no other
    video. Equally long ones must agree.
    """
    videos: list[Run] = []
    for run in sorted(runs, key=lambda r: (-r.length, r.start)):
        if run.grid is None:
            continue
        over = next((v for v in videos if v.start < run.stop and run.start < v.stop), None)
        if over is None:
            videos.append(run)
        elif (over.start, over.stop) == (run.start, run.stop) and over.grid != run.grid:
            return Refusal(Reason.GRID_CONTRADICTED, f"two latents: {over.grid}, {run.grid}")
    extras = {(run.start, run.stop): run for run in reversed(runs) if run.grid is None}
    ordered: list[Run] = []
    end = 0
    for start, stop, video in [
        *((run.start, run.stop, run) for run in sorted(videos, key=lambda r: r.start)),
        (tokens, tokens, None),
    ]:
        if start > end:
            ordered.append(extras.get((end, start), Run(end, start - end)))
        if video is not None:
            ordered.append(video)
        end = stop
    return tuple(ordered)


def video_runs(
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
    sides = tuple((source, axis) for axis in axes)
    runs = []
    for copy in joint.split(length):
        order = None if torch.equal(copy, torch.arange(length)) else copy.argsort()
        if order is not None and not torch.equal(copy[order], torch.arange(length)):
            return Refusal(Reason.TOKEN_ORDER, f"{codes.numel()} tokens on a {t}x{h}x{w} grid")
        runs.append(Run(start, length, sides, (t, h, w), order, source.reads))
        start += length
    return runs


def spans_of(mask: torch.Tensor) -> list[tuple[int, int]]:
    """(start, stop) of every run of True."""
    edges = torch.diff(
        mask.to(torch.int8),
        prepend=torch.zeros(1, dtype=torch.int8),
        append=torch.zeros(1, dtype=torch.int8),
    )
    starts = (edges == 1).nonzero().flatten().tolist()
    stops = (edges == -1).nonzero().flatten().tolist()
    return list(zip(starts, stops, strict=True))
