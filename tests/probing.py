"""Running a captured graph with attention taken out, so that tokens do not mix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from veda_compile.passes.sites import Operand, Site

Operands = tuple[Tensor, Tensor, Tensor]


class Probe(fx.Interpreter):
    """Runs a graph, keeping q, k and v of every attention call and zeroing its output."""

    def __init__(self, gm: fx.GraphModule, sites: list[Site]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._sites = {site.node: site for site in sites}
        self.seen: dict[Site, Operands] = {}

    def run_node(self, n: fx.Node) -> Any:
        site = self._sites.get(n)
        if site is None:
            return super().run_node(n)
        q, k, v = (self.env[operand.node].clone() for operand in (site.q, site.k, site.v))
        self.seen[site] = (q, k, v)
        result = super().run_node(n)
        return pytree.tree_map_only(Tensor, torch.zeros_like, result)


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
