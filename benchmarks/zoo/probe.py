"""Running a graph with attention taken out, so that tokens do not mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from veda_compile.passes.layers import module_path
from veda_compile.passes.sites import Operand, Site

Operands = tuple[Tensor, Tensor, Tensor]

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_CONVOLUTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Bypass:
    """What to leave out of a graph, beside attention.

    modules: their outputs are zeroed too. norms: group norms return what they are given.
    neighbours: convolutions that see neighbours see only the place they are at.
    """

    modules: frozenset[str] = frozenset()
    norms: bool = False
    neighbours: bool = False


class Probe(fx.Interpreter):
    """Runs a graph, keeping q, k and v of every attention call and zeroing its output.

    seen: q, k and v by call. spread: calls that ran after a convolution that sees neighbours.
    sees_neighbours: whether such a convolution has run, in this graph or in one before it.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        sites: Sequence[Site],
        bypass: Bypass,
        sees_neighbours: bool = False,
    ) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self._sites = {site.node: site for site in sites}
        self._bypass = bypass
        self.sees_neighbours = sees_neighbours
        self.seen: dict[Site, Operands] = {}
        self.spread: set[Site] = set()

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, or what stands for it."""
        site = self._sites.get(n)
        if site is not None:
            q, k, v = (self.env[operand.node].clone() for operand in (site.q, site.k, site.v))
            self.seen[site] = (q, k, v)
            if self.sees_neighbours:
                self.spread.add(site)
        name = getattr(n.target, "__name__", "")
        if name in _CONVOLUTIONS:
            return self._convolve(n)
        if name == "group_norm" and self._bypass.norms:
            return self.fetch_args_kwargs_from_env(n)[0][0]
        result = super().run_node(n)
        if site is not None or self._leaves_module(n):
            return pytree.tree_map_only(Tensor, torch.zeros_like, result)
        return result

    def _convolve(self, node: fx.Node) -> Tensor:
        """A convolution; of a kernel that may be left out, the middle alone."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        given = dict(zip(_CONVOLUTION_ARGUMENTS, args, strict=False)) | kwargs
        weight = given["weight"]
        pads = _each(given.get("padding", 0), weight)
        for d, step in enumerate(_each(given.get("stride", 1), weight)):
            half = weight.shape[d + 2] // 2
            if step == 1 and weight.shape[d + 2] % 2 and 0 < half <= pads[d]:
                self.sees_neighbours = True
                weight = weight.narrow(d + 2, half, 1)
                pads[d] -= half
        if self._bypass.neighbours:
            given |= {"weight": weight, "padding": tuple(pads)}
        convolve: Any = node.target
        made: Tensor = convolve(**given)
        return made

    def _leaves_module(self, node: fx.Node) -> bool:
        """Whether a node is what one of the modules to be left out returns."""
        inside = self._bypass.modules & _modules_of(node)
        return any(module not in _modules_of(user) for user in node.users for module in inside)


def _each(value: Any, weight: Tensor) -> list[int]:
    """An argument of a convolution, for each side of its kernel."""
    sides = weight.dim() - 2
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * sides if len(values) == 1 else values


def _modules_of(node: fx.Node) -> set[str]:
    """The paths of the modules a node was recorded in."""
    stack = node.meta.get("nn_module_stack") or {}
    return {module_path(str(path)) for path, _ in stack.values()}


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
