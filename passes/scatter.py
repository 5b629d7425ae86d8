"""Rules of gathering and scattering along one side by index tensors of known values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .codes import NONE, Source, Tracked, collapse, expand_dims, union
from .indexing import Shape, assign, getitem, known_values, moved, paired
from .known import reads_of


def index_select(out: Shape, x: Tracked, dim: int, index: Tracked) -> Tracked:
    """index_select: whole slices along one side."""
    side = dim % x.rank
    items = [slice(None)] * side + [index]
    return getitem(out, x, tuple(items))


def index_copy(out: Shape, x: Tracked, dim: int, index: Tracked, source: Tracked) -> Tracked:
    """index_copy, index_add: slices of another tensor into one side of x."""
    side = dim % x.rank
    return assign(x, tuple([slice(None)] * side + [index]), source)


def index_add(
    out: Shape, x: Tracked, dim: int, index: Tracked, source: Tracked, **_: Any
) -> Tracked:
    """index_add: as adding a tensor that is empty elsewhere."""
    return union(out, [x, index_copy(out, Tracked(x.shape), dim, index, source)])


def index_fill(out: Shape, x: Tracked, dim: int, index: Tracked, _: Any) -> Tracked:
    """index_fill: slices without tokens."""
    side = dim % x.rank
    return assign(x, tuple([slice(None)] * side + [index]), 0)


def index_put(
    out: Shape, x: Tracked, indices: Any, values: Any, accumulate: bool = False, *_: Any
) -> Tracked:
    """index_put with one index tensor a side, None for whole sides."""
    places = tuple(slice(None) if i is None else i for i in indices)
    if accumulate:
        return union(out, [x, assign(Tracked(x.shape), places, values)])
    return assign(x, places, values)


def index(out: Shape, x: Tracked, indices: Any) -> Tracked:
    """aten.index: x[indices], None for whole sides."""
    return getitem(out, x, tuple(slice(None) if i is None else i for i in indices))


def gather(out: Shape, x: Tracked, dim: Any, index: Any = None, **_: Any) -> Tracked:
    """gather, take_along_dim: one element at a time along a side."""
    if isinstance(dim, Tracked):
        dim, index = index, dim
    if not isinstance(dim, int) or not isinstance(index, Tracked):
        raise NotImplementedError("gathering from a flattened tensor")
    side = dim % x.rank
    places = _narrowest(known_values(index))

    def move(codes: torch.Tensor) -> torch.Tensor:
        codes, lines = _side_by_side(codes, places, side, x.shape[side], out)
        return collapse(codes.gather(side, lines), range(len(out)))

    return moved(out, x, index, move)


def scatter(
    out: Shape, x: Tracked, dim: int, index: Tracked, src: Any, *_: Any, **__: Any
) -> Tracked:
    """scatter of a tensor as large as its index, or of a number."""
    side = dim % x.rank
    places = _narrowest(known_values(index))
    if isinstance(src, Tracked) and src.shape != index.shape:
        raise NotImplementedError("scatter of a part of a tensor")
    reads = reads_of([index])
    codes: dict[Source, torch.Tensor] = {}
    for source, (base, new) in paired(x, src).items():
        new = base.new_full((1,) * x.rank, NONE) if new is None else new
        shape = [
            x.shape[d] if d == side or x.shape[d] != index.shape[d] else max(sizes)
            for d, sizes in enumerate(zip(base.shape, new.shape, places.shape, strict=True))
        ]
        lines = [index.shape[d] if d == side or x.shape[d] != index.shape[d] else shape[d]
                 for d in range(x.rank)]  # fmt: skip
        filled = base.expand(shape).clone()
        filled.scatter_(side, places.expand(lines), new.to(filled.dtype).expand(lines))
        codes[source.indexed(reads)] = collapse(filled, range(x.rank))
    return Tracked(x.shape, codes)


def scatter_add(
    out: Shape, x: Tracked, dim: int, index: Tracked, src: Any, *_: Any, **__: Any
) -> Tracked:
    """scatter_add, scatter_reduce: as adding a tensor that is empty elsewhere."""
    return union(out, [x, scatter(out, Tracked(x.shape), dim, index, src)])


def masked_scatter(out: Shape, x: Tracked, mask: Tracked, source: Tracked) -> Tracked:
    """masked_scatter of whole rows: the mask does not depend on trailing sides."""
    chosen = _narrowest(known_values(mask))
    while chosen.dim() < x.rank:
        chosen = chosen.unsqueeze(0)
    rows = x.rank
    while rows and chosen.shape[rows - 1] == 1:
        rows -= 1
    features = x.shape[rows:]
    if tuple(source.shape[source.rank - len(features) :]) != tuple(features):
        raise NotImplementedError("masked_scatter of parts of rows")
    lead = source.shape[: source.rank - len(features)]
    count = int(chosen.expand(*x.shape[:rows], *[1] * len(features)).sum())
    flat = {
        s: expand_dims(c, source.shape, range(len(lead))).reshape(-1, *c.shape[len(lead) :])[:count]
        for s, c in source.codes.items()
    }
    taken = Tracked((count, *features), flat)
    whole = chosen.reshape(chosen.shape[:rows]).expand(x.shape[:rows])
    return assign(x, Tracked(tuple(whole.shape), {}, whole, mask.reads), taken)


def _narrowest(values: torch.Tensor) -> torch.Tensor:
    """An index without the sides it was expanded along."""
    for d in range(values.dim()):
        if values.shape[d] > 1 and values.stride(d) == 0:
            values = values.narrow(d, 0, 1)
    return values if values.dtype == torch.bool else values.long()


def _side_by_side(
    codes: torch.Tensor, places: torch.Tensor, side: int, length: int, out: Shape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and index with equal sizes on all sides but `side`."""
    sizes = []
    for d in range(codes.dim()):
        if d != side and codes.shape[d] > 1:
            codes = codes.narrow(d, 0, out[d])  # an index may be shorter
        sizes.append(max(codes.shape[d], places.shape[d]))
    codes = codes.expand([length if d == side else size for d, size in enumerate(sizes)])
    places = places.expand([places.shape[d] if d == side else s for d, s in enumerate(sizes)])
    return codes, places


RULES: dict[str, Callable[..., Tracked]] = {
    "index_select": index_select,
    "index_copy": index_copy,
    "index_add": index_add,
    "index_fill": index_fill,
    "index_put": index_put,
    "index": index,
    "gather": gather,
    "take_along_dim": gather,
    "scatter": scatter,
    "scatter_add": scatter_add,
    "scatter_reduce": scatter_add,
    "masked_scatter": masked_scatter,
}
"""Gathering and scattering by the name of the function or method."""
