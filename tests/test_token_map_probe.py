"""Token codes against the numbers: a NaN in one latent element reaches exactly the named rows.

For every class of the zoo whose video enters as a latent, and every attention call that holds it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import Captured
from probing import Probe, nan_rows
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from benchmarks.zoo import ENTRIES, Entry
from veda_compile.passes.attention_ops import provenance_rules
from veda_compile.passes.codes import NONE, Source, SourceKind, Tracked
from veda_compile.passes.provenance import Provenance
from veda_compile.passes.sites import Operand, find_sites
from veda_compile.passes.token_map import coordinates, to_bhnd, token_map

pytestmark = pytest.mark.usefixtures("fresh_compiler")

GRID = (5, 6, 10)
PROBES = 3

MIXED = frozenset(["sana wm", "sana wm frames", "sana wm no camera"])
"""Models that mix neighbouring tokens by convolutions between layers."""

PROBED = {
    entry.model or entry.name: entry
    for entry in reversed(ENTRIES)
    if entry.latent is not None and entry.name not in MIXED
}
"""The first entry of every class."""


def captured(entry: Entry) -> list[Captured]:
    """Every graph of one call of a model."""
    graphs: list[Captured] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(Captured(gm, copies(inputs)))
        return gm.forward

    model, inputs = entry.make(entry.fit(GRID))
    with torch.no_grad(), torch._dynamo.config.patch(**entry.dynamo):
        torch.compile(model, backend=backend, dynamic=False)(**inputs)
    return graphs


def copies(inputs: list[Any]) -> list[Any]:
    """Inputs that a graph may write to."""
    return [pytree.tree_map_only(Tensor, _copy, value) for value in inputs]


def _copy(value: Tensor) -> Tensor:
    return value if isinstance(value, torch.nn.Parameter) else value.detach().clone()


@pytest.mark.parametrize("entry", PROBED.values(), ids=lambda entry: entry.name)
def test_a_nan_reaches_exactly_the_named_rows(entry: Entry) -> None:
    generator = random.Random(entry.name)
    checked = 0
    graphs = captured(entry)
    for graph in graphs:
        sites = list(find_sites(graph.gm))
        provenance = Provenance(graph.gm, graph.inputs, provenance_rules())
        placeholders = graph.gm.graph.find_nodes(op="placeholder")
        for source, holder in provenance.sources.items():
            if source.kind is not SourceKind.INPUT or len(source.shape) < 4 or not sites:
                continue
            place = placeholders.index(holder)
            for _ in range(PROBES):
                element = _element(generator, source, provenance)
                changed = copies(graph.inputs)
                changed[place][tuple(element)] = torch.nan
                probe = Probe(graph.gm, sites)
                with torch.no_grad():
                    probe.run(*changed)
                for site, operands in probe.seen.items():
                    ends = (site.q, site.k, site.v)
                    tracked = [provenance.codes_of(operand.node) for operand in ends]
                    if not _holds_video(tracked, ends, source):
                        continue
                    for operand, codes, value in zip(ends, tracked, operands, strict=True):
                        assert codes is not None
                        named = _named_rows(codes, operand, source, element)
                        rows = nan_rows(value, operand)
                        # a length that only data tells was guessed, and its tail is text
                        count = min(named.shape[-1], rows.shape[-1])
                        assert not rows[:, count:].any()
                        named, rows = named[..., :count], rows[:, :count]
                        assert torch.equal(named.expand_as(rows), rows), (source.name, element)
                    checked += 1
    assert checked >= entry.sites * PROBES or len(graphs) > 1  # breaks hide where tokens come from


def _element(generator: random.Random, source: Source, provenance: Provenance) -> list[int]:
    """An element of a source: any, but along sides that tokens do not divide evenly one that the
    codes name."""
    element = [generator.randrange(side) for side in source.shape]
    for value in provenance.values.values():
        for held, codes in value.codes.items() if isinstance(value, Tracked) else ():
            if held.root is not source or codes.numel() == 1:
                continue
            for axis, index in enumerate(coordinates(source, codes[codes != NONE])):
                named = torch.unique(index)
                if named.numel() > 1 and _patch(named, source.shape[axis]) == 1:
                    element[axis] = int(generator.choice(named.tolist()))
    return element


def _patch(named: Tensor, side: int) -> int:
    """How many indices of a side make a token; 1 where tokens do not divide it evenly."""
    size = side // named.numel()
    even = side % named.numel() == 0 and bool((named.diff() == size).all())
    return size if even else 1


def _holds_video(
    tracked: list[Tracked | None], ends: tuple[Operand, Operand, Operand], source: Source
) -> bool:
    """Whether a call is self-attention over tokens of a source."""
    q, k, v = tracked
    if q is None or k is None or v is None:
        return False
    tokens = token_map(q, k, v, ends)
    return tokens.same and any(s.root is source for s in tokens.content)


def _named_rows(codes: Tracked, operand: Operand, source: Source, element: list[int]) -> Tensor:
    """(B, N) the rows that the codes say an element of a source is in."""
    named = torch.zeros(1, 1, dtype=torch.bool)
    for held, values in codes.codes.items():
        if held.root is not source:
            continue
        rows = to_bhnd(values, operand.axes)[:, 0].amax(-1)
        hit = rows != NONE
        for index, side, at in zip(coordinates(source, rows), source.shape, element, strict=True):
            named_indices = torch.unique(index[rows != NONE])
            if named_indices.numel() > 1:  # a side mixed within tokens names one index for all
                size = _patch(named_indices, side)
                hit = hit & (index // size == at // size)
        named = named | hit
    return named
