"""From measured curves to what every head takes: a tile shape with a density, or a static mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .allocation import allocate
from .keep_maps import LADDER
from .kernels.plan import TileShape, padding
from .kernels.static_modes import StaticMode
from .layer_study import LayerStudy
from .shape_curves import KINDS, SEARCHED_KIND

POLICIES = ("mixed", "scored", "static")
"""mixed: scored heads and static modes, whichever errs less for its cost. scored: no static modes.
static: static modes alone, a pure Sparse-vDiT plan."""


@dataclass(frozen=True)
class HeadChoice:
    """What one head takes, and the relative squared error it was measured with (split "fit")."""

    shape: TileShape
    density: float
    mode: StaticMode | None
    error: float


@dataclass(frozen=True)
class LayerChoice:
    """What the heads of one layer take. weights: (H,) each head's share of the layer's output."""

    heads: tuple[HeadChoice, ...]
    weights: tuple[float, ...]

    @property
    def shapes(self) -> tuple[TileShape, ...]:
        """Per head."""
        return tuple(head.shape for head in self.heads)


@dataclass(frozen=True)
class _Option:
    shape: TileShape
    density: float
    mode: StaticMode | None
    error: float
    group: int


def choose_heads(
    studies: Mapping[str, LayerStudy],
    density: float,
    policy: str,
    shapes: Mapping[str, tuple[TileShape, ...]] | None = None,
    kind: str = "closed_form",
) -> dict[str, LayerChoice]:
    """Spend the mean density over all heads of all layers where it lowers the output error most.

    studies: by layer, all of one grid. policy: one of `POLICIES`. shapes: per layer and head, where
    they are settled; else every shape measured is an option. kind: the score whose curves count.
    The error of a head weighs as much as the head has of its layer's output energy, and layers
    weigh alike. The mean is never above `density`, unless no option is that cheap.
    """
    places, costs, errors, groups, options = [], [], [], [], []
    weights = {name: head_weights(study) for name, study in studies.items()}
    for name, study in studies.items():
        for head in range(study.heads):
            only = None if shapes is None else shapes[name][head]
            found = _options(study, head, policy, only, kind)
            places.append((name, head))
            options.append(found)
            costs.append([option.density for option in found])
            errors.append([option.error * float(weights[name][head]) for option in found])
            groups.append([option.group for option in found])
    chosen = allocate(costs, errors, density, groups)
    heads: dict[str, list[HeadChoice]] = {name: [] for name in studies}
    for (name, _), found, choice in zip(places, options, chosen, strict=True):
        low, high = found[choice.index], found[choice.toward]
        share = choice.share
        heads[name].append(
            HeadChoice(
                low.shape,
                low.density + share * (high.density - low.density),
                low.mode,
                low.error + share * (high.error - low.error),
            )
        )
    return {
        name: LayerChoice(tuple(found), tuple(weights[name].tolist()))
        for name, found in heads.items()
    }


def head_weights(study: LayerStudy) -> Tensor:
    """(H,) each head's share of the energy of the layer's output, adding up to 1."""
    place = KINDS.index(SEARCHED_KIND)
    energy = torch.stack([curve.energy[:, place].sum(0) for curve in study.curves.values()]).sum(0)
    queries = torch.stack([curve.queries.sum(0) for curve in study.curves.values()]).sum(0)
    energy = energy / queries.clamp(min=1)
    return energy / energy.sum().clamp(min=1e-30)


def _options(
    study: LayerStudy, head: int, policy: str, only: TileShape | None, kind: str
) -> list[_Option]:
    found = []
    for place, (shape, curve) in enumerate(study.curves.items()):
        if only is not None and shape != only:
            continue
        if policy != "static":
            for density, error in zip(
                LADDER, curve.relative("fit", kind)[head].tolist(), strict=True
            ):
                found.append(_Option(shape, density, None, error, place))
        if policy != "scored":
            # a shape that pads has more tiles, so that a share of its pairs is more work
            padded = padding(study.layout, shape) ** 2
            static = curve.static_relative("fit")[head].tolist()
            for mode, error in zip(curve.modes(head), static, strict=True):
                if mode is not None:
                    group = -1 - len(found)  # between modes there is nothing
                    found.append(_Option(shape, mode[1] * padded, mode[0], error, group))
            if policy == "static":
                found.append(_Option(shape, 1.0, StaticMode("full"), 0.0, -1 - len(found)))
    return found
