"""Token codes against the numbers: one NaN in an input must show in just the rows they name.

A graph is run as it is, but for attention, whose output is set to zero: what is left keeps tokens
apart. The rows of q, k and v that turn NaN are then the tokens that hold the element, and no rule
of the analysis had a say in it. A model whose convolutions mix tokens is probed twice: seeing only
their own places, and as they are, where they must spread the NaN just so far.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from veda_compile.passes.attention_ops import provenance_rules
from veda_compile.passes.codes import Source, SourceKind
from veda_compile.passes.provenance import Provenance
from veda_compile.passes.sites import Site, find_sites
from veda_compile.passes.token_map import token_map

from .entry import Entry, Grid
from .named_rows import named_rows, random_element
from .probe import Bypass, Graph, Probe, captured, copies, nan_rows

NOT_FAR: Grid = (0, 0, 0)


@dataclass(frozen=True)
class Mixing:
    """What a model does to tokens beside attention.

    modules: those that mix tokens from anywhere, such as linear attention. norms: group norms take
    their statistics over tokens. reach: how many tokens far convolutions carry a token along T, H
    and W, in a sequence that is the video alone. inputs: words in the names of inputs whose values
    reach tokens by other ways too, or not at all.
    """

    modules: frozenset[str] = frozenset()
    norms: bool = False
    reach: Grid = NOT_FAR
    inputs: tuple[str, ...] = ()

    def runs(self) -> list[tuple[Bypass, Grid]]:
        """What to leave out, and how far a NaN spreads then."""
        if self.reach == NOT_FAR:
            return [(Bypass(self.modules, self.norms), NOT_FAR)]
        centred = Bypass(self.modules, self.norms, neighbours=True)
        return [(centred, NOT_FAR), (Bypass(self.modules, self.norms), self.reach)]


_POOLED_TEXT = Mixing(inputs=("encoder_hidden_states",))

MIXING: dict[str | None, Mixing] = {
    # the first block: linear attention, then convolutions of 3 x 3 places and of 3 frames;
    # timesteps are rounded to integers
    "SanaWMTransformer3DModel": Mixing(
        frozenset(["blocks.0.attn"]), reach=(1, 1, 1), inputs=("timestep",)
    ),
    "TransformerTemporalModel": Mixing(norms=True),
    "HunyuanVideoTransformer3DModel": _POOLED_TEXT,
    "MochiTransformer3DModel": _POOLED_TEXT,
}
"""By class; the others keep tokens apart everywhere but in attention."""


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


def probe(entry: Entry, grid: Grid, batch: int, elements: int, seed: int) -> Probed:
    """Put NaNs in that many random elements of each input with tokens, one at a time."""
    result = Probed()
    for graph in captured(entry, grid, batch):
        checks = TokenCheck(graph, MIXING.get(entry.model, Mixing()), entry.fit(grid), batch)
        result.calls += sum(bool(sources) for sources in checks.held.values())
        for source in checks.sources:
            result.sources.add(source.name)
            generator = random.Random(f"{seed} {entry.name} {source.name}")
            for _ in range(elements):
                checks.put(source, random_element(generator, source, checks.provenance), result)
                result.elements += 1
    return result


class TokenCheck:
    """The claims on one graph.

    held: the inputs whose tokens each call of self-attention holds. sources: those to be probed.
    """

    def __init__(self, graph: Graph, mixing: Mixing, grid: Grid, batch: int) -> None:
        self._graph, self._mixing, self._grid, self._batch = graph, mixing, grid, batch
        self._sites: Sequence[Site] = list(find_sites(graph.gm))
        self.provenance = Provenance(graph.gm, graph.inputs, provenance_rules())
        self.held = {site: _held(site, self.provenance) for site in self._sites}
        self.sources = [
            source
            for source in self.provenance.sources
            if any(source in held for held in self.held.values())
            and not any(word in source.name for word in mixing.inputs)
        ]

    def put(self, source: Source, element: list[int], result: Probed) -> None:
        """Put a NaN in one element of a source, and add what that showed to `result`."""
        holder: fx.Node = self.provenance.sources[source]
        place = self._graph.gm.graph.find_nodes(op="placeholder").index(holder)
        for bypass, reach in self._mixing.runs():
            inputs = copies(self._graph.inputs)
            inputs[place][tuple(element)] = torch.nan
            run = Probe(self._graph.gm, self._sites, bypass)
            with torch.no_grad():
                run.run(*inputs)
            for site, held in self.held.items():
                if source in held:
                    far = reach if site in run.spread else NOT_FAR
                    self._compare(run, site, source, element, far, result)

    def _compare(
        self,
        run: Probe,
        site: Site,
        source: Source,
        element: list[int],
        far: Grid,
        result: Probed,
    ) -> None:
        ends = (site.q, site.k, site.v)
        for name, operand, value in zip("qkv", ends, run.seen[site], strict=True):
            codes = self.provenance.codes_of(operand.node)
            assert codes is not None
            rows = nan_rows(value, operand)
            named = named_rows(codes, operand, source, element, self._batch)
            named = named.expand(len(rows), -1)
            if far != NOT_FAR:
                named = _spread(named, self._grid, far)
            # a length that only data tells was guessed, and its tail is text
            common = min(named.shape[-1], rows.shape[-1])
            result.rows += rows.numel()
            result.hits += int(named[:, :common].sum())
            if bool(rows[:, common:].any()) or not torch.equal(
                named[:, :common].expand_as(rows[:, :common]), rows[:, :common]
            ):
                result.faults.append(
                    f"{site.node.name}.{name}: {source.name}{element} is in {int(rows.sum())} "
                    f"rows, not in the {int(named.sum())} named, {far} around"
                )


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
