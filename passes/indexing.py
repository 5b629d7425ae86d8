"""Rules of indexing: reading and writing parts of a tensor by integers, slices and Ellipsis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from .codes import NONE, Tracked, aligned, collapse, expand_dims

Shape: TypeAlias = tuple[int, ...]


def getitem(out: Shape, x: Tracked, index: Any) -> Tracked:
    """Basic indexing: integers, slices, Ellipsis, None. Index tensors are not followed."""
    items = full_index(x, index)
    return x.map(out, lambda c: c[_index_for(c, items)])


def full_index(x: Tracked, index: Any) -> list[Any]:
    """`index` with Ellipsis written out and trailing slices added. Raises for index tensors."""
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(not (i is None or i is Ellipsis or isinstance(i, (int, slice))) for i in items):
        raise NotImplementedError("index tensors")
    if any(isinstance(i, bool) for i in items):
        raise NotImplementedError("boolean index")
    used = sum(1 for i in items if i is not None and i is not Ellipsis)
    fill = [slice(None)] * (x.rank - used)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        return items[:at] + fill + items[at + 1 :]
    return items + fill


def _index_for(codes: torch.Tensor, items: Sequence[Any]) -> tuple[Any, ...]:
    """The index on codes: a side of size 1 is kept whole, whatever part of it is asked for."""
    index: list[Any] = []
    d = 0
    for item in items:
        if item is None:
            index.append(None)
            continue
        if codes.shape[d] == 1:
            item = slice(None) if isinstance(item, slice) else 0
        index.append(item)
        d += 1
    return tuple(index)


def assign(x: Tracked, index: Any, value: object) -> Tracked:
    """x after `x[index] = value`."""
    items = full_index(x, index)
    dims = _assigned_dims(x, items)
    sources = dict.fromkeys(x.codes)
    if isinstance(value, Tracked):
        sources.update(dict.fromkeys(value.codes))
    codes = {}
    for source in sources:
        base = x.codes.get(source)
        new = value.codes.get(source) if isinstance(value, Tracked) else None
        some = base if base is not None else new
        assert some is not None
        if base is None:
            base = some.new_full((1,) * x.rank, NONE)
        codes[source] = collapse(_assign_one(x, base, items, dims, new), sorted(dims))
    return Tracked(x.shape, codes)


def _assigned_dims(x: Tracked, items: Sequence[Any]) -> set[int]:
    """The sides of x of which only a part is written."""
    dims, d = set(), 0
    for item in items:
        if item is None:
            continue
        if isinstance(item, int) or item.indices(x.shape[d]) != (0, x.shape[d], 1):
            dims.add(d)
        d += 1
    return dims


def _assign_one(
    x: Tracked, base: torch.Tensor, items: Sequence[Any], dims: set[int], new: torch.Tensor | None
) -> torch.Tensor:
    if new is None:
        filled = expand_dims(base, x.shape, sorted(dims)).clone()
        filled[_index_for(filled, items)] = NONE
        return filled
    # sides of x as the indexed view lines them up with the value's
    kept: list[int | None] = []
    d = 0
    for item in items:
        if item is None:
            kept.append(None)
            continue
        if not isinstance(item, int):
            kept.append(d)
        d += 1
    new = aligned(new, len(kept)) if new.dim() <= len(kept) else new
    full = set(dims)
    for place, side in enumerate(kept[-new.dim() :] if new.dim() else []):
        if side is not None and new.shape[place] > 1:
            full.add(side)
    filled = expand_dims(base, x.shape, sorted(full)).clone()
    filled[_index_for(filled, items)] = new
    return filled
