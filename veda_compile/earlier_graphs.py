"""Earlier graphs: verdicts that rest on what they tell of a graph's inputs, checked per call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from .errors import LayoutError
from .handing_on import CallSizes, is_handed_to
from .passes.analyse import Finding, analyse
from .passes.grid_sizes import LayoutSizes
from .passes.layout import SiteLayout
from .passes.origins import Origins, tensor_inputs
from .passes.owned_graph import own_copy
from .passes.sizes import supposing
from .passes.verdict import Policy
from .tags import TAGS, Relation
from .told import Grids
from .untold import with_causes

_CACHED_CALLS = 64
_REMEDY = (
    "call torch.compiler.reset() after changing what runs between the model's compiled parts, keep "
    "projections and attention in one graph (TORCH_LOGS=graph_breaks shows where it breaks), or "
    "compile without the veda backend"
)


class EarlierGraphs:
    """What earlier graphs tell of one graph's attention calls, call by call.

    A call is right if its inputs hold the same video in the same places as when the graph was
    compiled; the grid may differ. Otherwise LayoutError is raised.
    """

    def __init__(
        self, gm: fx.GraphModule, inputs: Sequence[Any], policy: Callable[[], Policy]
    ) -> None:
        """gm: Dynamo's graph. inputs: its example inputs, some of them tagged. policy: asked anew
        for every call, because `attach` may tell other grids."""
        self._gm = own_copy(gm)
        self._policy = policy
        self._sizes = CallSizes(self._gm)
        self._nodes = self._gm.graph.find_nodes(op="placeholder")
        self._places = [
            place for place in tensor_inputs(gm, inputs) if TAGS.of(inputs[place]) is not None
        ]
        self._known: OrderedDict[object, tuple[SiteLayout | None, ...]] = OrderedDict()
        self._relied: dict[int, _Structure] = {}

    def findings(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Finding]:
        """The verdicts on the attention calls of `gm`, the copy that is to be rewritten."""
        relation = self._relation(inputs)
        nodes = gm.graph.find_nodes(op="placeholder")
        return analyse(gm, inputs, self._policy(), self._origins(relation, nodes))

    def rely(self, site: int, layout: SiteLayout, sizes: LayoutSizes) -> None:
        """From now on calls must have a layout like this at site number `site`."""
        constant = tuple(size if isinstance(size, int) else None for size in sizes.extras)
        self._relied[site] = _Structure(layout, constant)

    def grids(self, site: int, args: Sequence[Any]) -> Grids:
        """The grids of one site in a call. Raises LayoutError as a call of this object does."""
        layout = self._layouts(args)[site]
        assert layout is not None
        return layout.grids

    def __call__(self, args: Sequence[Any]) -> None:
        """args: the graph's arguments. Raises LayoutError where they do not hold what they did."""
        self._layouts(args)

    def _relation(self, args: Sequence[Any]) -> Relation:
        return TAGS.relation([args[place] for place in self._places], False)

    def _origins(self, relation: Relation, nodes: Sequence[fx.Node]) -> Origins:
        held = zip((nodes[place] for place in self._places), relation.key, strict=True)
        return Origins({node: known for node, known in held if known is not None})

    def _layouts(self, args: Sequence[Any]) -> tuple[SiteLayout | None, ...]:
        relation, sizes = self._relation(args), self._sizes(args)
        known = self._known.get((relation.key, sizes))
        if known is None:
            known = self._read(args, relation, sizes)
            self._known[relation.key, sizes] = known
            while len(self._known) > _CACHED_CALLS:
                self._known.popitem(last=False)
        return known

    def _read(
        self, args: Sequence[Any], relation: Relation, sizes: tuple[int, ...]
    ) -> tuple[SiteLayout | None, ...]:
        with supposing(dict(zip(self._sizes.symbols, sizes, strict=True))):
            origins = self._origins(relation, self._nodes)
            layouts = [x.layout for x in analyse(self._gm, args, self._policy(), origins)]
        for site, wanted in self._relied.items():
            layout = layouts[site]
            if layout is None or not wanted.fits(layout):
                names = [self._nodes[p].name for p, known in
                         zip(self._places, relation.key, strict=True) if known is None]  # fmt: skip
                why = f"nothing is known of {', '.join(names)}; " if names else ""
                raise LayoutError(
                    "the inputs of this graph no longer hold the video tokens in the places they "
                    f"had when it was compiled: {why}{_REMEDY}"
                )
        return tuple(layouts)


@dataclass(frozen=True, eq=False)
class _Structure:
    """What must not change between calls. Videos may: their grids are told per call.

    constant: length per extra run where it went into the graph as a number.
    """

    layout: SiteLayout
    constant: tuple[int | None, ...]

    def fits(self, other: SiteLayout) -> bool:
        mine, kinds = ([run.grid is not None for run in x.runs] for x in (self.layout, other))
        extras = [run.length for run in other.runs if run.grid is None]
        return (
            mine == kinds
            and all(a in (None, b) for a, b in zip(self.constant, extras, strict=True))
            and (self.layout.before, self.layout.after) == (other.before, other.after)
            and self.layout.evidence is other.evidence
        )


class EarlierGrids:
    """Tells the grids of one site whose tokens come through earlier graphs."""

    def __init__(self, earlier: EarlierGraphs, site: int) -> None:
        self._earlier = earlier
        self._site = site

    def __call__(self, args: Sequence[Any]) -> Grids:
        """See `GridTeller`. Raises LayoutError, see `EarlierGraphs`."""
        return self._earlier.grids(self._site, args)


def analyse_after(
    gm: fx.GraphModule,
    owned: fx.GraphModule,
    inputs: Sequence[Any],
    policy: Callable[[], Policy],
) -> tuple[list[Finding], EarlierGraphs | None]:
    """The findings of a graph; those that only earlier graphs can tell rest on them.

    owned: the copy of `gm` that is to be rewritten. Returns also what must be checked on every
    call, None if nothing rests on earlier graphs.
    """
    findings = analyse(owned, inputs, policy())
    if all(finding.refusal is None for finding in findings) or not is_handed_to(inputs):
        return with_causes(owned, inputs, findings), None
    earlier = EarlierGraphs(gm, inputs, policy)
    relies = False
    for place, told in enumerate(earlier.findings(owned, inputs)):
        if findings[place].refusal is None:
            continue
        findings[place] = replace(told, earlier=place if told.refusal is None else None)
        if told.refusal is None and told.layout is not None and told.sizes is not None:
            earlier.rely(place, told.layout, told.sizes)
            relies = True
    return with_causes(owned, inputs, findings), earlier if relies else None
