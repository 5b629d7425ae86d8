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
from .placing import contradiction, place_by_positions
from .positions import Evidence, Part, PositionInput, made_spans, position_grids, table_spans
from .reasons import Reason, Refusal
from .runs import Run, filled_runs, spans_of, split_at, video_runs, with_grids
from .token_map import TokenMap, varying_axes


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
        told = position_grids(tokens, run.rows, holders, values)
        conflict = contradiction(grid, told, run.order is None) or _unnamed(grids, given)
        if conflict is not None:
            return conflict
    return found


def _latent_runs(tokens: TokenMap) -> list[Run] | Refusal:
    """Video runs whose source shows three axes, and the other content runs; [] if no video."""
    runs: list[Run] = []
    flat = False
    for source, codes in tokens.content.items():
        for start, stop in spans_of(codes != NONE):
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
            video = video_runs(source, axes, part, start)
            if isinstance(video, Refusal):
                return video
            runs += video or [_extra_run(source, codes, start, stop)]
    if any(run.grid for run in runs):
        return runs
    return Refusal(Reason.ONE_FRAME) if flat else []


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
        for start, stop in spans_of(codes != NONE)
    ]
    spans = [Span(run.start, run.length, _counter(run, holders)) for run in runs]
    positions = position_values(tokens, holders, values)
    runs = split_at(runs, [(known.start, known.stop) for known in positions])
    runs = split_at(runs, table_spans(tokens, holders))
    spoke, found = place_by_positions(runs, tokens, holders, values)
    if found is None:  # perhaps parts of a run stand on grids of their own
        parts = split_at(runs, made_spans(tokens))
        found = place_by_positions(parts, tokens, holders, values)[1]
    if isinstance(found, Refusal):
        return found
    if found is not None:
        conflict = _unnamed(found.grids, given)
        return conflict or _with_evidence(found.runs, tokens, found.evidence, found.position)
    detail = f"{tokens.tokens} tokens"
    if given is not None:
        where = find_place(given, spans, positions)
        if where is not None:
            runs = with_grids(runs, where.start, given.grids)
            return _with_evidence(runs, tokens, given.evidence, where.position)
        detail += f"; {given} fits none of the runs of {[s.length for s in spans]} tokens"
    if any(known.of_one_frame for known in positions):
        return Refusal(Reason.ONE_FRAME, detail)
    unread = any(s.kind is SourceKind.INPUT and s.root not in holders for s in tokens.positional)
    of_text = spoke and not unread and all(known.of_text for known in positions)
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


def _unnamed(grids: list[Grid], given: Given | None) -> Refusal | None:
    """A refusal if the option names a grid that is not one of those found."""
    if given is None or given.evidence is not Evidence.OPTION or set(given.grids) <= set(grids):
        return None
    found = ", ".join(map(spelled, grids))
    return Refusal(Reason.GRID_CONTRADICTED, f"{found}, but {given}")
