"""Which grid teller an attention site gets, by the evidence that its layout rests on."""

from __future__ import annotations

from torch import fx

from .earlier_graphs import EarlierGraphs, EarlierGrids
from .grids import FixedGrids, GivenGrids, GridTeller, PositionGrids, SymbolicGrids
from .passes.analyse import Finding
from .passes.positions import Evidence
from .told import Grids


def grid_teller(
    gm: fx.GraphModule,
    finding: Finding,
    tellers: dict[object, GridTeller],
    earlier: EarlierGraphs | None,
) -> GridTeller:
    """The grid teller of a site; sites told alike share one."""
    layout, sizes = finding.layout, finding.sizes
    assert layout is not None and sizes is not None
    fixed: Grids = tuple(run.grid for run in layout.videos if run.grid is not None)
    key: object
    if sizes.grids is None:
        position, evidence = layout.position_input, layout.evidence
        where = position and (
            position.node, position.axis, position.part, position.rows, position.others,
            position.batch,
        )  # fmt: skip
        key = (evidence, fixed, where)
        if evidence is Evidence.EARLIER:
            assert earlier is not None and finding.earlier is not None
            return tellers.setdefault(
                (key, finding.earlier), EarlierGrids(earlier, finding.earlier)
            )
        if evidence is Evidence.VALUES:
            assert position is not None
            return tellers.setdefault(key, PositionGrids(gm, position))
        option = fixed if evidence is Evidence.OPTION else None
        return tellers.setdefault(key, GivenGrids(gm, option, len(fixed), position))
    if any(e.free_symbols for grid in sizes.expressions for e in grid):
        return tellers.setdefault(sizes.expressions, SymbolicGrids(gm, sizes.expressions))
    return tellers.setdefault(fixed, FixedGrids(fixed))
