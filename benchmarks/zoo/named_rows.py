"""Where the token codes say that an element of an input stands."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from veda_compile.passes.codes import NONE, Source, Tracked
from veda_compile.passes.provenance import Provenance
from veda_compile.passes.sites import Operand
from veda_compile.passes.token_map import coordinates, to_bhnd


def named_rows(
    codes: Tracked, operand: Operand, source: Source, element: Sequence[int], batch: int
) -> Tensor:
    """(B, N) or (1, N) the rows that the codes say an element of a source is in.

    A side that tokens mix has one index in all codes. So has the batch in a call for one sample,
    but samples are never mixed.
    """
    named = torch.zeros(1, 1, dtype=torch.bool)
    for held, values in codes.codes.items():
        if held.root is not source:
            continue
        rows = to_bhnd(values, operand.axes)[:, 0].amax(-1)
        hit = rows != NONE
        for axis, index in enumerate(coordinates(source, rows)):
            side, at = source.shape[axis], element[axis]
            named_indices = torch.unique(index[rows != NONE])
            if named_indices.numel() > 1:
                size = _patch(named_indices, side)
                hit = hit & (index // size == at // size)
            elif axis == 0 and side == batch:
                hit = hit & (index == at)
        named = named | hit
    return named


def random_element(generator: random.Random, source: Source, provenance: Provenance) -> list[int]:
    """An element of a source: any, but along sides that tokens do not divide evenly one that the
    codes name."""
    element = [generator.randrange(side) for side in source.shape]
    for value in provenance.values.values():
        for held, codes in value.codes.items() if isinstance(value, Tracked) else ():
            if held.root is not source or codes.numel() == 1:
                continue
            for axis, index in enumerate(coordinates(source, codes[codes != NONE])):
                named = torch.unique(index)
                if named.numel() > 1 and _patch(named, source.shape[axis]) == 1:
                    element[axis] = int(generator.choice(named.tolist()))
    return element


def _patch(named: Tensor, side: int) -> int:
    """How many indices of a side make a token; 1 where tokens do not divide it evenly."""
    size = side // named.numel()
    even = side % named.numel() == 0 and bool((named.diff() == size).all())
    return size if even else 1
