"""Rewriting: each accepted site becomes one call of the sparse attention op.

Plans, and grids that are told per call, enter as extra graph inputs, so that one compiled graph
serves every layer, sidecar and grid.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..kernels.layout import CONTEXT, EXTRA, VIDEO
from ..kernels.op import sparse_attention_v2
from .analyse import Finding
from .bhnd import cast_to, from_bhnd, operands, to_bhnd
from .dead import erase, takes_output
from .layout import SiteLayout
from .mask_rows import key_rows, masked_output
from .multihead import with_heads
from .segment_rows import own_keys, with_padding
from .sizes import Length, SizeOf, example_tensor

_REST = -1


@dataclass(frozen=True)
class PlanInputs:
    """Which plan inputs a site takes. Sites with equal keys share them.

    key: the plan's name. projection, factors, modes, columns: the plan brings these tensors.
    grids: number of video segments whose grids are told per call; 0 where the graph knows them.
    order: the layout whose tokens are brought into raster order; None where they stand so.
    """

    key: str
    projection: bool
    grids: int
    order: SiteLayout | None = None
    factors: bool = False
    modes: bool = False
    columns: bool = False


@dataclass(frozen=True, eq=False)
class ExtraInputs:
    """The graph inputs added for one PlanInputs, as nodes in this order; None where not taken."""

    inputs: PlanInputs
    tile_shapes: fx.Node
    density: fx.Node
    projection: fx.Node | None
    factors: fx.Node | None
    modes: fx.Node | None
    columns: fx.Node | None
    grids: fx.Node | None
    order: fx.Node | None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The inputs that were added, in the graph's order."""
        found = (
            self.tile_shapes, self.density, self.projection, self.factors, self.modes,
            self.columns, self.grids, self.order,
        )  # fmt: skip
        return tuple(node for node in found if node is not None)


class Rewriter:
    """Rewrites the findings of one main graph and collects the inputs that were added.

    keep_all: the node, of the main graph, that becomes the op's argument of this name; or None.
    """

    def __init__(self, gm: fx.GraphModule, score: str, executor: str) -> None:
        """gm: an owned copy. score, executor: passed to the op as they are."""
        self.keep_all: fx.Node | None = None
        self._gm = gm
        self._score = score
        self._executor = executor
        self._extra: dict[PlanInputs, ExtraInputs] = {}
        placeholders = gm.graph.find_nodes(op="placeholder")
        self._last: fx.Node | None = placeholders[-1] if placeholders else None

    @property
    def extra(self) -> tuple[ExtraInputs, ...]:
        """Everything that was added, in the order of the graph's new inputs."""
        return tuple(self._extra.values())

    def rewrite(self, finding: Finding, inputs: PlanInputs) -> None:
        """Replace the site of `finding`. Nested sites get the inputs through their calls."""
        site = finding.site
        extra = self._extra.get(inputs) or self._add_inputs(inputs)
        names: list[fx.Node | None] = [
            extra.tile_shapes, extra.density, extra.projection, extra.grids, extra.order,
            self.keep_all, extra.factors, extra.modes, extra.columns,
        ]  # fmt: skip
        for outer in site.calls:
            names = [None if node is None else lift(outer.node, outer.module, node)
                     for node in names]  # fmt: skip
        tile_shapes, density, projection, grids, order, *optional = names
        assert finding.dims is not None
        dtype = finding.dims.dtype
        graph = site.owner.graph
        with graph.inserting_before(site.node):
            q, k, v = (
                cast_to(graph, to_bhnd(graph, operand), operand.node, dtype)
                for operand in operands(graph, site)
            )
            valid = valid_keys(graph, finding, q, k)
            layout = self.layout(graph, finding)
            ordered: tuple[fx.Node | None, ...] = (q, k, v, valid)
            if order is not None:
                ordered = tuple(
                    None if x is None else _taken(graph, x, side, order, 0)
                    for x, side in ((q, 2), (k, 2), (v, 2), (valid, 1))
                )
            call = graph.call_function(
                sparse_attention_v2._opoverload,
                (*ordered, layout, grids, tile_shapes, density, projection, self._score,
                 site.scale, self._executor, *optional),
            )  # fmt: skip
            out = graph.call_function(operator.getitem, (call, 0))
            if order is not None:
                out = _taken(graph, out, 2, order, 1)
            if finding.mask is not None:
                out = masked_output(graph, finding.mask, valid, q, v, out)
            if site.segments is not None and valid is not None:
                grouped = finding.dims.heads != finding.dims.kv_heads
                out = with_padding(graph, site.segments, valid, (q, k, v), out, site.scale, grouped)
            if site.projections is None:
                out = from_bhnd(graph, out, site.out_axes, site.q.samples)
            else:
                out = from_bhnd(graph, out, with_heads(site.out_axes))
                out = site.projections.combine(graph, out, site.q.node)
            recorded = site.first_output()
            if recorded is not None and recorded.dtype != dtype:
                out = graph.call_function(torch.ops.aten.to.dtype, (out, recorded.dtype))
        for node in (call, out):
            node.meta = {
                key: value
                for key, value in site.node.meta.items()
                if key in ("nn_module_stack", "stack_trace", "source_fn_stack")
            }
        if site.output_first:
            for user in [user for user in site.node.users if not takes_output(user)]:
                erase(user)
        replaced = list(site.node.users) if site.output_first else [site.node]
        for node in replaced[:1]:
            # methods of nodes that are not known to be tensors keep a graph from being cached
            out.meta["example_value"] = example_tensor(node)
        if site.output_first:
            for user in list(site.node.users):
                user.replace_all_uses_with(out)
                graph.erase_node(user)
        else:
            site.node.replace_all_uses_with(out)
        graph.erase_node(site.node)

    def finish(self) -> fx.GraphModule:
        """Remove what nothing uses any more, check and recompile the graph."""
        for module in [m for m in self._gm.modules() if isinstance(m, fx.GraphModule)]:
            module.graph.lint()
            module.recompile()
        return self._gm

    def _add_inputs(self, inputs: PlanInputs) -> ExtraInputs:
        stem = f"veda_{len(self._extra)}"
        nodes = {
            name: self.add_input(f"{stem}_{name}")
            for name, wanted in (
                ("tile_shapes", True),
                ("density", True),
                ("projection", inputs.projection),
                ("factors", inputs.factors),
                ("modes", inputs.modes),
                ("columns", inputs.columns),
                ("grids", inputs.grids > 0),
                ("order", inputs.order is not None),
            )
            if wanted
        }
        self._extra[inputs] = ExtraInputs(
            inputs,
            nodes["tile_shapes"],
            nodes["density"],
            nodes.get("projection"),
            nodes.get("factors"),
            nodes.get("modes"),
            nodes.get("columns"),
            nodes.get("grids"),
            nodes.get("order"),
        )
        return self._extra[inputs]

    def add_input(self, name: str) -> fx.Node:
        """A new last input of the main graph."""
        graph = self._gm.graph
        if self._last is None:
            with graph.inserting_before(next(iter(graph.nodes))):
                node = graph.placeholder(name)
        else:
            with graph.inserting_after(self._last):
                node = graph.placeholder(name)
        node._dynamo_source = None  # type: ignore[attr-defined]
        self._last = node
        return node

    def layout(self, graph: fx.Graph, finding: Finding) -> list[Any]:
        """The op's `layout` argument: sizes of the graph, or blanks for the grids of this call."""
        assert finding.layout is not None and finding.sizes is not None
        before, after = finding.layout.before, finding.layout.after
        flat: list[Any] = [CONTEXT, before if after else _REST, 1, 1] if before else []
        blank: Length = 0
        told = [(blank,) * 3] * len(finding.layout.videos)
        grids, extras = iter(finding.sizes.grids or told), iter(finding.sizes.extras)
        for run in finding.layout.runs:
            if run.grid is not None:
                flat += [VIDEO, *(_size_node(graph, side) for side in next(grids))]
            else:
                length = next(extras)
                rest = _REST if length is None else _size_node(graph, length)
                flat += [EXTRA, rest, 1, 1]
        return flat + ([CONTEXT, _REST, 1, 1] if after else [])


def _taken(graph: fx.Graph, x: fx.Node, side: int, order: fx.Node, row: int) -> fx.Node:
    """The tokens of x along a side in the order that a row of `order` tells."""
    places = graph.call_function(torch.ops.aten.select.int, (order, 0, row))
    return graph.call_function(torch.ops.aten.index_select.default, (x, side, places))


def _size_node(graph: fx.Graph, length: Length) -> Any:
    if isinstance(length, SizeOf):
        return graph.call_function(torch.ops.aten.sym_size.int, (length.node, length.dim))
    return length


def lift(call: fx.Node, module: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Hand a node of the calling graph to a nested graph; once per call and name."""
    placeholders = module.graph.find_nodes(op="placeholder")
    name = str(node.target) if node.op == "placeholder" else node.name
    existing = next((p for p in placeholders if p.target == name), None)
    if existing is None:
        with module.graph.inserting_after(placeholders[-1]):
            existing = module.graph.placeholder(name)
    if node not in call.args:
        call.args = (*call.args, node)
    return existing


def valid_keys(graph: fx.Graph, finding: Finding, q: fx.Node, k: fx.Node) -> fx.Node | None:
    """(B, Nk) bool, keys that somebody attends to; None for all. q, k: (B, H, N, D)."""
    if finding.site.segments is not None:
        return own_keys(graph, finding.site.segments, q)
    return None if finding.mask is None else key_rows(graph, finding.mask, k)


def hides_keys(finding: Finding) -> bool:
    """Whether `valid_keys` of this finding is something."""
    if finding.site.segments is not None:
        return finding.site.segments.padding is not None
    return finding.mask is not None and finding.mask.keys is not None


def input_positions(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> list[int]:
    """The places of placeholders among a graph's inputs."""
    order = {node: place for place, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    return [order[node] for node in nodes]
