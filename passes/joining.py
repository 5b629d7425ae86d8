"""Rules of joining: tensors side by side, with the tokens of each in its part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .codes import NONE, Source, SourceKind, Tracked, collapse, expand_dims
from .indexing import Shape


def cat(out: Shape, tensors: Sequence[Tracked], dim: int = 0, **kw: Any) -> Tracked:
    """cat: every source of any part, -1 where a part does not have it."""
    dim = kw.get("axis", dim)
    dim %= len(out)
    # empty parts add nothing, and cat takes empty 1-D tensors among others of any rank
    parts = [x for x in tensors if x.rank == len(out) and x.shape[dim]]
    sources: dict[Source, None] = {}
    for part in parts:
        sources.update(dict.fromkeys(part.codes))
    codes = {s: collapse(_cat_one(s, parts, dim), [dim]) for s in sources}
    return Tracked(out, codes)


def _cat_one(source: Source, parts: Sequence[Tracked], dim: int) -> torch.Tensor:
    held = [part.codes.get(source) for part in parts]
    some = next(c for c in held if c is not None)
    alike = _alike(source, held, dim)
    if alike is not None:
        return alike
    pieces = [
        expand_dims(some.new_full((1,) * some.dim(), NONE) if c is None else c, part.shape, [dim])
        for c, part in zip(held, parts, strict=True)
    ]
    # a side that any piece needs full, all need full
    sizes = [max(piece.shape[d] for piece in pieces) for d in range(some.dim())]
    return torch.cat(
        [p.expand([p.shape[d] if d == dim else sizes[d] for d in range(p.dim())]) for p in pieces],
        dim,
    )


def _alike(source: Source, held: Sequence[torch.Tensor | None], dim: int) -> torch.Tensor | None:
    """The codes of parts that all hold the same and do not depend on `dim`, else None.

    Along features, a position counts as alike where some parts lack it: a rotary table joins the
    features of several axes, and telling these apart would cost tokens times features.
    """
    codes = [c for c in held if c is not None and not (c.numel() == 1 and c.item() == NONE)]
    if not codes or any(c.shape[dim] != 1 for c in codes):
        return None
    if len(codes) < len(held):
        features = 0 < dim == codes[0].dim() - 1
        if not features or source.kind is SourceKind.INPUT:
            return None
    same = all(c is codes[0] or torch.equal(c, codes[0]) for c in codes[1:])
    return codes[0] if same else None


def stack(out: Shape, tensors: Sequence[Tracked], dim: int = 0) -> Tracked:
    """stack: cat along a new side."""
    dim %= len(out)
    unit = [x.map((*x.shape[:dim], 1, *x.shape[dim:]), lambda c: c.unsqueeze(dim)) for x in tensors]
    return cat(out, unit, dim)
