"""The state of an unfinished distillation as a file, so that a later run goes on from there.

Measurements and trained weights are kept. What is left out is gathered again soon: the optimiser's
moments, and the lessons that training repeats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .distiller import Distiller
from .errors import DistillError
from .kernels.layout import Layout
from .layer_study import LayerStudy
from .score_training import ScoreTrainer
from .sidecar_file import METADATA_KEY, SUFFIX, write_sidecar
from .sidecar_schema import Grid, LayerCard

VERSION = 2
_CURVES = ("error", "kept", "best", "energy", "static_error", "queries", "columns")
_COUNTERS = ("calls", "measured", "runs", "timesteps", "_studied")


def state_path(out: Path) -> Path:
    """Where the state of a distillation into `out` is kept: beside it."""
    return out.with_name(out.name.removesuffix(SUFFIX) + ".job" + SUFFIX)


def save_state(learned: Distiller, model_class: str, path: Path) -> None:
    """Write all of it or nothing. Raises SidecarError where the place cannot be written."""
    tensors: dict[str, torch.Tensor] = {}
    studies = []
    for number, ((name, grid), study) in enumerate(learned.studies.items()):
        tensors[f"{number}/left"] = study.moments.left
        tensors[f"{number}/right"] = study.moments.right
        for place, curve in enumerate(study.curves.values()):
            for part in _CURVES:
                tensors[f"{number}/{place}/{part}"] = getattr(curve, part)
        studies.append(
            {
                "layer": name,
                "grid": grid,
                "layout": study.layout.encode(),
                "tile_size": study.tile_size,
                "searched": study.searched,
                "studied": study.studied,
                "moments": study.moments.count,
                "shapes": list(study.curves),
            }
        )
    for number, trainer in enumerate(learned.trainers.values()):
        tensors[f"trainer/{number}"] = trainer.weights.detach().float().cpu()
    document = {
        "job": VERSION,
        "model_class": model_class,
        "options": _comparable(learned),
        "layers": [asdict(card) for card in learned.layers.values()],
        "studies": studies,
        "settled": [[grid, list(of.items())] for grid, of in learned.shapes.items()],
        "trainers": [[name, t.scale] for name, t in learned.trainers.items()],
        "counters": {name: getattr(learned, name) for name in _COUNTERS},
    }
    write_sidecar(path, document, tensors)


def load_state(learned: Distiller, model_class: str, path: Path) -> None:
    """Fill a fresh `learned` from a file. Raises DistillError unless it is of the same work."""
    try:
        with safe_open(str(path), "pt") as file:
            document = json.loads(file.metadata()[METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if document["job"] != VERSION:
            raise DistillError(
                f"job state {path} has version {document['job']}: this release goes on from "
                f"version {VERSION}; remove the file, or give resume=False"
            )
        if document["model_class"] != model_class or document["options"] != _comparable(learned):
            raise DistillError(
                f"job state {path} is of a distillation of {document['model_class']} with "
                f"{document['options']}, this one is of {model_class} with {_comparable(learned)}: "
                "remove the file, or give resume=False"
            )
        _fill(learned, document, tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, DistillError):
            raise
        raise DistillError(
            f"job state {path} cannot be read ({error}): remove the file, or give resume=False"
        ) from error


def _comparable(learned: Distiller) -> dict[str, Any]:
    """The options that results of two runs must share to be added up."""
    options = learned.options
    return {"tile_size": options.tile_size}


def _fill(
    learned: Distiller, document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    learned.layers.update((given["name"], LayerCard(**given)) for given in document["layers"])
    for number, given in enumerate(document["studies"]):
        card = learned.layers[given["layer"]]
        layout = Layout.decode(given["layout"])
        study = LayerStudy(layout, card.heads, card.head_dim, given["tile_size"])
        study.searched, study.studied = given["searched"], given["studied"]
        study.moments.left = tensors[f"{number}/left"]
        study.moments.right = tensors[f"{number}/right"]
        study.moments.count = given["moments"]
        for place, shape in enumerate(given["shapes"]):
            curve = study.curve(tuple(shape))
            for part in _CURVES:
                found = tensors[f"{number}/{place}/{part}"]
                if found.shape != getattr(curve, part).shape:
                    raise ValueError(f"{part} of {card.name} has shape {tuple(found.shape)}")
                setattr(curve, part, found)
        learned.studies[card.name, _grid(given["grid"])] = study
    for grid, of in document["settled"]:
        learned.shapes[_grid(grid)] = {
            name: tuple((s[0], s[1], s[2]) for s in shapes) for name, shapes in of
        }
    for number, (name, scale) in enumerate(document["trainers"]):
        card = learned.layers[name]
        trainer = ScoreTrainer(card.heads, card.head_dim, scale, torch.device("cpu"))
        with torch.no_grad():
            trainer.weights.copy_(tensors[f"trainer/{number}"])
        learned.trainers[name] = trainer
    for name, value in document["counters"].items():
        if name in _COUNTERS:
            setattr(learned, name, value)


def _grid(given: Any) -> Grid:
    t, h, w = given
    return (t, h, w)
