"""The JSON document and the tensors of a sidecar file, to and from the parts in memory.

{"version": 1, "model": {"class": ..., "layers": [{"name", "heads", "head_dim",
 "fingerprint"}, ...]}, "grids": [[T, H, W], ...], "score": ..., "tile_size": ...,
 "provenance": {...}}

"<layer>/tile_shapes"  (grids, heads, 3) int32
"<layer>/density"      (grids, heads) float64
"<layer>/projection"   (2, heads, 3 * head_dim, head_dim) float32, with score "projection"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import SidecarError, shown, suggestion
from .sidecar_file import TensorSpec
from .sidecar_schema import (
    SIDECAR_SCORES,
    VERSION,
    Grid,
    GridPlan,
    LayerCard,
    ModelCard,
    check_totals,
    checked_grid,
    projection_shape,
)

_DOCUMENT_KEYS = ("version", "model", "grids", "score", "tile_size", "provenance")
_MODEL_KEYS = ("class", "layers")
_LAYER_KEYS = ("name", "heads", "head_dim", "fingerprint")


@dataclass(frozen=True)
class Header:
    """The JSON document of a sidecar, checked far enough to know which tensors must follow."""

    model: ModelCard
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
        layers = tuple(
            LayerCard(**_exactly(layer, _LAYER_KEYS, f"model.layers[{i}]"))
            for i, layer in enumerate(_list(model["layers"], "model.layers"))
        )
        card = ModelCard(model["class"], layers)
        grids = tuple(
            checked_grid(tuple(_list(grid, f"grids[{i}]")), f"grids[{i}]")
            for i, grid in enumerate(_list(document["grids"], "grids"))
        )
        score = checked_score(document["score"])
        check_totals(card, len(grids), score)
        return cls(card, grids, score, document["tile_size"], document["provenance"])

    def tensor_specs(self) -> dict[str, TensorSpec]:
        """The tensors that must follow, by name."""
        specs: dict[str, TensorSpec] = {}
        for card in self.model.layers:
            plans = (len(self.grids), card.heads)
            specs[f"{card.name}/tile_shapes"] = ((*plans, 3), torch.int32)
            specs[f"{card.name}/density"] = (plans, torch.float64)
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
            )
            for i, grid in enumerate(self.grids)
        )

    def projections(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """One projection tensor per layer, or none at all."""
        if self.score != "projection":
            return ()
        return tuple(tensors[f"{card.name}/projection"] for card in self.model.layers)


def document_of(
    model: ModelCard, plans: Sequence[GridPlan], score: str, tile_size: int, provenance: Any
) -> dict[str, Any]:
    """The JSON document; inverse of `Header.parse`."""
    layers = [{key: getattr(card, key) for key in _LAYER_KEYS} for card in model.layers]
    return {
        "version": VERSION,
        "model": {"class": model.model_class, "layers": layers},
        "grids": [list(plan.grid) for plan in plans],
        "score": score,
        "tile_size": tile_size,
        "provenance": provenance,
    }


def tensors_of(
    model: ModelCard, plans: Sequence[GridPlan], projections: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of the file; inverse of `Header.grid_plans` and `Header.projections`."""
    tensors: dict[str, torch.Tensor] = {}
    for index, card in enumerate(model.layers):
        tensors[f"{card.name}/tile_shapes"] = torch.tensor(
            [plan.tile_shapes[index] for plan in plans], dtype=torch.int32
        )
        tensors[f"{card.name}/density"] = torch.tensor(
            [plan.density[index] for plan in plans], dtype=torch.float64
        )
        if projections:
            # A copy: safetensors refuses tensors that share memory, and views of one are common.
            tensors[f"{card.name}/projection"] = projections[index].clone(
                memory_format=torch.contiguous_format
            )
    return tensors


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
