"""Placing: which runs of a packed sequence stand on grids, by their positions alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from .codes import Source
from .given import Grid, spelled
from .positions import Evidence, PositionInput, Told, position_grids
from .reasons import Reason, Refusal
from .runs import Run
from .token_map import TokenMap


@dataclass(frozen=True, eq=False)
class Placed:
    """Runs of which one or more are videos. position: the input that tells the first one's grid."""

    runs: list[Run]
    evidence: Evidence
    position: PositionInput | None

    @property
    def grids(self) -> list[Grid]:
        """The grids of the videos."""
        return [run.grid for run in self.runs if run.grid is not None]


def place_by_positions(
    runs: Sequence[Run],
    tokens: TokenMap,
    holders: Mapping[Source, fx.Node],
    values: Mapping[fx.Node, object],
) -> tuple[bool, Placed | Refusal | None]:
    """Whether any run has positions of its own, and which runs these place on grids.

    Positions made in the graph may place several runs. Values of an input tell one grid per call:
    what stands beside it is extra. None where no run is placed. Arguments: see `find_layout`.
    """
    placed = list(runs)
    first: tuple[Evidence, PositionInput | None] | None = None
    spoke = False
    for place, run in enumerate(runs):
        told = position_grids(tokens, run.rows, holders, values)
        spoke = spoke or bool(told)
        evidence = next((e for e, say in told.items() if say.found is not None), None)
        if evidence is None or (first is not None and evidence is not Evidence.POSITIONS):
            continue
        say = told[evidence]
        assert say.found is not None
        conflict = contradiction(say.found.grid, told)
        if conflict is not None:
            return spoke, conflict
        if not say.found.raster and say.order is None:
            return spoke, Refusal(Reason.TOKEN_ORDER, f"{say.found.grid} grid")
        reads = run.reads | say.reads
        placed[place] = Run(run.start, run.length, say.sides, say.found.grid, say.order, reads)
        if first is None:
            by_values = told.get(Evidence.VALUES)
            first = evidence, None if by_values is None else by_values.position_input
        if evidence is not Evidence.POSITIONS:
            break
    return spoke, None if first is None else Placed(placed, *first)


def contradiction(grid: Grid, told: Told, raster: bool = True) -> Refusal | None:
    """A refusal if positions name another grid. Off raster order they cannot tell T from W."""
    for evidence, say in told.items():
        if say.found is None:
            continue
        other = say.found.grid
        if other != grid and (raster or sorted(other) != sorted(grid)):
            return Refusal(
                Reason.GRID_CONTRADICTED,
                f"{spelled(grid)}, but {evidence.value} {spelled(other)}",
                f"give the model positions (rotary tables, coordinates) of a {spelled(grid)} grid",
            )
    return None
