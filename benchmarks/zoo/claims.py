"""What the token codes claim of one graph, held against a run of it with a NaN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from veda_compile.passes.attention_ops import provenance_rules
from veda_compile.passes.codes import Source, SourceKind
from veda_compile.passes.origins import Origins
from veda_compile.passes.provenance import Provenance
from veda_compile.passes.sites import Site
from veda_compile.passes.token_map import token_map

from .entry import Grid
from .named_rows import named_rows
from .probe import Probe, nan_rows

NOT_FAR: Grid = (0, 0, 0)


@dataclass(frozen=True)
class Entrance:
    """Where a source enters a model: as argument number `place` of graph call number `call`."""

    call: int
    place: int
    name: str


@dataclass(frozen=True)
class Mark:
    """A NaN in one element of what enters a model."""

    entrance: Entrance
    element: tuple[int, ...]


@dataclass(frozen=True)
class Video:
    """The tokens of a model's video, and how many samples it has."""

    grid: Grid
    batch: int


@dataclass
class Probed:
    """What probing one model showed.

    sources: inputs that were probed, by name. elements: NaNs tried. calls: self-attention calls
    whose tokens come from inputs, in all graphs. rows: rows of q, k and v compared. hits: those of
    them that the codes named. faults: where the rows were others, in sentences.
    """

    sources: set[str] = field(default_factory=set)
    elements: int = 0
    calls: int = 0
    rows: int = 0
    hits: int = 0
    faults: list[str] = field(default_factory=list)


class Claims:
    """The claims on one graph, in one call of it.

    held: the inputs whose tokens each call of self-attention holds.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        sites: Sequence[Site],
        inputs: Sequence[Any],
        origins: Origins | None = None,
    ) -> None:
        rules = provenance_rules(site.node for site in sites)
        self.provenance = Provenance(gm, inputs, rules, origins)
        self.held = {site: _held(site, self.provenance) for site in sites}

    def compare(
        self, run: Probe, source: Source, mark: Mark, video: Video, far: Grid, out: Probed
    ) -> None:
        """Add to `out` what a run showed of the calls that hold `source`, which had the mark.
        far: how far convolutions that see neighbours carry it."""
        for site, held in self.held.items():
            if source in held:
                reach = far if site in run.spread else NOT_FAR
                self._compare(site, run, source, mark, video, reach, out)

    def _compare(
        self,
        site: Site,
        run: Probe,
        source: Source,
        mark: Mark,
        video: Video,
        far: Grid,
        out: Probed,
    ) -> None:
        ends = (site.q, site.k, site.v)
        for name, operand, value in zip("qkv", ends, run.seen[site], strict=True):
            codes = self.provenance.codes_of(operand.node)
            assert codes is not None
            rows = nan_rows(value, operand)
            named = named_rows(codes, operand, source, mark.element, video.batch)
            named = named.expand(len(rows), -1)
            if far != NOT_FAR:
                named = _spread(named, video.grid, far)
            # a length that only data tells was guessed, and its tail is text
            common = min(named.shape[-1], rows.shape[-1])
            out.rows += rows.numel()
            out.hits += int(named[:, :common].sum())
            if bool(rows[:, common:].any()) or not torch.equal(
                named[:, :common].expand_as(rows[:, :common]), rows[:, :common]
            ):
                out.faults.append(
                    f"{site.node.name}.{name}: {list(mark.element)} of {mark.entrance.name} is in "
                    f"{int(rows.sum())} rows, not in the {int(named.sum())} named, {far} around"
                )


@dataclass(frozen=True)
class GraphCall:
    """One call of a graph: its number, the claims on it, and the sources that its self-attention
    holds, by where they enter the model."""

    number: int
    claims: Claims
    sources: Mapping[Entrance, Source]


def _held(site: Site, provenance: Provenance) -> set[Source]:
    """The inputs (B, ...) whose tokens a call holds; none where it is not self-attention."""
    ends = (site.q, site.k, site.v)
    q, k, v = (provenance.codes_of(operand.node) for operand in ends)
    if q is None or k is None or v is None:
        return set()
    tokens = token_map(q, k, v, ends)
    if not tokens.same:
        return set()
    return {
        source.root
        for source in tokens.content
        if source.kind is SourceKind.INPUT and len(source.shape) >= 3
    }


def _spread(named: Tensor, grid: Grid, far: Grid) -> Tensor:
    """(B, N) rows within `far` of the named ones, in a sequence that is the video alone."""
    video = named.float().reshape(-1, 1, *grid)
    sides = [2 * step + 1 for step in far]
    return F.max_pool3d(video, sides, stride=1, padding=far).view(named.shape) > 0
