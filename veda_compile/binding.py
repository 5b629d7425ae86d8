"""Binding: the plans and grids of a compiled graph, found anew on every call, mostly from a cache.

A compiled graph may serve many layers and many grids. What differs between calls are the graph
inputs that the rewrite added; this module fills them.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .fingerprint import fingerprint
from .grids import GridTeller
from .kernels.plan import Plan
from .kernels.static_modes import encode_modes
from .told import Grids

_CACHED_CALLS = 512


Check = Callable[[Sequence[Any]], None]
"""Raises LayoutError where the arguments of a call break what the rewrite relies on."""


class LayerMark:
    """The fingerprint of a layer whose parameters come with the call, hashed once per change.

    A change is another tensor, other memory or a higher version counter. Writing to the same
    memory through `parameter.data` is none of these and stays unseen.
    """

    def __init__(self, places: Sequence[int]) -> None:
        """places: positions of the layer's 1-D parameters among the graph's inputs, in order."""
        self._places = tuple(places)
        self._known: OrderedDict[tuple[int, ...], _Marked] = OrderedDict()

    def __call__(self, args: Sequence[Any]) -> str | None:
        """The fingerprint of the layer that a call with these arguments belongs to."""
        tensors = [args[place] for place in self._places]
        if any(tensor.is_inference() for tensor in tensors):  # they count no versions
            return fingerprint(tensors)
        key = tuple(id(tensor) for tensor in tensors)
        state = tuple(_state(tensor) for tensor in tensors)
        held = self._known.get(key)
        if (
            held is not None
            and held.state == state
            and all(ref() is tensor for ref, tensor in zip(held.tensors, tensors, strict=True))
        ):
            return held.mark
        mark = fingerprint(tensors)
        self._known[key] = _Marked(
            [weakref.ref(tensor) for tensor in tensors],
            # keeps the memory, so that no other contents can come to lie at these addresses
            [tensor.detach() for tensor in tensors],
            state,
            mark,
        )
        while len(self._known) > _CACHED_CALLS:
            self._known.popitem(last=False)
        return mark


@dataclass(frozen=True, eq=False)
class _Marked:
    """A fingerprint, and what it is the fingerprint of."""

    tensors: list[weakref.ref[torch.Tensor]]
    memory: list[torch.Tensor]
    state: tuple[tuple[int, int], ...]
    mark: str | None


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    """Changes when the tensor is written to (version) or given other storage (address)."""
    return tensor._version, tensor.data_ptr()


@dataclass(frozen=True, eq=False)
class Bound:
    """One group of added inputs.

    grids: tells the grids of a call. per_call: whether the graph takes them as an input.
    order: (N,) the tokens in raster order, where the graph takes it as an input.
    columns: the most columns of any stripe, where the graph takes static modes as inputs.
    mark: tells the layer, mostly by its fingerprint, where the plan depends on it or must be
        checked.
    plan: (mark, grids) -> the plan. used: told of every new plan, for the report.
    """

    grids: GridTeller
    per_call: bool
    mark: Callable[[Sequence[Any]], Hashable] | None
    plan: Callable[[Any, Grids], Plan]
    used: Callable[[Any, Grids, Plan], None]
    device: torch.device
    order: torch.Tensor | None = None
    columns: int | None = None


class Binder:
    """Fills the added inputs of one compiled graph."""

    def __init__(self, groups: Sequence[Bound], checks: Sequence[Check] = ()) -> None:
        """checks: what must still be as it was at compile time."""
        self._groups = tuple(groups)
        self._checks = tuple(checks)
        self._cache: OrderedDict[object, tuple[torch.Tensor, ...]] = OrderedDict()

    def __call__(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """The added inputs for a call with these arguments, in the graph's order."""
        for check in self._checks:
            check(args)
        told: dict[GridTeller, Grids] = {}
        extra: list[torch.Tensor] = []
        for place, group in enumerate(self._groups):
            if group.grids not in told:
                told[group.grids] = group.grids(args)
            mark = None if group.mark is None else group.mark(args)
            key = (place, mark, told[group.grids])
            tensors = self._cache.get(key)
            if tensors is None:
                tensors = self._cache[key] = self._fill(group, mark, told[group.grids])
                while len(self._cache) > _CACHED_CALLS * max(1, len(self._groups)):
                    self._cache.popitem(last=False)
            extra += tensors
        return extra

    def _fill(self, group: Bound, mark: Hashable, grids: Grids) -> tuple[torch.Tensor, ...]:
        plan = group.plan(mark, grids)
        group.used(mark, grids, plan)
        tensors = [
            torch.tensor(plan.tile_shapes, dtype=torch.int32, device="cpu"),
            torch.tensor(plan.density, dtype=torch.float64, device="cpu"),
        ]
        for weights in (plan.projection, plan.factors):
            if weights is not None:
                tensors.append(weights.to(group.device))
        if group.columns is not None:
            modes = (None,) * plan.heads if plan.modes is None else plan.modes
            encoded = encode_modes(modes, group.columns)
            tensors += [table for table in encoded if table is not None]
        if group.per_call:
            tensors.append(torch.tensor(grids, dtype=torch.int64, device="cpu"))
        if group.order is not None:
            both = torch.stack([group.order, group.order.argsort()])
            tensors.append(both.to(group.device))
        return tuple(tensors)
