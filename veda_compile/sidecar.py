"""Sidecars: what calibration found for one model, kept in a `*.veda.safetensors` file beside it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from .errors import SidecarError, shown, suggestion
from .kernels.plan import Plan, TileShape
from .options import DEFAULT_DENSITY, TILE_SIZES
from .sidecar_document import Header, checked_score, document_of, tensors_of
from .sidecar_file import open_sidecar, write_sidecar
from .sidecar_lookup import GridMatch, fitted_plan, nearest_grid, scored_factor
from .sidecar_schema import (
    Grid,
    GridPlan,
    LayerCard,
    ModelCard,
    check_totals,
    checked_density,
    checked_grid,
    plain_json,
)
from .sidecar_weights import Factors, check_factors, check_projections, common_rank, same_weights

__all__ = ["Grid", "GridMatch", "GridPlan", "LayerCard", "ModelCard", "Sidecar"]

_IN_MEMORY = "(in memory)"


@dataclass(frozen=True, eq=False)
class Sidecar:
    """The plans of every attention layer of one model, on one or more token grids.

    model: which model it is for. plans: one `GridPlan` per grid, no grid twice.
    score: "closed_form", "mean" or "projection". tile_size: tokens per tile, 64 or 128.
    provenance: how it was made, plain JSON data (versions, seeds, prompts, grids).
    projections: with score "projection" one (2, heads, 3 * head_dim, head_dim) float32 tensor on
        CPU per layer, as `Plan` takes it; else empty.
    factors: per layer (2, heads, head_dim, r) float32 on CPU, as `Plan` takes it, or None; empty
        where no layer has any. Not with score "mean".
    source: the file it came from; messages name it.

    A sidecar that exists is valid: making one checks everything and raises SidecarError.
    """

    model: ModelCard
    plans: tuple[GridPlan, ...]
    score: str
    tile_size: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    projections: tuple[torch.Tensor, ...] = ()
    factors: Factors = ()
    source: str = _IN_MEMORY

    def __post_init__(self) -> None:
        if not isinstance(self.provenance, dict):
            raise SidecarError(f"provenance is {shown(self.provenance)}: must be a dict")
        object.__setattr__(self, "provenance", plain_json(self.provenance, "provenance"))
        self.validate()

    @classmethod
    def uniform(
        cls,
        model_class: str,
        layers: Sequence[LayerCard],
        grid: Grid,
        tile_shape: TileShape | Sequence[TileShape],
        density: float | Sequence[float] = DEFAULT_DENSITY,
        score: str = "closed_form",
        provenance: Mapping[str, Any] | None = None,
    ) -> Sidecar:
        """The same for every layer: one tile shape and density, or a sequence with one per head.

        The tile size is the product of the (first) tile shape. Raises SidecarError.
        """
        cards = tuple(layers)
        shapes = (tile_shape,) if isinstance(tile_shape[0], int) else tuple(tile_shape)
        per_head = tuple(checked_grid(shape, "tile_shape") for shape in shapes)
        budgets = (density,) if isinstance(density, float | int) else tuple(density)
        plan = GridPlan(
            grid,
            tuple(per_head * card.heads if len(per_head) == 1 else per_head for card in cards),
            tuple(budgets * card.heads if len(budgets) == 1 else budgets for card in cards),
        )
        tile_size = math.prod(per_head[0])
        model = ModelCard(model_class, cards)
        return cls(model, (plan,), score, tile_size, dict(provenance or {}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sidecar:
        """Read a sidecar. Raises SidecarError on anything but a complete, valid file."""
        with open_sidecar(path) as file:
            header = Header.parse(file.document)
            tensors = file.read(header.tensor_specs())
            return cls(
                header.model,
                header.grid_plans(tensors),
                header.score,
                header.tile_size,
                header.provenance,
                header.projections(tensors),
                header.factors(tensors),
                os.fspath(path),
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to `path`, whose name must end in ".veda.safetensors", all of it or nothing.

        An existing file is replaced in one step once the new one is on disk. Raises SidecarError.
        """
        self.validate()  # provenance and projections can be changed in place
        write_sidecar(
            path,
            document_of(
                self.model,
                self.plans,
                self.factors,
                self.score,
                self.tile_size,
                dict(self.provenance),
            ),
            tensors_of(self.model, self.plans, self.projections, self.factors),
        )

    def validate(self) -> None:
        """Raise SidecarError, naming the value and the remedy, if anything is not as it must be."""
        if not isinstance(self.model, ModelCard):
            raise SidecarError(f"model is {shown(self.model)}: must be a ModelCard")
        if self.tile_size not in TILE_SIZES or isinstance(self.tile_size, float):
            raise SidecarError(
                f"tile_size is {shown(self.tile_size)}: must be one of "
                f"{', '.join(map(str, TILE_SIZES))}"
            )
        if not isinstance(self.plans, tuple) or not self.plans:
            raise SidecarError(f"plans is {shown(self.plans)}: must be a tuple of GridPlans")
        check_totals(self.model, len(self.plans), checked_score(self.score))
        self._check_plans()
        check_projections(self.model.layers, self.score, self.projections)
        check_factors(self.model.layers, self.score, self.factors)
        plain_json(self.provenance, "provenance")

    def _check_plans(self) -> None:
        layers, seen = self.model.layers, set()
        for plan in self.plans:
            if not isinstance(plan, GridPlan):
                raise SidecarError(f"a plan is {shown(plan)}: must be a GridPlan")
            if plan.grid in seen:
                raise SidecarError(f"grid {plan.grid} appears twice: keep one of its plans")
            seen.add(plan.grid)
            if len(plan.tile_shapes) != len(layers):
                raise SidecarError(
                    f"grid {plan.grid} has plans for {len(plan.tile_shapes)} layers: the model "
                    f"has {len(layers)}, give one each"
                )
            for index, card in enumerate(layers):
                plan.check_layer(index, card, self.tile_size)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grids that have plans, in order."""
        return tuple(plan.grid for plan in self.plans)

    @cached_property
    def _layer_index(self) -> dict[str, int]:
        return {card.name: index for index, card in enumerate(self.model.layers)}

    def plan_for(
        self,
        layer_name: str,
        grid: Grid,
        *,
        density: float | None = None,
        score: str | None = None,
    ) -> tuple[Plan, GridMatch]:
        """The plan of one layer for a token grid, and which grid's plan it is.

        The exact grid if there is a plan for it, else the nearest (`nearest_grid`), its tiles
        replaced where they do not fit (`fitted_plan`); the caller announces such a match.
        density: the mean density wanted over all heads of all layers. Every scored head's own
            density is multiplied by one factor; heads that reach 1 stop there and the others take
            their rest in proportion, so the mean is met and the ratios between layers and heads
            stay. Static heads stay as they are and count with what they keep, but on another grid
            than their own such that keep too much become scored. 1.0 keeps everything in static
            heads too.
        score: another score than the sidecar's; "projection" only if the sidecar holds it. "mean"
            has no use for factors and leaves them out.
        Raises SidecarError for an unknown layer, for values out of range, and for a density that
        cannot be met because static heads keep more or less.
        """
        index = self._layer_index.get(layer_name)
        if index is None:
            raise SidecarError(
                f"sidecar {self.source} has no layer {shown(layer_name)}"
                f"{suggestion(str(layer_name), self._layer_index)}: it was made for "
                f"{self.model.model_class}, use one made for this model"
            )
        match = nearest_grid(checked_grid(grid, "grid"), self.grids)
        plan = next(plan for plan in self.plans if plan.grid == match.used)
        mean = None if density is None else checked_density(density, "density")
        if not match.exact:
            plan = fitted_plan(plan, grid, mean)
        budgets, modes = plan.density[index], plan.modes_of(index)
        if mean is not None:
            modes = None if mean == 1.0 else modes
            factor = math.inf if mean == 1.0 else scored_factor(plan, grid, mean)
            budgets = tuple(min(1.0, factor * value) for value in budgets)
        score = self.score if score is None else checked_score(score)
        if score == "projection" and not self.projections:
            raise SidecarError(
                f"sidecar {self.source} holds no projections: use its score, {self.score!r}"
            )
        projection = self.projections[index] if score == "projection" else None
        factors = self.factors[index] if self.factors and score != "mean" else None
        return Plan(plan.tile_shapes[index], budgets, score, projection, factors, modes), match

    def layer_by_fingerprint(self, fingerprint: str) -> LayerCard | None:
        """The layer with this fingerprint; None if there is none or more than one."""
        found = [card for card in self.model.layers if card.fingerprint == fingerprint]
        return found[0] if len(found) == 1 else None

    def fingerprints_unique(self) -> bool:
        """Whether every layer has a fingerprint and no two have the same: see `fingerprint`."""
        marks = {card.fingerprint for card in self.model.layers}
        return None not in marks and len(marks) == len(self.model.layers)

    @cached_property
    def layer_independent(self) -> bool:
        """Whether all layers have the same plans, so that a graph need not know its layer."""
        same_plans = all(
            len(set(values)) == 1
            for plan in self.plans
            for values in (plan.tile_shapes, plan.density, plan.modes or (None,))
        )
        return same_plans and same_weights(self.projections) and same_weights(self.factors)

    @cached_property
    def columns(self) -> int | None:
        """The most columns of any stripe; None where no head is static."""
        modes = [m for plan in self.plans for layer in plan.modes or () for m in layer or () if m]
        return max(len(mode.columns) for mode in modes) if modes else None

    def factor_rank(self, head_dim: int) -> int:
        """The rank that factors of all layers of this head_dim can be given; see `common_rank`."""
        return common_rank(self.model.layers, self.factors, head_dim)

    def check_model(
        self,
        layers: Sequence[LayerCard],
        *,
        model_class: str | None = None,
        complete: bool = True,
    ) -> None:
        """Raise SidecarError, naming the first mismatch, unless the sidecar is for this model.

        layers: the attention layers of the compiled model. A fingerprint is compared where both
            sides have one. model_class: its class name, compared if given. complete: whether
            `layers` are all its layers; then the sidecar may know no others.
        """
        remedy = "use a sidecar made for this model"
        made_for = f"sidecar {self.source} was made for {self.model.model_class}"
        if model_class is not None and model_class != self.model.model_class:
            raise SidecarError(f"{made_for}; the compiled model is {model_class}: {remedy}")
        known = {card.name: card for card in self.model.layers}
        for layer in layers:
            card = known.get(layer.name)
            if card is None:
                raise SidecarError(
                    f"{made_for} with {len(known)} layers; the compiled model has a layer "
                    f"{layer.name} that it lacks: {remedy}"
                )
            if (card.heads, card.head_dim) != (layer.heads, layer.head_dim):
                raise SidecarError(
                    f"{made_for}, layer {card.name} with {card.heads} heads of {card.head_dim}; "
                    f"the compiled model has {layer.heads} heads of {layer.head_dim}: {remedy}"
                )
            if None not in (card.fingerprint, layer.fingerprint) and (
                card.fingerprint != layer.fingerprint
            ):
                raise SidecarError(
                    f"{made_for}, layer {card.name} with fingerprint {card.fingerprint}; the "
                    f"compiled model has {layer.fingerprint}, so other weights: {remedy}"
                )
        if complete:
            given = {layer.name for layer in layers}
            for name in known:
                if name not in given:
                    raise SidecarError(
                        f"{made_for}, whose layer {name} the compiled model lacks: {remedy}"
                    )
