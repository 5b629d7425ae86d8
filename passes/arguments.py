"""Arguments: what a node of the graph is given, with tracked tensors in place of nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from .codes import Tracked
from .sizes import example, hint, shape_hints


def resolved(arg: Any, values: Mapping[fx.Node, Any]) -> Any:
    """Arguments with nodes replaced by what `values` holds of them, or by their value or its hint.

    A tensor that `values` lacks is tracked without codes.
    """
    if isinstance(arg, fx.Node):
        return values[arg] if arg in values else _recorded(example(arg))
    if isinstance(arg, tuple):
        return tuple(resolved(a, values) for a in arg)
    if isinstance(arg, list):
        return [resolved(a, values) for a in arg]
    if isinstance(arg, dict):
        return {name: resolved(a, values) for name, a in arg.items()}
    if isinstance(arg, slice):
        return slice(*(resolved(a, values) for a in (arg.start, arg.stop, arg.step)))
    return arg


def _recorded(value: Any) -> Any:
    if isinstance(value, torch.SymInt):
        return hint(value)
    if isinstance(value, torch.Tensor):
        return Tracked(shape_hints(value))
    if isinstance(value, (tuple, list)):
        return [Tracked(shape_hints(v)) if isinstance(v, torch.Tensor) else v for v in value]
    return value
