"""Copies of Dynamo graphs that may be changed. Every call of a nested graph has its own there."""

from __future__ import annotations

from torch import fx

from .subgraphs import subgraph_calls


def own_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph that may be changed: Dynamo keeps records of its own inputs.

    Nested graph modules are copied too, once per call; parameters and buffers are shared.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, mapping))
    # takes over from gm what the graph refers to
    copy = fx.GraphModule(gm, graph, gm.__class__.__name__)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
        if old.op == "placeholder":
            new._dynamo_source = getattr(old, "_dynamo_source", None)  # type: ignore[attr-defined]
    copy.graph.output_node().meta = dict(gm.graph.output_node().meta)
    copy.meta = dict(gm.meta)
    for name, child in list(copy.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(copy, name, own_copy(child))
    _give_every_call_its_own_graph(copy)
    for name in ("_param_name_to_source",):
        if name in gm.__dict__:
            setattr(copy, name, gm.__dict__[name])
    copy.recompile()
    return copy


def _give_every_call_its_own_graph(gm: fx.GraphModule) -> None:
    """Layers may share one nested graph, yet be rewritten differently. A name among the arguments
    tells compiled regions apart, and changes with them."""
    taken: set[str] = set()
    for number, call in enumerate(list(subgraph_calls(gm))):
        if call.attribute not in taken:
            taken.add(call.attribute)
            continue
        name = f"{call.attribute}_{number}_own"
        setattr(gm, name, own_copy(call.module))
        with gm.graph.inserting_before(call.node):
            body = gm.graph.get_attr(name)
        call.node.args = tuple(
            body
            if isinstance(arg, fx.Node) and arg.op == "get_attr" and arg.target == call.attribute
            else f"{arg}_{number}_own"
            if isinstance(arg, str)
            else arg
            for arg in call.node.args
        )
