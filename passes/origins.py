"""Origins: where the tokens of a graph's inputs come from when an earlier graph computed them.

A graph that Dynamo cut off hands tensors to the next one. A *pattern* says which elements of which
roots such a tensor holds; a *root* is a tensor that entered the first of these graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch import fx

from .codes import NONE, Source, SourceKind, Tracked
from .provenance import Provenance
from .subgraphs import output_value


def _source(name: str, shape: tuple[int, ...]) -> Source:
    """A root of this shape; what rests on it is looked at anew for every other."""
    return Source(name, SourceKind.INPUT, shape, tuple(map(sympy.Integer, shape)))


@dataclass(frozen=True, eq=False)
class Part:
    """The codes of one root: the root's shape and a tensor with sides full or 1.

    moved: None where the tensor has the root's shape and every element its own place.
    """

    shape: tuple[int, ...]
    moved: torch.Tensor | None

    @property
    def codes(self) -> torch.Tensor:
        """The codes, of the tensor's rank."""
        if self.moved is None:
            with torch.device("cpu"):
                return _source("", self.shape).codes()
        return self.moved


@dataclass(frozen=True, eq=False)
class Pattern:
    """What a tensor of `shape` holds of its roots, one part for each."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Origins:
    """What is known of a graph's inputs: their patterns, and which roots they share.

    patterns: by placeholder, the pattern and the number of each part's root.
    """

    patterns: Mapping[fx.Node, tuple[Pattern, tuple[int, ...]]]
    sources: dict[int, Source] = field(default_factory=dict)

    def codes(self, node: fx.Node) -> dict[Source, torch.Tensor] | None:
        """The codes of a placeholder per root; None where its elements are told apart by itself."""
        if node not in self.patterns:
            return None
        pattern, roots = self.patterns[node]
        found = {}
        for part, root in zip(pattern.parts, roots, strict=True):
            if root not in self.sources:
                name = f"root {root} of earlier graphs"
                self.sources[root] = _source(name, part.shape)
            found[self.sources[root]] = part.codes
        return found

    def holder(self, node: fx.Node) -> Source | None:
        """The only root of a placeholder that has every element in its place."""
        if node not in self.patterns:
            return None
        pattern, roots = self.patterns[node]
        whole = len(pattern.parts) == 1 and pattern.parts[0].moved is None
        return self.sources[roots[0]] if whole else None


@dataclass(frozen=True, eq=False)
class Output:
    """What a graph's output number `place` holds of the roots with these numbers."""

    place: int
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    roots: tuple[int, ...]


def outputs_with_tokens(
    gm: fx.GraphModule, provenance: Provenance, origins: Origins
) -> list[Output]:
    """The outputs whose elements are known, where all of the graph's inputs have origins.

    Outputs that an index tensor among the inputs has moved are left out: its values may change.
    """
    with torch.device("cpu"):
        return _outputs_with_tokens(gm, provenance, origins)


def _outputs_with_tokens(
    gm: fx.GraphModule, provenance: Provenance, origins: Origins
) -> list[Output]:
    returned = output_value(gm.graph)
    numbers = {source: number for number, source in origins.sources.items()}
    found = []
    for place, node in enumerate(returned if isinstance(returned, (tuple, list)) else ()):
        tracked = provenance.codes_of(node)
        parts = {} if tracked is None else _parts(tracked, numbers)
        if tracked is not None and parts:
            found.append(Output(place, tracked.shape, tuple(parts.values()), tuple(parts)))
    return found


def _parts(tracked: Tracked, numbers: Mapping[Source, int]) -> dict[int, Part]:
    parts = {}
    for source, codes in tracked.codes.items():
        if source.kind is not SourceKind.INPUT or codes.numel() == 1:
            continue
        if source not in numbers:
            return {}
        if bool((codes != NONE).any()):
            whole = source.shape == tracked.shape and torch.equal(codes, source.codes())
            parts[numbers[source]] = Part(source.shape, None if whole else codes.contiguous())
    return parts


def written_inputs(gm: fx.GraphModule, provenance: Provenance) -> list[int]:
    """The places of inputs that the graph writes to."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return [place for place, node in enumerate(placeholders) if node in provenance.written]


def tensor_inputs(gm: fx.GraphModule, inputs: Sequence[object]) -> list[int]:
    """The places of inputs with elements of their own: tensors that are no parameters."""
    return [
        place
        for place, (node, value) in enumerate(
            zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
        )
        if isinstance(value, torch.Tensor)
        and not isinstance(value, torch.nn.Parameter)
        and value.dim()
        and "_buffers_" not in node.name
    ]
