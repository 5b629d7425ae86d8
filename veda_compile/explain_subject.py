"""What `veda explain` is asked about: a model without weights, and the inputs of one call."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .errors import VedaError
from .explain_inputs import RECIPES, Latent, Recipe


class ExplainError(VedaError, ValueError):
    """A model that cannot be built or called from what was given."""


@dataclass(frozen=True)
class Subject:
    """A model and the keyword or positional arguments of one call.

    fake: the mode its tensors belong to, where they have no values.
    """

    model: nn.Module
    inputs: Mapping[str, Any] | Sequence[Any]
    fake: FakeTensorMode | None = None


@dataclass(frozen=True)
class Video:
    """The size of the video: of its pixels, or of the latent that the model gets."""

    frames: int
    height: int
    width: int
    latent: bool


def load_subject(target: str, video: Video, dtype: torch.dtype) -> Subject:
    """The model and inputs that `veda explain TARGET` names.

    target: "package.module:callable" (returns model and inputs), a config.json, or a folder with
    one, itself or in its folder `transformer`. Raises ExplainError.
    """
    if ":" in target and not Path(target).exists():
        return _from_callable(target)
    return _from_config(_config_file(Path(target)), video, dtype)


def _from_callable(target: str) -> Subject:
    module_name, _, name = target.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m: modules of the folder one stands in
    try:
        made = getattr(importlib.import_module(module_name), name)()
    except (ImportError, AttributeError) as error:
        raise ExplainError(f"{target}: {error}") from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise ExplainError(
            f"{target} returned a {type(made).__name__}: must be (model, inputs), a "
            "torch.nn.Module and a dict or tuple of arguments"
        )
    model, inputs = made
    if not isinstance(inputs, Mapping | list | tuple):
        raise ExplainError(f"{target}: inputs are a {type(inputs).__name__}: must be dict or tuple")
    return Subject(model.eval(), inputs)


def _config_file(path: Path) -> Path:
    for file in (path, path / "config.json", path / "transformer" / "config.json"):
        if file.is_file():
            return file
    raise ExplainError(
        f"{path}: neither a config.json, nor a folder with one, nor package.module:callable"
    )


def _from_config(file: Path, video: Video, dtype: torch.dtype) -> Subject:
    try:
        config = json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ExplainError(f"{file}: not a JSON file: {error}") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    recipe = RECIPES.get(name) if isinstance(name, str) else None
    if recipe is None:
        known = ", ".join(RECIPES)
        raise ExplainError(
            f"{file}: _class_name is {name!r}; known are {known}. For another class give "
            "package.module:callable, which returns the model and its inputs"
        )
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise ExplainError(f"{file}: diffusers is needed to build {name}: {error}") from error
    latent = _latent(video, recipe, dtype)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.device("meta"):
            model = getattr(diffusers, str(name)).from_config(config)
        nn.Module.to(model, dtype)  # diffusers' own warns of modules it keeps in float32
        model.eval()
        with fake:
            _without_values(model)
            inputs = recipe.arguments(model.config, latent)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ExplainError(f"{file}: {name} cannot be built from it: {error}") from error
    return Subject(model, {**inputs, "return_dict": False}, fake)


def _without_values(model: nn.Module) -> None:
    """Move a model from the meta device, on which much code of models cannot run, to fake tensors
    that claim to be on the CPU."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                blank = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(blank, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _latent(video: Video, recipe: Recipe, dtype: torch.dtype) -> Latent:
    if video.latent:
        return Latent(video.frames, video.height, video.width, dtype)
    if video.height % recipe.step or video.width % recipe.step:
        raise ExplainError(
            f"height {video.height} and width {video.width} in pixels: must be multiples of "
            f"{recipe.step} for this model"
        )
    frames = (video.frames - 1) // recipe.frames + 1
    return Latent(frames, video.height // recipe.side, video.width // recipe.side, dtype)
