"""Rules of sliding windows: the token of an output is the centre of what it sees."""

from __future__ import annotations

from typing import Any

import torch

from .codes import Tracked, collapse, reduce_dims
from .indexing import Shape


def convolution(
    out: Shape,
    x: Tracked,
    weight: Tracked,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *_: Any,
    **__: Any,
) -> Tracked:
    """conv1d/2d/3d: the token of an output is the centre of its receptive field."""
    rank = x.rank - 2
    if isinstance(padding, str):
        raise NotImplementedError(f"convolution padding {padding!r}")

    def each(value: Any) -> list[int]:
        values = list(value) if isinstance(value, (tuple, list)) else [value]
        return values * rank if len(values) == 1 else values

    steps, pads, dilations = each(stride), each(padding), each(dilation)

    def move(codes: torch.Tensor) -> torch.Tensor:
        codes = reduce_dims(codes, [1])
        for i in range(rank):
            if codes.shape[2 + i] > 1:
                centre = dilations[i] * (weight.shape[2 + i] - 1) // 2 - pads[i]
                places = torch.arange(out[2 + i]) * steps[i] + centre
                codes = codes.index_select(2 + i, places.clamp(0, x.shape[2 + i] - 1))
        return collapse(codes, [])

    return x.map(out, move)


def pool(
    out: Shape,
    x: Tracked,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    *_: Any,
    **kw: Any,
) -> Tracked:
    """Average and largest values of windows: the token of an output is its window's centre."""
    rank = len(kernel_size) if isinstance(kernel_size, (tuple, list)) else x.rank - 2
    if kw.get("return_indices"):
        raise NotImplementedError("pooling that returns indices")

    def each(value: Any) -> list[int]:
        values = list(value) if isinstance(value, (tuple, list)) else [value]
        return values * rank if len(values) == 1 else values

    widths = each(kernel_size)
    steps = each(stride) if stride else widths
    pads = each(padding)

    def move(codes: torch.Tensor) -> torch.Tensor:
        for i in range(rank):
            d = x.rank - rank + i
            if codes.shape[d] > 1:
                places = torch.arange(out[d]) * steps[i] + (widths[i] - 1) // 2 - pads[i]
                codes = codes.index_select(d, places.clamp(0, x.shape[d] - 1))
        return codes

    return x.map(out, move)
