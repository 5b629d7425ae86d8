"""The token map against the numbers: a NaN in one latent element must reach exactly its row.

The captured graph runs with all attention outputs set to zero, so that tokens do not mix.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from compiling import GRID, traced
from torch import Tensor, fx

from benchmarks.zoo import entry
from veda_compile.passes.attention_ops import provenance_rules
from veda_compile.passes.provenance import Provenance
from veda_compile.passes.sites import Operand, Site, find_sites
from veda_compile.passes.token_map import TokenMap, coordinates, token_map

PROBES = 3
MODELS = ["wan t2v batch 2", "wan i2v", "hunyuan batch 2", "cogvideox 2b", "cogvideox 5b",
          "cosmos batch 2", "plain fused qkv", "plain einsum"]  # fmt: skip


class Probe(fx.Interpreter):
    """Runs a graph, keeping q, k and v of every attention call and zeroing its output."""

    def __init__(self, gm: fx.GraphModule, sites: list[Site]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._sites = {site.node: site for site in sites}
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def run_node(self, n: fx.Node) -> Any:
        site = self._sites.get(n)
        if site is not None:
            operands = (site.q, site.k, site.v)
            q, k, v = (self.env[operand.node] for operand in operands)
            self.seen.append((q, k, v))
        result = super().run_node(n)
        return torch.zeros_like(result) if site is not None else result


def nan_rows(x: Tensor, operand: Operand) -> Tensor:
    """(B, N) whether each token of an operand holds a NaN."""
    bad = x.isnan()
    if "b" not in operand.axes:
        bad, axes = bad[None], "b" + operand.axes
    else:
        axes = operand.axes
    rest = [axes.index(letter) for letter in axes if letter not in "bn"]
    bad = bad.any(rest) if rest else bad
    return bad if axes.index("b") < axes.index("n") else bad.T


@pytest.mark.parametrize("name", MODELS)
def test_a_nan_reaches_exactly_the_predicted_row(name: str) -> None:
    captured = traced(name).captured
    gm, inputs = captured.gm, captured.inputs
    sites = list(find_sites(gm))
    provenance = Provenance(gm, inputs, provenance_rules())
    maps = [_map(site, provenance) for site in sites]
    place, holder = _latent(gm, entry(name).latent)
    source = next(s for s, node in provenance.sources.items() if node is holder)
    generator = random.Random(name)
    for _ in range(PROBES):
        element = [generator.randrange(side) for side in source.shape]
        changed = list(inputs)
        changed[place] = inputs[place].clone()
        changed[place][tuple(element)] = torch.nan
        probe = Probe(gm, sites)
        with torch.no_grad():
            probe.run(*changed)
        assert len(probe.seen) == len(sites)
        checked = 0
        for site, tokens, operands in zip(sites, maps, probe.seen, strict=True):
            if not tokens.same or source not in tokens.content:
                continue
            row = _predicted(tokens, source, element, name)
            for operand, value in zip((site.q, site.k, site.v), operands, strict=True):
                rows = nan_rows(value, operand)
                folded = rows.shape[0] // inputs[place].shape[0]
                batch = {element[0] * folded + head for head in range(folded)}
                assert {tuple(hit) for hit in rows.nonzero().tolist()} == {
                    (index, row) for index in batch
                }
            checked += 1
        assert checked == entry(name).sites


def _map(site: Site, provenance: Provenance) -> TokenMap:
    operands = (site.q, site.k, site.v)
    q, k, v = (provenance.codes_of(operand.node) for operand in operands)
    assert q is not None and k is not None and v is not None
    return token_map(q, k, v, operands)


def _latent(gm: fx.GraphModule, sides: str | None) -> tuple[int, fx.Node]:
    """The place and node of the input that holds the latent."""
    for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if sides is not None and ("hidden_states_" in node.name or "latents" in node.name):
            value = node.meta["example_value"]
            if value.dim() == len(sides):
                return place, node
    raise AssertionError("no latent among the inputs")


def _predicted(tokens: TokenMap, source: Any, element: list[int], name: str) -> int:
    """The row the token map names for a latent element; it must be the model's own order too."""
    sides = str(entry(name).latent)
    t, h, w = (element[sides.index(side)] for side in "THW")
    codes = tokens.content[source]
    places = coordinates(source, codes)
    hit = codes >= 0
    for side, index, patch in (("T", t, 1), ("H", h, 2), ("W", w, 2)):
        hit &= places[sides.index(side)] // patch == index // patch
    (row,) = hit.nonzero().flatten().tolist()
    assert row == entry(name).first + (t * GRID[1] + h // 2) * GRID[2] + w // 2
    return int(row)
