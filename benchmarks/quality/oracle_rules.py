"""What a perfect score would keep, and what veda keeps by itself."""

from __future__ import annotations

import torch

from veda_compile.kernels.plan import Plan, least_padding_shape
from veda_compile.options import Options
from veda_compile.planner import Planner

from .rule import CUBE, TILE_SIZE, Choice, Rule, Site, budget, by_plan, ranked, tiled, top


class Oracle(Rule):
    """The tiles with the most attention mass, in cubes. It needs the dense attention."""

    name = "oracle cubes"
    source = "upper bound"

    def choose(self, site: Site, density: float) -> Choice:
        """Rank by true mass."""
        return ranked(site, site.mass(CUBE, range(site.heads)), CUBE, density)


class ClosedForm(Rule):
    """What the backend does without a sidecar: closed form, one shape for all heads."""

    name = "veda closed form"
    source = "this project, no sidecar"

    def plan(self, site: Site, density: float) -> Plan:
        """The backend's default plan."""
        shape = least_padding_shape(site.layout, TILE_SIZE)
        return Plan.uniform(site.heads, shape, density)

    def choose(self, site: Site, density: float) -> Choice:
        """As the backend."""
        return by_plan(site, self.plan(site, density))


class FromSidecar(Rule):
    """What the backend does with a sidecar, its budgets scaled to the density asked for."""

    source = "this project, sidecar"

    def __init__(self, label: str, path: str) -> None:
        self.name = f"veda {label}"
        self._path = path
        self._planners: dict[float, Planner] = {}

    def plan(self, site: Site, density: float) -> Plan:
        """The layer's plan."""
        if density not in self._planners:
            self._planners[density] = Planner(Options(sidecar=self._path, density=density))
        planner = self._planners[density]
        assert planner.sidecar is not None
        layer = planner.sidecar.model.layers[site.layer].name
        return planner.plan(layer, site.heads, (site.grid,))

    def choose(self, site: Site, density: float) -> Choice:
        """As the backend."""
        return by_plan(site, self.plan(site, density))


class OracleOf(Rule):
    """True mass with the shapes and budgets of another rule's plan, the own tile kept as there."""

    source = "upper bound"

    def __init__(self, ours: ClosedForm | FromSidecar) -> None:
        self._ours = ours
        self.name = f"oracle of {ours.name}"

    def choose(self, site: Site, density: float) -> Choice:
        """Rank by true mass, head by head."""
        plan = self._ours.plan(site, density)
        keeps = {}
        for shape, heads in plan.groups().items():
            kept = torch.stack([budget(site, shape, plan.density[head]) for head in heads])
            mass = site.mass(shape, heads)
            own = torch.eye(mass.shape[-1], dtype=torch.bool)
            keeps[shape] = top(mass.masked_fill(own, torch.inf), kept)
        return tiled(site, keeps, plan.tile_shapes)
