"""Batch order: whether all batch elements hold tokens and positions in the order of the first.

A batch may be made of samples that were computed one by one. Then every element has sources of its
own: *twins* of those of the first, as long as them in every call and held in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from .codes import NONE, Source, SourceKind


def twins(source: Source, first: Source) -> bool:
    """Whether what one source holds of a batch element may stand for what `first` holds of the
    first: they are equally long in every call, and no other index tensor placed their elements."""
    return source.sizes == first.sizes and source.reads <= first.reads


def starts_later(codes: torch.Tensor) -> bool:
    """Whether the first batch element holds nothing of (B, H, N, D) codes, and another does."""
    return bool((codes[0] == NONE).all()) and bool((codes != NONE).any())


def evenly_held(codes: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    """Whether all batch elements hold their own tokens in the order of the first.

    codes: (B, H, N, D) of one source. others: codes of its twins, which may hold the tokens of
    other elements.
    """
    rows = codes[:, 0].amax(-1)
    for twin in others:
        rows = torch.where((rows == NONE).all(1, keepdim=True), twin[:, 0].amax(-1), rows)
    held = (rows != NONE)[0]
    if rows.shape[0] == 1 or not bool(held.any()):
        return True
    first = int(held.nonzero()[0])
    moved = rows.long() - rows[:, first : first + 1].long()
    return bool((moved == moved[:1])[:, held].all()) and bool((rows[:, ~held] == NONE).all())


def evenly_placed(view: Mapping[Source, torch.Tensor], positional: Iterable[Source]) -> bool:
    """Whether all batch elements hold positions in the order of the first, one offset apart.

    view: (B, H, N, D) codes per source. positional: the sources the first element's positions come
    from. Where another element lacks one that the graph made, a twin must stand in its place, and
    nothing else may place its tokens. Inputs have no twins: equal places may hold other values.
    """
    wanted = set(positional)
    lacked = [s for s, codes in view.items() if s in wanted and not _alike(_distances(codes))]
    if not lacked:
        return True
    if any(source.kind is SourceKind.INPUT for source in lacked):
        return False
    distances = {
        s: _distances(codes)
        for s, codes in view.items()
        if s in lacked or (s.kind is not SourceKind.INPUT and starts_later(codes))
    }
    batch = max(codes.shape[0] for codes in distances.values())
    return all(_matched(lacked, distances, element) for element in range(1, batch))


def _matched(
    first: Sequence[Source], distances: Mapping[Source, torch.Tensor], element: int
) -> bool:
    """Whether what places the tokens of a batch element are the sources `first`, or their twins,
    in the same order."""
    own = [s for s, moved in distances.items() if _places(moved[element])]
    return len(own) == len(first) and all(
        twins(a, b) and bool((distances[a][element] == distances[b][0]).all())
        for a, b in zip(own, first, strict=True)
    )


def _distances(codes: torch.Tensor) -> torch.Tensor:
    """How far each code stands before the last one of its batch element, head and feature."""
    return torch.where(codes == NONE, NONE, codes.amax(2, keepdim=True) - codes)


def _alike(distances: torch.Tensor) -> bool:
    """Whether all batch elements hold the same."""
    return distances.shape[0] == 1 or bool((distances == distances[:1]).all())


def _places(distances: torch.Tensor) -> bool:
    """Whether (H, N, D) codes of one batch element change along the sequence."""
    return bool((distances != distances[:, :1]).any())
