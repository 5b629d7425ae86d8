"""What the builders share."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from veda_compile.kernels.layout import Extra, Segment, Video

TEXT = 12
"""Text tokens of every model with a prompt."""

PADDED = 3
"""How many of them are padding in the first sample; each further sample has one more."""


def diffusers_class(module: str, name: str) -> Any:
    """A class of `diffusers.models.transformers`."""
    found = importlib.import_module(f"diffusers.models.transformers.{module}")
    return getattr(found, name)


def text_mask(batch: int, tokens: int = TEXT, padded: int = PADDED) -> Tensor:
    """(batch, tokens) float: 1 for text, 0 for the padding behind it."""
    mask = torch.ones(batch, tokens)
    for row in range(batch):
        mask[row, tokens - padded - row :] = 0
    return mask


def layers(template: str, count: int) -> tuple[str, ...]:
    """`layers("blocks.{}.attn1", 2)` is ("blocks.0.attn1", "blocks.1.attn1")."""
    return tuple(template.format(number) for number in range(count))


def runs(*grids: tuple[int, int, int]) -> tuple[Segment, ...]:
    """Videos behind each other. One with a side of 1 stands on no T x H x W grid: extra tokens."""
    segments: list[Segment] = []
    for grid in grids:
        video = Video(*grid)
        if min(grid) > 1:
            segments.append(video)
        elif segments and isinstance(segments[-1], Extra):
            segments[-1] = Extra(segments[-1].length + video.length)
        else:
            segments.append(Extra(video.length))
    return tuple(segments)
