"""Plans that differ from what distillation makes in one part each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.quality.rule import Choice, Site, by_plan
from veda_compile.distilled_plan import LayerChoice, choose_heads
from veda_compile.distilled_sidecar import distilled_sidecar
from veda_compile.distiller import Distiller
from veda_compile.kernels.plan import Plan, TileShape, least_padding_shape
from veda_compile.kernels.static_modes import mode_density
from veda_compile.layer_study import FACTOR_RANK
from veda_compile.sidecar import Sidecar
from veda_compile.sidecar_schema import Grid

from .learning import for_density, layout_of
from .uncounted import without_log_sizes

EVERYTHING = "everything"
CLOSED_SCORE = "projections off"
SCORED = "no static modes"
CLOSED_FORM = "closed form, one shape"

_LEAST = 1e-3
"""A density must be above 0, that of a static head without tiles too."""


@dataclass(frozen=True, eq=False)
class Variant:
    """A way to choose tiles at one mean density.

    part: what it does without, or has in another way. plans: by layer. against: the name of the
    variant it is compared with. counts_rows: whether scores have the term log S_j.
    """

    name: str
    part: str
    density: float
    plans: tuple[Plan, ...]
    against: str = EVERYTHING
    counts_rows: bool = True

    def choose(self, site: Site) -> Choice:
        """The tiles of a site."""
        plan = self.plans[site.layer]
        return by_plan(site, plan) if self.counts_rows else without_log_sizes(site, plan)


def sidecar_of(learned: Distiller, model_class: str) -> Sidecar:
    """What the job would have written. Raises DistillError."""
    return distilled_sidecar(learned, model_class, {})


def plans_on(sidecar: Sidecar, grid: Grid, density: float) -> tuple[Plan, ...]:
    """The plan of every layer as the backend has it, of the nearest grid if need be.

    Raises SidecarError where static heads forbid the density.
    """
    names = [card.name for card in sidecar.model.layers]
    return tuple(sidecar.plan_for(name, grid, density=density)[0] for name in names)


def plain_plans(heads: Sequence[int], grid: Grid, size: int, density: float) -> tuple[Plan, ...]:
    """What the backend keeps without a sidecar; heads: of every layer."""
    shape = least_padding_shape(layout_of(grid), size)
    return tuple(Plan.uniform(count, shape, density) for count in heads)


def all_variants(given: Distiller, model_class: str, grid: Grid, density: float) -> list[Variant]:
    """Everything, and without each of its parts, on the grid that was learned on."""
    learned = for_density(given, density)
    sidecar = sidecar_of(learned, model_class)
    cards = sidecar.model.layers
    whole = tuple(sidecar.plan_for(card.name, grid)[0] for card in cards)
    made = [Variant(EVERYTHING, "-", density, whole)]

    def add(name: str, part: str, plans: Sequence[Plan], against: str = EVERYTHING) -> None:
        made.append(Variant(name, part, density, tuple(plans), against))

    def planned(choices: Mapping[str, LayerChoice], score: str = "closed_form") -> list[Plan]:
        return [_plan(choices[card.name], score) for card in cards]

    one = planned(_one_shape(learned, grid))
    add("one tile shape", "head-aware shapes", _with_projections(one, whole))
    off = [replace(plan, score="closed_form", projection=None) for plan in whole]
    add(CLOSED_SCORE, "trained projections", off)
    mean = _choices(learned, grid, kind="mean", shapes=learned.shapes.get(grid))
    # this score has no projections
    add("mean score", "second-order term", planned(mean, "mean"), CLOSED_SCORE)
    studies = [learned.studies[card.name, grid] for card in cards]
    ranks = [min(FACTOR_RANK, card.head_dim) for card in cards]
    factors = [s.moments.factors(r) for s, r in zip(studies, ranks, strict=True)]
    add(
        f"factors of rank {FACTOR_RANK}", "full second-order term",
        [replace(plan, factors=each) for plan, each in zip(whole, factors, strict=True)],
    )  # fmt: skip
    if all(card.name in learned.trainers for card in cards):
        weights = [learned.trainers[card.name].weights.detach().float().cpu() for card in cards]
        on = [
            replace(plan, score="projection", projection=each)
            for plan, each in zip(whole, weights, strict=True)
        ]
        add("projections in all heads", "projections only where they won", on)
    add("one density, scored heads", "allocated densities", _even(whole, grid, density))
    # without static modes, or with nothing else, other shapes may be best
    scored = _with_projections(planned(_choices(learned, grid, policy="scored")), whole)
    add(SCORED, "static modes", scored)
    even = [replace(plan, density=(density,) * plan.heads) for plan in scored]
    add(f"{SCORED}, one density", "allocated densities", even, SCORED)
    add("static modes alone", "scores", planned(_choices(learned, grid, policy="static")))
    size = sidecar.tile_size
    add(CLOSED_FORM, "distillation", plain_plans([c.heads for c in cards], grid, size, density))
    return made


def ragged_variants(
    given: Distiller, model_class: str, grid: Grid, density: float
) -> list[Variant]:
    """With log S_j and without, on a grid that no shape divides: borders hold ragged tiles."""
    sidecar = sidecar_of(for_density(given, density), model_class)
    heads = [card.heads for card in sidecar.model.layers]
    made = []
    for name, plans in (
        (EVERYTHING, plans_on(sidecar, grid, density)),
        (CLOSED_FORM, plain_plans(heads, grid, sidecar.tile_size, density)),
    ):
        made.append(Variant(name, "-", density, plans, name))
        made.append(Variant(f"{name}, no log S", "log S_j", density, plans, name, False))
    return made


def _choices(
    learned: Distiller,
    grid: Grid,
    policy: str = "mixed",
    kind: str = "closed_form",
    shapes: Mapping[str, tuple[TileShape, ...]] | None = None,
) -> dict[str, LayerChoice]:
    """What a job under other terms would have chosen from the same measurements.

    shapes: those that the job settled on; None is every shape it measured.
    """
    studies = {name: study for (name, of), study in learned.studies.items() if of == grid}
    return choose_heads(studies, learned.options.density, policy, shapes, kind)


def _one_shape(learned: Distiller, grid: Grid) -> dict[str, LayerChoice]:
    """All heads under the shape that errs least in sum, among those measured in every layer."""
    studies = [study for (_, of), study in learned.studies.items() if of == grid]
    common = [s for s in studies[0].curves if all(s in study.curves for study in studies)]
    tried = []
    for shape in common:
        shapes = {name: (shape,) * card.heads for name, card in learned.layers.items()}
        tried.append(_choices(learned, grid, shapes=shapes))
    return min(tried, key=_error)


def _error(choices: Mapping[str, LayerChoice]) -> float:
    return sum(
        head.error * weight
        for choice in choices.values()
        for head, weight in zip(choice.heads, choice.weights, strict=True)
    )


def _plan(choice: LayerChoice, score: str = "closed_form") -> Plan:
    return Plan(
        choice.shapes,
        tuple(max(head.density, _LEAST) for head in choice.heads),
        score,
        modes=tuple(head.mode for head in choice.heads),
    )


def _with_projections(plans: Sequence[Plan], whole: Sequence[Plan]) -> list[Plan]:
    """The projections of `whole` in the heads that keep the shape they were trained under."""
    made = []
    for plan, known in zip(plans, whole, strict=True):
        if known.projection is not None:
            same = [a == b for a, b in zip(plan.tile_shapes, known.tile_shapes, strict=True)]
            kept = known.projection * torch.tensor(same)[:, None, None]
            plan = replace(plan, score="projection", projection=kept)
        made.append(plan)
    return made


def _even(whole: Sequence[Plan], grid: Grid, density: float) -> list[Plan]:
    """One density for all scored heads of all layers, static heads as they are."""
    layout = layout_of(grid)
    static = [
        mode_density(layout, plan.tile_shapes[head], mode)
        for plan in whole
        for head in range(plan.heads)
        if (mode := plan.mode(head)) is not None
    ]
    heads = sum(plan.heads for plan in whole)
    scored = max(heads - len(static), 1)
    rest = min(max((density * heads - sum(static)) / scored, _LEAST), 1.0)
    return [replace(plan, density=(rest,) * plan.heads) for plan in whole]
