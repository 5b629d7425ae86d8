"""The JSON document and the tensors of a sidecar file, to and from the parts in memory.

{"version": 2, "model": {"class": ..., "layers": [{"name", "heads", "head_dim",
 "fingerprint", "static", "columns", "rank"}, ...]}, "grids": [[T, H, W], ...], "score": ...,
 "tile_size": ..., "provenance": {...}}

"<layer>/tile_shapes"  (grids, heads, 3) int32
"<layer>/density"      (grids, heads) float64
"<layer>/modes"        (grids, heads, 3) int32, where "static" is true: see `encode_modes`
"<layer>/columns"      (grids, heads, columns, 3) float32, where "columns" is above 0
"<layer>/factors"      (2, heads, head_dim, rank) float32, where "rank" is above 0
"<layer>/projection"   (2, heads, 3 * head_dim, head_dim) float32, with score "projection"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import SidecarError, shown, suggestion
from .kernels.errors import PlanError
from .kernels.static_modes import Modes, decode_modes, encode_modes
from .sidecar_file import TensorSpec
from .sidecar_schema import (
    SIDECAR_SCORES,
    VERSION,
    Grid,
    GridPlan,
    LayerCard,
    LayerExtent,
    ModelCard,
    check_extents,
    check_totals,
    checked_grid,
    projection_shape,
)
from .sidecar_weights import Factors

_DOCUMENT_KEYS = ("version", "model", "grids", "score", "tile_size", "provenance")
_MODEL_KEYS = ("class", "layers")
_CARD_KEYS = ("name", "heads", "head_dim", "fingerprint")
_EXTENT_KEYS = ("static", "columns", "rank")


@dataclass(frozen=True)
class Header:
    """The JSON document of a sidecar, checked far enough to know which tensors must follow.

    extents: per layer, what of the tensors that not every layer has follows.
    """

    model: ModelCard
    extents: tuple[LayerExtent, ...]
    grids: tuple[Grid, ...]
    score: str
    tile_size: Any
    provenance: Any

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Header:
        """Raises SidecarError on a wrong version, unknown or missing keys, and absurd sizes."""
        version = document.get("version")
        if "version" in document and (version != VERSION or isinstance(version, bool)):
            raise SidecarError(
                f"version is {shown(version)}: this release reads version {VERSION}, use a "
                "release that knows it or make the sidecar again"
            )
        _exactly(document, _DOCUMENT_KEYS, "the document")
        model = _exactly(document["model"], _MODEL_KEYS, "model")
        layers = [
            _exactly(layer, _CARD_KEYS + _EXTENT_KEYS, f"model.layers[{i}]")
            for i, layer in enumerate(_list(model["layers"], "model.layers"))
        ]
        cards = tuple(LayerCard(**{key: layer[key] for key in _CARD_KEYS}) for layer in layers)
        extents = tuple(
            LayerExtent(**{key: layer[key] for key in _EXTENT_KEYS}) for layer in layers
        )
        for layer_card, extent in zip(cards, extents, strict=True):
            extent.check(layer_card)
        card = ModelCard(model["class"], cards)
        grids = tuple(
            checked_grid(tuple(_list(grid, f"grids[{i}]")), f"grids[{i}]")
            for i, grid in enumerate(_list(document["grids"], "grids"))
        )
        score = checked_score(document["score"])
        check_totals(card, len(grids), score)
        check_extents(card, len(grids), extents)
        return cls(card, extents, grids, score, document["tile_size"], document["provenance"])

    def tensor_specs(self) -> dict[str, TensorSpec]:
        """The tensors that must follow, by name."""
        specs: dict[str, TensorSpec] = {}
        for card, extent in zip(self.model.layers, self.extents, strict=True):
            plans = (len(self.grids), card.heads)
            specs[f"{card.name}/tile_shapes"] = ((*plans, 3), torch.int32)
            specs[f"{card.name}/density"] = (plans, torch.float64)
            if extent.static:
                specs[f"{card.name}/modes"] = ((*plans, 3), torch.int32)
            if extent.columns:
                specs[f"{card.name}/columns"] = ((*plans, extent.columns, 3), torch.float32)
            if extent.rank:
                shape = (2, card.heads, card.head_dim, extent.rank)
                specs[f"{card.name}/factors"] = (shape, torch.float32)
            if self.score == "projection":
                specs[f"{card.name}/projection"] = (projection_shape(card), torch.float32)
        return specs

    def grid_plans(self, tensors: Mapping[str, torch.Tensor]) -> tuple[GridPlan, ...]:
        """One plan per grid, from tensors that follow `tensor_specs`."""
        shapes = [tensors[f"{card.name}/tile_shapes"].tolist() for card in self.model.layers]
        density = [tensors[f"{card.name}/density"].tolist() for card in self.model.layers]
        return tuple(
            GridPlan(
                grid,
                tuple(tuple(tuple(shape) for shape in layer[i]) for layer in shapes),
                tuple(tuple(layer[i]) for layer in density),
                tuple(_modes(card.name, tensors, grid, i) for card in self.model.layers),
            )
            for i, grid in enumerate(self.grids)
        )

    def factors(self, tensors: Mapping[str, torch.Tensor]) -> Factors:
        """Per layer its factors or None; () where no layer has any."""
        found = tuple(tensors.get(f"{card.name}/factors") for card in self.model.layers)
        return found if any(tensor is not None for tensor in found) else ()

    def projections(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """One projection tensor per layer, or none at all."""
        if self.score != "projection":
            return ()
        return tuple(tensors[f"{card.name}/projection"] for card in self.model.layers)


def document_of(
    model: ModelCard,
    plans: Sequence[GridPlan],
    factors: Factors,
    score: str,
    tile_size: int,
    provenance: Any,
) -> dict[str, Any]:
    """The JSON document; inverse of `Header.parse`."""
    extents = _extents(model, plans, factors)
    check_extents(model, len(plans), extents)
    layers = [
        {key: getattr(card, key) for key in _CARD_KEYS}
        | {key: getattr(extent, key) for key in _EXTENT_KEYS}
        for card, extent in zip(model.layers, extents, strict=True)
    ]
    return {
        "version": VERSION,
        "model": {"class": model.model_class, "layers": layers},
        "grids": [list(plan.grid) for plan in plans],
        "score": score,
        "tile_size": tile_size,
        "provenance": provenance,
    }


def tensors_of(
    model: ModelCard,
    plans: Sequence[GridPlan],
    projections: Sequence[torch.Tensor],
    factors: Factors,
) -> dict[str, torch.Tensor]:
    """The tensors of the file; inverse of what `Header` makes of them."""
    tensors: dict[str, torch.Tensor] = {}
    extents = _extents(model, plans, factors)
    for index, (card, extent) in enumerate(zip(model.layers, extents, strict=True)):
        tensors[f"{card.name}/tile_shapes"] = torch.tensor(
            [plan.tile_shapes[index] for plan in plans], dtype=torch.int32
        )
        tensors[f"{card.name}/density"] = torch.tensor(
            [plan.density[index] for plan in plans], dtype=torch.float64
        )
        if extent.static:
            scored = (None,) * card.heads
            coded = [encode_modes(p.modes_of(index) or scored, extent.columns) for p in plans]
            for name, tables in zip(("modes", "columns"), zip(*coded, strict=True), strict=True):
                if tables[0] is not None:
                    tensors[f"{card.name}/{name}"] = torch.stack(tables)
        # Copies: safetensors refuses tensors that share memory, and views of one are common.
        for name, weights in (("projection", projections), ("factors", factors)):
            tensor = weights[index] if weights else None
            if tensor is not None:
                tensors[f"{card.name}/{name}"] = tensor.clone(memory_format=torch.contiguous_format)
    return tensors


def _extents(
    model: ModelCard, plans: Sequence[GridPlan], factors: Factors
) -> tuple[LayerExtent, ...]:
    found = []
    for index in range(len(model.layers)):
        modes = [mode for plan in plans for mode in plan.modes_of(index) or () if mode is not None]
        weights = factors[index] if factors else None
        columns = max((len(mode.columns) for mode in modes), default=0)
        found.append(LayerExtent(bool(modes), columns, 0 if weights is None else weights.shape[3]))
    return tuple(found)


def _modes(layer: str, tensors: Mapping[str, torch.Tensor], grid: Grid, place: int) -> Modes | None:
    """The static modes of one layer on the grid at `place`, None where the file has none."""
    modes, columns = tensors.get(f"{layer}/modes"), tensors.get(f"{layer}/columns")
    if modes is None:
        return None
    try:
        return decode_modes(modes[place], None if columns is None else columns[place])
    except PlanError as error:
        raise SidecarError(f"modes of layer {layer} on grid {grid}: {error}") from error


def checked_score(value: object) -> str:
    """`value` if it is one of `SIDECAR_SCORES`, else SidecarError."""
    if not isinstance(value, str) or value not in SIDECAR_SCORES:
        raise SidecarError(f"score is {shown(value)}: must be one of {', '.join(SIDECAR_SCORES)}")
    return value


def _exactly(value: object, keys: Sequence[str], where: str) -> dict[str, Any]:
    """`value` if it is an object with exactly these keys, else SidecarError."""
    if not isinstance(value, dict):
        raise SidecarError(f"{where} is {shown(value)}: must be an object with {', '.join(keys)}")
    for key in value:
        if key not in keys:
            raise SidecarError(
                f"{where} has the unknown key {shown(key)}{suggestion(key, keys)}: must have "
                f"exactly {', '.join(keys)}"
            )
    for key in keys:
        if key not in value:
            raise SidecarError(f"{where} lacks the key {key!r}: make the sidecar again")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise SidecarError(f"{where} is {shown(value)}: must be a list")
    return value
