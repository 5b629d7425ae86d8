"""Token codes against the numbers: one NaN in an input must show in just the rows they name.

A graph is run as it is, but for attention, whose output is set to zero: what is left keeps tokens
apart. The rows of q, k and v that turn NaN are then the tokens that hold the element, and no rule
of the analysis had a say in it. A model whose convolutions mix tokens is probed twice: seeing only
their own places, and as they are, where they must spread the NaN just so far.

A model that Dynamo cuts between projection and attention is run as a whole: the NaN is put into a
tensor that enters an early graph, and looked for in the later ones.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .claims import NOT_FAR, Entrance, GraphCall, Mark, Probed, Video
from .entry import Entry, Grid
from .graph_chain import GraphChain
from .named_rows import random_element
from .one_graph import OneGraph, captured
from .probe import Bypass, Probe


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
    # timesteps are rounded to integers, and rays and modulations go through that attention too
    "SanaWMTransformer3DModel": Mixing(
        frozenset(["blocks.0.attn"]), reach=(1, 1, 1), inputs=("timestep", "l_t_", "raymats")
    ),
    "TransformerTemporalModel": Mixing(norms=True),
    "HunyuanVideoTransformer3DModel": _POOLED_TEXT,
    "MochiTransformer3DModel": _POOLED_TEXT,
}
"""By class; the others keep tokens apart everywhere but in attention."""


class _Subject(Protocol):
    """What can be probed: see `OneGraph` and `GraphChain`."""

    calls: list[GraphCall]

    def run(self, bypass: Bypass, mark: Mark) -> list[Probe]: ...


def probe(entry: Entry, grid: Grid, batch: int, elements: int, seed: int) -> Probed:
    """Put NaNs in that many random elements of each input with tokens, one at a time."""
    mixing = MIXING.get(entry.model, Mixing())
    video = Video(entry.fit(grid), batch)
    result = Probed()
    for subject in _subjects(entry, grid, batch):
        for call in subject.calls:
            result.calls += sum(bool(sources) for sources in call.claims.held.values())
        for entrance in dict.fromkeys(e for call in subject.calls for e in call.sources):
            if any(word in entrance.name for word in mixing.inputs):
                continue
            result.sources.add(entrance.name)
            generator = random.Random(f"{seed} {entry.name} {entrance.name}")
            for _ in range(elements):
                _put(subject, entrance, generator, mixing, video, result)
                result.elements += 1
    return result


def _subjects(entry: Entry, grid: Grid, batch: int) -> Sequence[_Subject]:
    """Every graph by itself, or, where projections and attention are in several, all in one."""
    if entry.cut:
        return [GraphChain(entry, grid, batch)]
    return [OneGraph(graph) for graph in captured(entry, grid, batch)]


def _put(
    subject: _Subject,
    entrance: Entrance,
    generator: random.Random,
    mixing: Mixing,
    video: Video,
    result: Probed,
) -> None:
    """Put a NaN in one element of a source, and add what that showed to `result`."""
    holders = [call for call in subject.calls if entrance in call.sources]
    first = holders[0]
    element = random_element(generator, first.sources[entrance], first.claims.provenance)
    mark = Mark(entrance, tuple(element))
    for bypass, reach in mixing.runs():
        probes = subject.run(bypass, mark)
        for call in holders:
            call.claims.compare(
                probes[call.number], call.sources[entrance], mark, video, reach, result
            )
