"""Rules of data movement: how token codes follow views, copies and rearrangements.

Each rule executes its operation on the integer codes, so any token order comes out right without a
rule of its own. Rules take the operation's arguments as the graph gives them, tensors replaced by
`Tracked`, and `out`, the recorded output shape(s).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from .codes import NONE, Tracked, aligned, expand_dims, reshape_codes
from .indexing import Shape, getitem, known_values
from .joining import cat, stack

Value: TypeAlias = Tracked | list[Tracked]
Rule: TypeAlias = Callable[..., Value]


def _dim(x: Tracked, dim: int) -> int:
    return dim % x.rank if x.rank else 0


def same(out: Shape, x: Tracked, *_: Any, **__: Any) -> Tracked:
    """The same elements in the same places: casts, copies, normalisations, dropout."""
    return x


def reshape(out: Shape, x: Tracked, *_: Any, **__: Any) -> Tracked:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: one order, other sides."""
    return x.map(out, lambda c: reshape_codes(c, x.shape, out))


def permute(out: Shape, x: Tracked, *dims: Any, **kw: Any) -> Tracked:
    """permute(dims) in both call forms."""
    order = kw.get("dims", dims[0] if dims and isinstance(dims[0], (tuple, list)) else dims)
    return x.map(out, lambda c: c.permute(tuple(order)))


def transpose(out: Shape, x: Tracked, dim0: int, dim1: int) -> Tracked:
    """transpose, swapaxes, swapdims."""
    return x.map(out, lambda c: c.transpose(dim0, dim1))


def t(out: Shape, x: Tracked) -> Tracked:
    """.t(), .T, .mT, .H on matrices and batches of them."""
    return x.map(out, lambda c: c.transpose(-1, -2) if x.rank > 1 else c)


def movedim(out: Shape, x: Tracked, source: Any, destination: Any) -> Tracked:
    """movedim, moveaxis."""
    return x.map(out, lambda c: c.movedim(source, destination))


def expand(out: Shape, x: Tracked, *_: Any, **__: Any) -> Tracked:
    """expand, expand_as, broadcast_to: new copies share their codes."""
    return x.map(out, lambda c: aligned(c, len(out)))


def split(out: Sequence[Shape], x: Tracked, *args: Any, **kw: Any) -> list[Tracked]:
    """split, chunk, tensor_split: the sizes are those of the recorded outputs."""
    dim = _dim(x, kw.get("dim", args[1] if len(args) > 1 else 0))
    pieces, start = [], 0
    for shape in out:
        pieces.append(_narrow(x, shape, dim, start))
        start += shape[dim]
    return pieces


def unbind(out: Sequence[Shape], x: Tracked, dim: int = 0) -> list[Tracked]:
    """unbind: one tensor per index of a side."""
    dim = _dim(x, dim)
    return [
        _narrow(x, (*x.shape[:dim], 1, *x.shape[dim + 1 :]), dim, i).map(
            shape, lambda c: c.squeeze(dim)
        )
        for i, shape in enumerate(out)
    ]


def narrow(out: Shape, x: Tracked, dim: int, start: int, length: int) -> Tracked:
    """narrow."""
    return _narrow(x, out, _dim(x, dim), start)


def select(out: Shape, x: Tracked, dim: int, index: int) -> Tracked:
    """select: one index of one side."""
    dim = _dim(x, dim)
    return x.map(out, lambda c: c.select(dim, index if c.shape[dim] > 1 else 0))


def _narrow(x: Tracked, shape: Shape, dim: int, start: int) -> Tracked:
    start = start % x.shape[dim] if start < 0 else start
    return x.map(shape, lambda c: c if c.shape[dim] == 1 else c.narrow(dim, start, shape[dim]))


def repeat(out: Shape, x: Tracked, *sizes: Any) -> Tracked:
    """repeat, tile with explicit counts."""
    counts = list(sizes[0]) if sizes and isinstance(sizes[0], (tuple, list)) else list(sizes)
    shape = (1,) * (len(counts) - x.rank) + x.shape
    counts = [1] * (len(shape) - len(counts)) + counts

    def move(codes: torch.Tensor) -> torch.Tensor:
        codes = aligned(codes, len(shape))
        return codes.repeat([n if codes.shape[d] > 1 else 1 for d, n in enumerate(counts)])

    return x.map(out, move)


def repeat_interleave(out: Shape, x: Tracked, repeats: Any, dim: Any = None, **_: Any) -> Tracked:
    """repeat_interleave along one side, by one count or one for each."""
    if dim is None:
        raise NotImplementedError("repeat_interleave without a side")
    side = _dim(x, dim)
    if isinstance(repeats, Tracked):
        places = torch.arange(x.shape[side]).repeat_interleave(known_values(repeats))
        index = Tracked(tuple(places.shape), {}, places, repeats.reads)
        return getitem(out, x, (*[slice(None)] * side, index))
    return x.map(out, lambda c: c if c.shape[side] == 1 else c.repeat_interleave(repeats, dim=side))


def pad(
    out: Shape, x: Tracked, pad: Sequence[int], mode: str = "constant", *_: Any, **__: Any
) -> Tracked:
    """F.pad: constant padding has no code, other modes repeat tokens."""
    widths = [(int(pad[i]), int(pad[i + 1])) for i in range(0, len(pad), 2)]

    def move(codes: torch.Tensor) -> torch.Tensor:
        for i, (before, after) in enumerate(widths):
            dim = x.rank - 1 - i
            if mode == "constant" and (before or after):
                codes = expand_dims(codes, x.shape, [dim])
                line = [0, 0] * i + [before, after]
                codes = F.pad(codes, line, value=NONE)
            elif codes.shape[dim] > 1:
                codes = codes.index_select(dim, _padded(x.shape[dim], before, after, mode))
        return codes

    return x.map(out, move)


def _padded(length: int, before: int, after: int, mode: str) -> torch.Tensor:
    """The places along a side that a padded side repeats."""
    places = torch.arange(-before, length + after)
    if mode == "replicate":
        return places.clamp(0, length - 1)
    if mode == "circular":
        return places.remainder(length)
    if mode == "reflect":
        places = places.abs()
        return torch.where(places >= length, 2 * (length - 1) - places, places)
    raise NotImplementedError(f"padding mode {mode}")


def flip(out: Shape, x: Tracked, *dims: Any, **kw: Any) -> Tracked:
    """flip(dims) in both call forms."""
    sides = kw.get("dims", dims[0] if dims and isinstance(dims[0], (tuple, list)) else dims)
    return x.map(out, lambda c: c.flip(tuple(sides) if isinstance(sides, (tuple, list)) else sides))


def roll(out: Shape, x: Tracked, shifts: Any, dims: Any) -> Tracked:
    """roll along named sides."""
    return x.map(out, lambda c: c.roll(shifts, dims))


def meshgrid(out: Sequence[Shape], *tensors: Any, indexing: str = "ij") -> list[Tracked]:
    """meshgrid of 1-D tensors."""
    axes = list(tensors[0]) if isinstance(tensors[0], (tuple, list)) else list(tensors)
    side = list(range(len(axes)))
    if indexing == "xy" and len(axes) > 1:
        side[0], side[1] = 1, 0
    results = []
    for i, x in enumerate(axes):
        view = [1] * len(axes)
        view[side[i]] = -1
        results.append(x.map(out[i], lambda c, v=tuple(view): c.reshape(v)))
    return results


def outer(out: Shape, a: Tracked, b: Tracked) -> Tracked:
    """outer: rows follow `a`; its columns are the other's features."""
    return a.map(out, lambda c: c.reshape(-1, 1))


def copy(out: Shape, x: Tracked, value: Any, *_: Any, **__: Any) -> Tracked:
    """x.copy_(value): all of x is written."""
    if not isinstance(value, Tracked):
        return Tracked(out)
    return Tracked(out, {s: aligned(c, len(out)) for s, c in value.codes.items()})


def diag_embed(out: Shape, x: Tracked, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tracked:
    """diag_embed: tokens on a diagonal."""
    return x.map(
        out,
        lambda c: (expand_dims(c, x.shape, [x.rank - 1]) + 1).diag_embed(offset, dim1, dim2) - 1,
    )


def unfold(out: Shape, x: Tracked, dimension: int, size: int, step: int) -> Tracked:
    """Tensor.unfold: windows along one side."""
    side = _dim(x, dimension)
    return x.map(out, lambda c: expand_dims(c, x.shape, [side]).unfold(side, size, step))


def pixel_shuffle(out: Shape, x: Tracked, factor: int) -> Tracked:
    """pixel_shuffle: channels become blocks of pixels."""
    return x.map(out, lambda c: F.pixel_shuffle(c.expand(x.shape), factor))


def pixel_unshuffle(out: Shape, x: Tracked, factor: int) -> Tracked:
    """pixel_unshuffle: blocks of pixels become channels."""
    return x.map(out, lambda c: F.pixel_unshuffle(c.expand(x.shape), factor))


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        [
            "view",
            "reshape",
            "flatten",
            "unflatten",
            "squeeze",
            "unsqueeze",
            "view_as",
            "reshape_as",
            "ravel",
            "_unsafe_view",
        ],
        reshape,
    ),
    "permute": permute,
    **dict.fromkeys(["transpose", "swapaxes", "swapdims"], transpose),
    **dict.fromkeys(["t", "T", "mT"], t),
    **dict.fromkeys(["movedim", "moveaxis"], movedim),
    **dict.fromkeys(["expand", "expand_as", "broadcast_to"], expand),
    **dict.fromkeys(["cat", "concat", "concatenate"], cat),
    "stack": stack,
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "tensor_split"], split),
    "unbind": unbind,
    "narrow": narrow,
    "select": select,
    "getitem": getitem,
    **dict.fromkeys(["repeat", "tile"], repeat),
    "repeat_interleave": repeat_interleave,
    "pad": pad,
    "flip": flip,
    "roll": roll,
    "meshgrid": meshgrid,
    "outer": outer,
    "copy": copy,
    "diag_embed": diag_embed,
    "unfold": unfold,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
}
"""Movement by the name of the function or method."""
