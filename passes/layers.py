"""Layers: the module an attention call belongs to, and that module's parameters in the graph."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

_ITEM = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]")
_PLUMBING = frozenset({"_modules", "_parameters", "_buffers", "__dict__", "_orig_mod"})


@dataclass(frozen=True)
class Layer:
    """Where a site stands in the model.

    name: path of the innermost module from the compiled module, such as "blocks.3.attn1"; None
        where tracing recorded none. parameters: (path from the layer, position among the graph's
        inputs) of the 1-D parameters that tell this layer from others, sorted by path.
    """

    name: str | None
    parameters: tuple[tuple[str, int], ...]


def module_path(recorded: str) -> str:
    """ "L['self'].__dict__['_modules']['blocks'].3.attn1" -> "blocks.3.attn1"."""
    flat = _ITEM.sub(r".\1", recorded.replace("getattr", ""))
    parts = [part for part in flat.split(".") if part and part not in _PLUMBING]
    return ".".join(parts[2:] if parts[:1] == ["L"] else parts)


def find_layer(vectors: Sequence[tuple[str, int]], node: fx.Node) -> Layer:
    """The layer of an attention call in the main graph. vectors: its `vector_parameters`."""
    name = layer_name(node)
    return Layer(None, ()) if name is None else layer_named(vectors, name)


def layer_named(vectors: Sequence[tuple[str, int]], name: str) -> Layer:
    """The layer of that name. vectors: the main graph's `vector_parameters`."""
    prefix = name
    while True:
        inside = [
            (path[len(prefix) + 1 :] if prefix else path, place)
            for path, place in vectors
            if not prefix or path.startswith(prefix + ".")
        ]
        if inside or not prefix:
            return Layer(name, tuple(sorted(inside)))
        prefix = prefix.rpartition(".")[0]


def layer_name(node: fx.Node) -> str | None:
    """Path of the innermost module recorded for a node; "" is the compiled module itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path, _ = list(stack.values())[-1]
    return module_path(str(path))


def vector_parameters(gm: fx.GraphModule) -> list[tuple[str, int]]:
    """(module path, input position) of the graph's floating 1-D parameters."""
    found = []
    for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        path = parameter_path(node)
        value = node.meta.get("example_value")
        if path is None or not isinstance(value, torch.Tensor) or value.dim() != 1:
            continue
        if value.is_floating_point():
            found.append((path, place))
    return found


def parameter_path(node: fx.Node) -> str | None:
    """Path of the parameter that an input of the main graph holds; None if it is none."""
    source = getattr(node, "_dynamo_source", None)
    if source is None or "_parameters" not in source_name(source):
        return None
    return module_path(source_name(source))


def source_name(source: object) -> str:
    """Dynamo's name of an input; a method in some releases of torch, a property in others."""
    name = source.name  # type: ignore[attr-defined]
    return str(name() if callable(name) else name)


def matches(name: str | None, index: int, wanted: Sequence[str | int]) -> bool:
    """Whether a layer is among names and indices a user gave; a name may be a trailing part."""
    return index in wanted or (
        name is not None
        and any(
            isinstance(entry, str) and (name == entry or name.endswith("." + entry))
            for entry in wanted
        )
    )
