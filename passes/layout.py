"""Layout: which tokens of a self-attention are video, on which grid, and which are extra.

Three kinds of evidence, checked against each other: the axes of the latent the tokens come from,
positions computed in the graph (or held in buffers), and the values of positional inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import fx

from .codes import NONE, Source, SourceKind
from .given import Given, Grid, Span, find_place, position_values, spelled
from .positions import Evidence, Part, PositionInput, Told, position_grids, table_spans
from .reasons import Reason, Refusal
from .runs import Run, filled_runs, split_at, with_grids
from .token_map import TokenMap, coordinates, varying_axes


@dataclass(frozen=True, eq=False)
class SiteLayout:
    """The runs that make up the queries, video and extra, in order, and the evidence for them.

    before, after: keys without queries on either side of them.
    """

    runs: tuple[Run, ...]
    evidence: Evidence
    position_input: PositionInput | None = None
    before: int = 0
    after: int = 0

    @cached_property
    def order(self) -> torch.Tensor | None:
        """(N,) the tokens with every video in raster order; None where they stand so."""
        if all(run.order is None for run in self.runs):
            return None
        return torch.cat(
            [
                torch.arange(run.start, run.stop) if run.order is None else run.start + run.order
                for run in self.runs
            ]
        )

    @property
    def reads(self) -> frozenset[fx.Node]:
        """Graph inputs on whose values the video runs rest; they must be checked on every call."""
        return frozenset(node for run in self.videos for node in run.reads)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grids of the video runs."""
        return tuple(run.grid for run in self.videos if run.grid is not None)

    @property
    def videos(self) -> tuple[Run, ...]:
        """The runs with a grid."""
        return tuple(run for run in self.runs if run.grid is not None)


def find_layout(
    tokens: TokenMap,
    holders: Mapping[Source, fx.Node],
    values: Mapping[fx.Node, object],
    given: Given | None,
) -> SiteLayout | Refusal:
    """The layout of one self-attention, or why there is none.

    holders: the node of every source. values: example inputs by placeholder, real tensors where
    they can be read. given: grids the user names.
    """
    found = _latent_layout(tokens, holders, values, given)
    if found is None:
        found = _packed_layout(tokens, holders, values, given)
    if isinstance(found, Refusal):
        return found
    if found.order is not None and (tokens.before or tokens.after):
        return Refusal(Reason.TOKEN_ORDER, "and some keys have no queries")
    return replace(found, before=tokens.before, after=tokens.after)


def _latent_layout(
    tokens: TokenMap,
    holders: Mapping[Source, fx.Node],
    values: Mapping[fx.Node, object],
    given: Given | None,
) -> SiteLayout | Refusal | None:
    """The layout by the axes of latents; None if no source shows three."""
    runs = _latent_runs(tokens)
    if isinstance(runs, Refusal):
        return runs
    if not runs:
        return None
    layout = filled_runs(runs, tokens.tokens)
    if isinstance(layout, Refusal):
        return layout
    found = SiteLayout(layout, Evidence.LATENT)
    grids = [run.grid for run in found.videos if run.grid is not None]
    for run, grid in zip(found.videos, grids, strict=True):
        told = position_grids(tokens, _rows(run), holders, values)
        conflict = _conflict(grid, told, run.order is None) or _unnamed(grids, given)
        if conflict is not None:
            return conflict
    return found


def _latent_runs(tokens: TokenMap) -> list[Run] | Refusal:
    """Video runs whose source shows three axes, and the other content runs; [] if no video."""
    runs: list[Run] = []
    flat = False
    for source, codes in tokens.content.items():
        for start, stop in _spans(codes != NONE):
            part = codes[start:stop]
            axes = varying_axes(source, part)
            batch_axes = tokens.batch_axes[source]
            shared = batch_axes & set(axes)  # windows: parts of the same axes in the batch
            if len(source.shape) > 3 and (shared or (batch_axes - {0} and len(axes) < 3)):
                return Refusal(
                    Reason.FACTORISED,
                    f"{source.name}: axes {axes} along the sequence, "
                    f"{sorted(batch_axes - {0} | shared)} in the batch",
                )
            flat = flat or (len(axes) == 2 and len(source.shape) > 3)
            video = _video_runs(source, axes, part, start)
            if isinstance(video, Refusal):
                return video
            runs += video or [_extra_run(source, codes, start, stop)]
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
    sides = tuple((source, axis) for axis in axes)
    runs = []
    for copy in joint.split(length):
        order = None if torch.equal(copy, torch.arange(length)) else copy.argsort()
        if order is not None and not torch.equal(copy[order], torch.arange(length)):
            return Refusal(Reason.TOKEN_ORDER, f"{codes.numel()} tokens on a {t}x{h}x{w} grid")
        runs.append(Run(start, length, sides, (t, h, w), order, source.reads))
        start += length
    return runs


def _extra_run(source: Source, codes: torch.Tensor, start: int, stop: int) -> Run:
    axes = varying_axes(source, codes[start:stop])
    sides = tuple((source, axis) for axis in axes)
    return Run(start, stop - start, sides, reads=source.reads)


def _packed_layout(
    tokens: TokenMap,
    holders: Mapping[Source, fx.Node],
    values: Mapping[fx.Node, object],
    given: Given | None,
) -> SiteLayout | Refusal:
    """The layout of tokens that enter the graph as one sequence, by their positions."""
    runs = [
        _extra_run(source, codes, start, stop)
        for source, codes in tokens.content.items()
        for start, stop in _spans(codes != NONE)
    ]
    spans = [Span(run.start, run.length, _counter(run, holders)) for run in runs]
    positions = position_values(tokens, holders, values)
    runs = split_at(runs, [(known.start, known.stop) for known in positions])
    runs = split_at(runs, table_spans(tokens, holders))
    one_axis_positions = False
    for place, run in enumerate(runs):
        told = position_grids(tokens, _rows(run), holders, values)
        known = [(evidence, say) for evidence, say in told.items() if say.found is not None]
        if known:
            evidence, say = known[0]
            found = say.found
            assert found is not None
            conflict = _conflict(found.grid, told) or _unnamed([found.grid], given)
            if conflict is not None:
                return conflict
            if not found.raster and say.order is None:
                return Refusal(Reason.TOKEN_ORDER, f"{found.grid} grid")
            reads = run.reads | say.reads
            runs[place] = Run(run.start, run.length, say.sides, found.grid, say.order, reads)
            values_say = told.get(Evidence.VALUES)
            position = values_say.position_input if values_say is not None else None
            return _with_evidence(runs, tokens, evidence, position)
        one_axis_positions = one_axis_positions or bool(told)
    detail = f"{tokens.tokens} tokens"
    if given is not None:
        where = find_place(given, spans, positions)
        if where is not None:
            runs = with_grids(runs, where.start, given.grids)
            return _with_evidence(runs, tokens, given.evidence, where.position)
        detail += f"; {given} fits none of the runs of {[s.length for s in spans]} tokens"
    if any(known.of_one_frame for known in positions):
        return Refusal(Reason.ONE_FRAME, detail)
    of_text = one_axis_positions and all(known.of_text for known in positions)
    return Refusal(Reason.TEXT_ONLY if of_text else Reason.NO_GRID, detail)


def _with_evidence(
    runs: list[Run], tokens: TokenMap, evidence: Evidence, position: PositionInput | None
) -> SiteLayout | Refusal:
    filled = filled_runs(runs, tokens.tokens)
    return filled if isinstance(filled, Refusal) else SiteLayout(filled, evidence, position)


def _counter(run: Run, holders: Mapping[Source, fx.Node]) -> PositionInput | None:
    """The input one of whose sides the run is."""
    if len(run.sides) != 1 or run.reads:
        return None
    source, axis = run.sides[0]
    holder = holders.get(source)
    whole = source.kind is SourceKind.INPUT and source.shape[axis] == run.length
    return PositionInput(holder, axis, Part.COUNT) if whole and holder is not None else None


def _conflict(grid: Grid, told: Told, raster: bool = True) -> Refusal | None:
    """A refusal if positions name another grid. Off raster order they cannot tell T from W."""
    for evidence, say in told.items():
        if say.found is None:
            continue
        other = say.found.grid
        if other != grid and (raster or sorted(other) != sorted(grid)):
            return Refusal(
                Reason.GRID_CONTRADICTED, f"{spelled(grid)}, but {evidence.value} {spelled(other)}"
            )
    return None


def _unnamed(grids: list[Grid], given: Given | None) -> Refusal | None:
    """A refusal if the option names a grid that is not one of those found."""
    if given is None or given.evidence is not Evidence.OPTION or set(given.grids) <= set(grids):
        return None
    found = ", ".join(map(spelled, grids))
    return Refusal(Reason.GRID_CONTRADICTED, f"{found}, but {given}")


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
