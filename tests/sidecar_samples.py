"""Small sidecars for tests, and ways to write files that are wrong in one place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from veda_compile.sidecar import GridPlan, LayerCard, ModelCard, Sidecar

GRID = (5, 16, 24)
WIDE = (5, 8, 48)
FIRST = "blocks.0.attn1"


def layer_cards(count: int = 2, heads: int = 3, head_dim: int = 8) -> tuple[LayerCard, ...]:
    return tuple(
        LayerCard(f"blocks.{i}.attn1", heads, head_dim, f"{i + 1:032x}") for i in range(count)
    )


def small_sidecar(score: str = "closed_form") -> Sidecar:
    """Two layers of three heads, two grids, other shapes and densities everywhere."""
    cards = layer_cards()
    plans = (
        GridPlan(
            GRID,
            (((2, 8, 8), (1, 8, 16), (8, 4, 4)), ((4, 4, 8), (4, 4, 8), (128, 1, 1))),
            ((0.1, 0.2, 0.3), (0.4, 0.05, 0.15)),
        ),
        GridPlan(
            WIDE,
            (((1, 2, 64), (1, 8, 16), (8, 4, 4)), ((4, 4, 8), (4, 4, 8), (128, 1, 1))),
            ((0.1, 0.2, 0.3), (1.0, 0.5, 0.25)),
        ),
    )
    projections: tuple[torch.Tensor, ...] = ()
    if score == "projection":
        generator = torch.Generator().manual_seed(0)
        projections = tuple(torch.randn(2, 3, 24, 8, generator=generator) for _ in cards)
    model = ModelCard("WanTransformer3DModel", cards)
    provenance = {"seed": 7, "versions": {"torch": "2.13.0"}, "grids": [[5, 16, 24]]}
    return Sidecar(model, plans, score, 128, provenance, projections)


def file_parts(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The JSON document and the tensors of a sidecar file, free to be changed."""
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["veda"]), tensors


def write_parts(path: Path, document: Any, tensors: dict[str, torch.Tensor]) -> None:
    """A file with any document (text is written as it is) and any tensors."""
    text = document if isinstance(document, str) else json.dumps(document)
    save_file(tensors, path, metadata={"veda": text})
