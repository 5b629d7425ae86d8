"""Every error a user can meet, in one place. Each names the value that was wrong and the remedy."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches

import torch

from .kernels.errors import ExecutorError, LayoutError, PlanError, VedaError

__all__ = [
    "DistillError",
    "ExecutorError",
    "LayoutError",
    "OptionsError",
    "PlanError",
    "SidecarError",
    "StrictError",
    "VedaError",
    "shown",
    "suggestion",
]


class OptionsError(VedaError, ValueError):
    """An unknown option, or an option of the wrong type or value."""


class SidecarError(VedaError, ValueError):
    """A sidecar that cannot be read, is not valid, or was made for another model."""


class DistillError(VedaError, RuntimeError):
    """A distillation that cannot start, or has not seen enough."""


class StrictError(VedaError, RuntimeError):
    """Option `strict` is on and an attention layer would have stayed dense."""


_LINE = reprlib.Repr()
_LINE.maxstring = _LINE.maxother = 200


def shown(value: object) -> str:
    """`value` as one short line for a message. Never prints the contents of a tensor."""
    if isinstance(value, torch.Tensor):
        return f"a Tensor of shape {tuple(value.shape)}"
    return " ".join(_LINE.repr(value).split())


def suggestion(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'density'?)"` when a known word is close to `word`, else nothing."""
    close = get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
