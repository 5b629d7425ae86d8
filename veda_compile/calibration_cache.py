"""The cache of calibrated sidecars: one file for each model and each way it was calibrated."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .attention_modules import attention_modules
from .errors import SidecarError
from .fingerprint import fingerprint, module_tensors
from .options import DEFAULT_DENSITY, Options
from .searched_modes import MOST_COLUMNS
from .sidecar import Sidecar
from .sidecar_file import SUFFIX

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "VEDA_CACHE_DIR"

_METHOD = 2
"""Goes up when calibration comes to other plans: older files are not found any more."""

_KEY_LENGTH = 24
_SAMPLE = 256
_MADE_BY = "veda_compile.calibration"


def cache_folder() -> Path:
    """Where calibrated sidecars are kept: VEDA_CACHE_DIR, else the user's cache folder."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    # the standard says that relative paths are to be ignored
    root = Path(base) if base and os.path.isabs(base) else Path.home() / ".cache"
    return root / "veda-compile"


def cache_key(model: nn.Module, options: Options) -> str | None:
    """What a model's calibration is filed under; None where its weights have no values.

    Hashes its class, its attention layers by name and content, and the options that decide on the
    plans. Where it runs, and in which dtype, is no part of it.
    """
    layers = []
    for name, module in attention_modules(model).items():
        mark = _content(module)
        if mark is None:
            return None
        layers.append([name.replace("_orig_mod.", ""), mark])
    facts = {
        "method": _METHOD,
        "class": type(model).__qualname__,
        "layers": layers,
        "density": options.density or DEFAULT_DENSITY,
        "tile_size": options.tile_size,
        "score": options.score,
        "dense_layers": options.dense_layers,
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:_KEY_LENGTH]


def cache_path(model: nn.Module, key: str) -> Path:
    """The file of a key."""
    name = re.sub(r"\W+", "_", type(model).__name__)
    return cache_folder() / f"{name}-{key}{SUFFIX}"


def provenance(key: str | None, facts: dict[str, Any]) -> dict[str, Any]:
    """What a calibrated sidecar says of how it was made."""
    return {"made_by": _MADE_BY, "key": key, **facts}


def load_cached(path: Path, key: str) -> Sidecar | None:
    """The sidecar of `key`; None, with a warning, where the file is not what it must be."""
    if not path.exists():
        return None
    try:
        found = Sidecar.load(path)
    except SidecarError as error:
        logger.warning("veda: cached calibration is ignored and will be replaced: %s", error)
        return None
    # graphs are compiled before their plans are known, with inputs for no more than this
    fits = found.score != "projection" and not found.factors
    fits = fits and (found.columns or 0) <= MOST_COLUMNS
    made = found.provenance
    if not fits or (made.get("made_by"), made.get("key")) != (_MADE_BY, key):
        logger.warning(
            "veda: cached calibration is ignored and will be replaced: %s is not of this model and "
            "these options", path,
        )  # fmt: skip
        return None
    return found


def save_cached(sidecar: Sidecar, path: Path) -> bool:
    """Keep a sidecar, all of it or nothing; False, with a warning, where that cannot be done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sidecar.save(path)
    except (OSError, SidecarError) as error:
        logger.warning(
            "veda: the calibration serves this process and is not kept (%s): set %s to a folder "
            "that can be written", error, FOLDER_VARIABLE,
        )  # fmt: skip
        return False
    return True


def cached_files() -> Iterator[Path]:
    """The calibrations that are kept, by name."""
    folder = cache_folder()
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX))


def _content(module: nn.Module) -> str | None:
    """What tells a layer's weights: its fingerprint, else a sample of its larger tensors."""
    mark = fingerprint(module_tensors(module))
    if mark is not None:
        return mark
    samples = []
    for _, tensor in sorted(module.named_parameters()):
        if tensor.is_meta:
            return None
        flat = tensor.detach().flatten()
        if flat.is_floating_point():
            step = max(1, flat.numel() // _SAMPLE)
            samples.append(flat[::step][:_SAMPLE].float().cpu())
    return fingerprint([torch.cat(samples)]) if samples else None
