"""The sidecar that a distillation comes to, and how good it is on what it did not learn from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .distilled_plan import LayerChoice
from .distiller import Distiller
from .errors import DistillError
from .keep_maps import LADDER
from .layer_study import LayerStudy
from .sidecar import Sidecar
from .sidecar_schema import Grid, GridPlan, ModelCard

LEAST_DENSITY = 1e-3
"""What a static head that keeps no tile is filed with: a density must be above 0."""


def distilled_sidecar(
    learned: Distiller, model_class: str, provenance: Mapping[str, Any]
) -> Sidecar:
    """What has been learned so far as a sidecar. Raises DistillError where that is not enough.

    provenance: taken over; "held_out" and "grids" are added: see `held_out_figures`.
    """
    layers = tuple(learned.layers.values())
    plans, figures = [], {}
    for grid in learned.grids():
        if any((card.name, grid) not in learned.studies for card in layers):
            continue  # stopped in the middle of the first measured call on it
        choices = learned.choices(grid)
        plans.append(
            GridPlan(
                grid,
                tuple(choices[card.name].shapes for card in layers),
                tuple(
                    tuple(max(h.density, LEAST_DENSITY) for h in choices[card.name].heads)
                    for card in layers
                ),
                tuple(tuple(h.mode for h in choices[card.name].heads) for card in layers),
            )
        )
        figures["x".join(map(str, grid))] = held_out_figures(learned, grid, choices)
    if not plans:
        raise DistillError(
            f"{learned.measured} calls of the model were measured, and no grid in all layers: run "
            "the pipeline longer inside the distillation"
        )
    projections = kept_projections(learned)
    return Sidecar(
        ModelCard(model_class, layers),
        tuple(plans),
        "projection" if projections else "closed_form",
        next(iter(learned.studies.values())).tile_size,
        {**provenance, "held_out": figures},
        projections,
    )


def kept_projections(learned: Distiller) -> tuple[Tensor, ...]:
    """Per layer (2, H, 3D, D) float32 on CPU; () where no head is better off with a trained score.

    A head keeps its projection only if on the calls set apart, at the head's density, it retains
    more mass than the closed form does and errs no more; else it is zero, the closed form.
    """
    found, any_kept = [], False
    for name, card in learned.layers.items():
        trainer = learned.trainers.get(name)
        weights = torch.zeros((2, card.heads, 3 * card.head_dim, card.head_dim), device="cpu")
        if trainer is not None:
            better = torch.stack(
                [
                    _better(study, learned.choices(grid)[name])
                    for (of, grid), study in learned.studies.items()
                    if of == name
                ]
            ).all(0)  # NaN, nothing set apart, is never better
            weights[:, better] = trainer.weights.detach().float().cpu()[:, better]
            any_kept = any_kept or bool(better.any())
        found.append(weights)
    return tuple(found) if any_kept else ()


def held_out_figures(
    learned: Distiller, grid: Grid, choices: Mapping[str, LayerChoice]
) -> dict[str, Any]:
    """Errors of the chosen plan on the calls set apart, or on those learned from if there are none.

    error: relative squared error of a layer's attention output, mean over layers. uniform: with one
    density for all heads. oracle: with the chosen shapes and densities, by true mass.
    retained_mass: of the oracle's, mean over heads. The score is the closed form but for "trained".
    """
    studies = {name: study for (name, of), study in learned.studies.items() if of == grid}
    split = "held_out"
    if any(_missing(study, choices[name], split) for name, study in studies.items()):
        split = "fit"
    mean = sum(h.density for c in choices.values() for h in c.heads)
    mean /= sum(len(c.heads) for c in choices.values())

    def error(kind: str, density: float | None = None) -> float | None:
        total = 0.0
        for name, study in studies.items():
            for head, (choice, weight) in enumerate(
                zip(choices[name].heads, choices[name].weights, strict=True)
            ):
                curve = study.curves[choice.shape]
                if choice.mode is not None and choice.mode.kind == "full" and density is None:
                    continue  # it errs nowhere
                if choice.mode is not None and density is None:
                    modes = curve.modes(head)
                    place = next(i for i, m in enumerate(modes) if _same_kind(m, choice.mode))
                    found = float(curve.static_relative(split)[head, place])
                else:
                    at = choice.density if density is None else density
                    found = float(at_density(curve.relative(split, kind)[head], at))
                total += weight * found
        return None if total != total else round(total / len(studies), 6)

    retained = [_retained(study, choices[name], "closed_form") for name, study in studies.items()]
    return {
        "calls": "set apart" if split == "held_out" else "learned from",
        "density": round(mean, 6),
        "error": error("closed_form"),
        "uniform": error("closed_form", mean),
        "oracle": error("oracle"),
        "trained": error("projection"),
        "retained_mass": _rounded(torch.cat(retained).nanmean()),
    }


def at_density(curve: Tensor, density: float) -> Tensor:
    """A curve (..., K) over `LADDER` at any density, by straight lines between its points."""
    ladder = curve.new_tensor(LADDER)
    high = int((ladder < density - 1e-12).sum().clamp(max=len(LADDER) - 1))
    if high == 0:
        return curve[..., 0]
    share = (density - LADDER[high - 1]) / (LADDER[high] - LADDER[high - 1])
    return curve[..., high - 1] + share * (curve[..., high] - curve[..., high - 1])


def _retained(study: LayerStudy, choice: LayerChoice, kind: str) -> Tensor:
    """(H,) mass retained on the calls set apart, each head at its shape and density."""
    return torch.stack(
        [
            at_density(study.curves[h.shape].retained("held_out", kind)[head], h.density)
            for head, h in enumerate(choice.heads)
        ]
    )


def _better(study: LayerStudy, choice: LayerChoice) -> Tensor:
    """(H,) whether the trained score of a head beats the closed form on the calls set apart."""
    error = {
        kind: torch.stack(
            [
                at_density(study.curves[h.shape].relative("held_out", kind)[head], h.density)
                for head, h in enumerate(choice.heads)
            ]
        )
        for kind in ("projection", "closed_form")
    }
    scored = torch.tensor([head.mode is None for head in choice.heads], device="cpu")
    mass = _retained(study, choice, "projection") > _retained(study, choice, "closed_form")
    return scored & mass & (error["projection"] <= error["closed_form"])


def _missing(study: LayerStudy, choice: LayerChoice, split: str) -> bool:
    return any(
        bool(study.curves[chosen.shape].relative(split, "closed_form")[head].isnan().any())
        for head, chosen in enumerate(choice.heads)
    )


def _same_kind(offered: object, mode: object) -> bool:
    return isinstance(offered, tuple) and offered[0] == mode


def _rounded(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else round(float(value), 6)
