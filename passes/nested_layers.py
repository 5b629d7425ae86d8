"""Layers in nested graphs, by the parameters that the calls of these graphs hand over.

Dynamo may trace a region once and call its graph for every layer. Its nodes then name the layer it
was traced for; which one a call is for is told by the parameters among its operands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import fx

from .layers import Layer, layer_name, layer_named, parameter_path
from .sites import Site


def find_nested_layer(vectors: Sequence[tuple[str, int]], site: Site) -> Layer:
    """The layer of a site inside nested graphs; one without a name where it is not proven.

    vectors: the `vector_parameters` of the main graph.
    """
    recorded = layer_name(site.node)
    if recorded is None:
        return Layer(None, ())
    handed = list(_handed_parameters(site))
    prefix = recorded
    while prefix:
        true = _renamed(prefix, handed)
        if true is not None:
            name = true + recorded[len(prefix) :]
            return layer_named(vectors, name)
        if _inside(prefix, handed):
            return Layer(None, ())
        prefix = prefix.rpartition(".")[0]
    # no parameters: the call itself may stand in the very module
    called_in = layer_name(site.calls[0].node)
    return layer_named(vectors, recorded) if called_in == recorded else Layer(None, ())


def _handed_parameters(site: Site) -> Iterator[tuple[str, str]]:
    """(module that uses it in the trace, path of the parameter) of all parameters handed over."""
    inner = site.calls[-1].module
    for place, placeholder in enumerate(inner.graph.find_nodes(op="placeholder")):
        used_in = layer_name(placeholder)
        path = _path_outside(site, place)
        if used_in is not None and path is not None:
            yield used_in, path


def _path_outside(site: Site, place: int) -> str | None:
    """Path of the parameter that is the innermost graph's input at `place`; None if it is none."""
    for number in range(len(site.calls) - 1, -1, -1):
        operand = site.calls[number].operands[place]
        if not isinstance(operand, fx.Node) or operand.op != "placeholder":
            return None
        if number == 0:
            return parameter_path(operand)
        place = site.calls[number - 1].module.graph.find_nodes(op="placeholder").index(operand)
    return None


def _inside(prefix: str, handed: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """(rest of the using module's path, path of the parameter) of those used within `prefix`."""
    return [
        (used_in[len(prefix) :], path)
        for used_in, path in handed
        if used_in == prefix or used_in.startswith(prefix + ".")
    ]


def _renamed(prefix: str, handed: Sequence[tuple[str, str]]) -> str | None:
    """The module that takes the place of `prefix` in this call: it may have other numbers, and all
    parameters must agree on it."""
    numbered = r"\.".join(
        r"\d+" if part.isdecimal() else re.escape(part) for part in prefix.split(".")
    )
    found = {
        match[1] if match else None
        for rest, path in _inside(prefix, handed)
        for match in [re.match(rf"({numbered}){re.escape(rest)}\.", path)]
    }
    return found.pop() if len(found) == 1 else None
