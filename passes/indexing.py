"""Rules of indexing: parts of a tensor by integers, slices and index tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from .codes import NONE, Source, Tracked, aligned, collapse, expand_dims
from .known import reads_of

Shape: TypeAlias = tuple[int, ...]


def getitem(out: Shape, x: Tracked, index: Any) -> Tracked:
    """x[index] with integers, slices, Ellipsis, None and index tensors of known values."""
    items = full_index(x, index)
    sides = indexed_sides(items)
    return moved(
        out,
        x,
        items,
        lambda c: collapse(expand_dims(c, x.shape, sides)[_index_for(c, items)], range(len(out))),
    )


def moved(out: Shape, x: Tracked, index: Any, move: Any) -> Tracked:
    """The tensor of shape `out` whose codes are `move` of those of x, as `index` tells.

    The inputs that the index tensors were read from are noted.
    """
    reads = reads_of(_tensors_in(index))
    return Tracked(out, {s.indexed(reads): move(c) for s, c in x.codes.items()})


def known_values(index: Tracked) -> torch.Tensor:
    """The contents of an index tensor. Raises NotImplementedError where the graph does not tell."""
    if index.known is None:
        raise NotImplementedError("an index tensor whose values the graph does not tell")
    return index.known


def full_index(x: Tracked, index: Any) -> list[Any]:
    """`index` with Ellipsis written out, masks as positions and trailing slices added."""
    items: list[Any] = []
    for item in index if isinstance(index, (tuple, list)) and not _is_numbers(index) else [index]:
        items += _plain_items(item)
    used = sum(1 for i in items if i is not None and i is not Ellipsis)
    fill = [slice(None)] * (x.rank - used)
    at = next((place for place, item in enumerate(items) if item is Ellipsis), len(items))
    return items[:at] + fill + items[at + 1 :]


def _is_numbers(index: Any) -> bool:
    """Whether a list is one index tensor written out."""
    return isinstance(index, list) and all(type(i) is int for i in index)


def _plain_items(item: Any) -> list[Any]:
    if isinstance(item, Tracked):
        values = known_values(item)
        if values.dtype == torch.bool:
            # kept as `Tracked`, so that what was read stays known
            return [Tracked(tuple(p.shape), {}, p, item.reads) for p in values.nonzero().unbind(1)]
        return [Tracked(item.shape, {}, values.long(), item.reads)]
    if isinstance(item, (list, tuple)):
        values = torch.tensor(item)
        return _plain_items(Tracked(tuple(values.shape), {}, values))
    if isinstance(item, bool) or not (
        item is None or item is Ellipsis or isinstance(item, (int, slice))
    ):
        raise NotImplementedError(f"an index {type(item).__name__}")
    return [item]


def indexed_sides(items: Sequence[Any]) -> list[int]:
    """The sides of the tensor that index tensors go along."""
    sides, d = [], 0
    for item in items:
        if isinstance(item, Tracked):
            sides.append(d)
        d += item is not None
    return sides


def _tensors_in(items: Any) -> list[Tracked]:
    if isinstance(items, Tracked):
        return [items]
    return [x for x in items if isinstance(x, Tracked)]


def _index_for(codes: torch.Tensor, items: Sequence[Any]) -> tuple[Any, ...]:
    """The index on codes: a side of size 1 is kept whole, whatever part of it is asked for."""
    index: list[Any] = []
    d = 0
    for item in items:
        if item is None:
            index.append(None)
            continue
        if isinstance(item, Tracked):
            item = item.known
        elif codes.shape[d] == 1:
            item = slice(None) if isinstance(item, slice) else 0
        index.append(item)
        d += 1
    return tuple(index)


def assign(x: Tracked, index: Any, value: object) -> Tracked:
    """x after `x[index] = value`."""
    items = full_index(x, index)
    dims = _assigned_dims(x, items)
    reads = reads_of(_tensors_in(items))
    codes = {}
    for source, (base, new) in paired(x, value).items():
        written = _assign_one(x, base, items, dims, new)
        codes[source.indexed(reads)] = collapse(written, sorted(dims))
    return Tracked(x.shape, codes)


def paired(x: Tracked, value: object) -> Mapping[Source, tuple[torch.Tensor, torch.Tensor | None]]:
    """Per source of x or of what is written to it: the codes of x, and those written."""
    new = value.codes if isinstance(value, Tracked) else {}
    blank = torch.full((1,) * x.rank, NONE, dtype=torch.int32)
    pairs = {}
    for source in dict.fromkeys([*x.codes, *new]):
        written = new.get(source)
        base = x.codes.get(source)
        if base is None:
            assert written is not None
            base = blank.to(written.dtype)
        pairs[source] = (base, written)
    return pairs


def _assigned_dims(x: Tracked, items: Sequence[Any]) -> set[int]:
    """The sides of x of which only a part is written."""
    dims, d = set(), 0
    for item in items:
        if item is None:
            continue
        if not isinstance(item, slice) or item.indices(x.shape[d]) != (0, x.shape[d], 1):
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
    full = set(dims)
    kept = _kept_sides(items)
    if kept is None:  # index tensors and sides in any order: no side is spared
        full = set(range(x.rank))
    else:
        new = _without_leading(new, len(kept))
        for place, side in enumerate(kept[-new.dim() :] if new.dim() else []):
            if side is not None and new.shape[place] > 1:
                full.add(side)
    filled = expand_dims(base, x.shape, sorted(full)).clone()
    filled[_index_for(filled, items)] = new.to(filled.dtype)
    return filled


def _without_leading(new: torch.Tensor, rank: int) -> torch.Tensor:
    """Written codes with at most `rank` sides: torch drops leading ones."""
    while new.dim() > rank and new.shape[0] == 1:
        new = new.squeeze(0)
    return aligned(new, rank)


def _kept_sides(items: Sequence[Any]) -> list[int | None] | None:
    """Per side of x[items], the side of x that it is, or None for a new or indexed one.

    None where index tensors do not stand together.
    """
    kept: list[int | None] = []
    d = 0
    tensors = [place for place, item in enumerate(items) if isinstance(item, Tracked)]
    if tensors and tensors[-1] - tensors[0] != len(tensors) - 1:
        return None
    if tensors and any(type(item) is int for item in items):
        return None
    for place, item in enumerate(items):
        if isinstance(item, Tracked):
            if place == tensors[-1]:
                rank = max(items[t].known.dim() for t in tensors)
                kept += [None] * rank
        elif item is None:
            kept.append(None)
        elif isinstance(item, slice):
            kept.append(d)
        d += item is not None
    return kept
