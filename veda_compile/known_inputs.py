"""Known inputs: index tensors whose values the analysis relied on, checked on every call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .errors import LayoutError
from .passes.rewrite import input_positions


class KnownInput:
    """One input of a graph that must hold the values it had when the graph was compiled.

    torch.compile guards the sizes of a tensor, not its values. The last tensor that was right is
    remembered by identity, memory and version; only another one is read.
    """

    def __init__(self, gm: fx.GraphModule, node: fx.Node, inputs: Sequence[Any]) -> None:
        """node: a placeholder of `gm`. inputs: the example inputs."""
        self._place = input_positions(gm, [node])[0]
        self._name = node.name
        value = inputs[self._place]
        self._values = value.detach().cpu().clone()
        self._last: tuple[weakref.ref[torch.Tensor], tuple[int, int]] | None = None

    def __call__(self, args: Sequence[Any]) -> None:
        """args: the graph's arguments. Raises LayoutError if the values are others."""
        value = args[self._place]
        if torch._subclasses.fake_tensor.is_fake(value):
            return
        counted = not value.is_inference()  # inference tensors count no versions
        version = (value._version, value.data_ptr()) if counted else (0, 0)
        last = self._last if counted else None
        if last is not None and last[0]() is value and last[1] == version:
            return
        if value.shape != self._values.shape or not torch.equal(value.cpu(), self._values):
            raise LayoutError(
                f"input {self._name} tells where the tokens stand, and holds other values than "
                "when the graph was compiled: call torch.compiler.reset() when the arrangement of "
                "tokens changes, or compile without the veda backend"
            )
        self._last = (weakref.ref(value), version)
