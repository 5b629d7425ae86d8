"""Packed sequences: which tokens attend to each other in a varlen call, proven from its offsets.

Understood are samples of equal length, one after the other, each a segment of its own; and samples
of two segments, of which the second holds the padding at the sample's end and no more.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import fx

from .offsets import Offsets
from .sizes import Length, Size, SizeOf, equal, example_tensor, expression
from .truth import Unproven


@dataclass(frozen=True, eq=False)
class Segments:
    """The structure of packed tokens.

    bounds: the offsets, (samples + 1,), or (2 samples + 1,) where there is padding.
    padding: the longest that a sample's second segment can be; None where there is none.
    checked: what the offsets hold rests on values, which have to be checked on every call.
    """

    samples: int
    bounds: fx.Node
    padding: Length | None = None
    checked: bool = False


@dataclass(frozen=True, eq=False)
class Packed:
    """One operand's part of a call: tensor of (tokens, H, D), offsets, and `max_seqlen`."""

    tensor: fx.Node
    side: int
    bounds: object
    longest: object

    @property
    def tokens(self) -> Size:
        """The length of the packed sequence."""
        tensor = example_tensor(self.tensor)
        if tensor is None:
            raise Unproven("not one tensor")
        return tensor.shape[self.side]


def read_segments(reader: fx.Node, q: Packed, k: Packed, offsets: Offsets) -> Segments | str:
    """The segments of the call `reader`, or what is not proven of them.

    k stands for the values too.
    """
    try:
        of_q, of_k = (_segments(reader, operand, offsets) for operand in (q, k))
        if of_q.samples != of_k.samples:
            return "another number of segments for the queries than for the keys"
        if of_q.padding is None and of_k.padding is None:
            return of_q if of_q.checked or not of_k.checked else of_k
        if q.bounds is not k.bounds:
            a, b = (offsets.values(x.bounds, reader) for x in (of_q, of_k))
            if len(a) != len(b) or not all(equal(x, y) for x, y in zip(a, b, strict=True)):
                return "queries and keys end in different places"
        if not equal(expression(q.tokens), expression(k.tokens)):
            return "another number of queries than of keys"
    except Unproven as reason:
        return f"a packed sequence whose segments are not proven: {reason}"
    return of_q


def _segments(reader: fx.Node, operand: Packed, offsets: Offsets) -> Segments:
    bounds = operand.bounds
    tensor = example_tensor(bounds)
    if not isinstance(bounds, fx.Node) or tensor is None:
        raise Unproven("they have no offsets")
    total = expression(operand.tokens)
    try:
        places = offsets.values(bounds, reader)
    except Unproven:
        if tuple(tensor.shape) == (2,) and equal(_longest(operand), total):
            # two offsets, and a longest segment of all tokens; that they say so is checked
            return Segments(1, bounds, checked=True)
        raise
    found = _samples(bounds, places, total) or _padded_samples(bounds, places, total, offsets)
    longest = _longest(operand) * found.samples
    if not (equal(longest, total) or (longest - total).is_nonnegative):
        raise Unproven("the longest segment is told to be shorter than a sample")
    return found


def _longest(operand: Packed) -> sympy.Expr:
    length = operand.longest
    if isinstance(length, fx.Node):
        length = length.meta.get("example_value")
    if isinstance(length, bool) or not isinstance(length, (int, torch.SymInt)):
        raise Unproven("the longest segment is no number of the graph")
    return expression(length)


def _samples(bounds: fx.Node, places: list[sympy.Expr], total: sympy.Expr) -> Segments | None:
    """Samples of equal length, each one segment; None if the offsets are others."""
    count = len(places) - 1
    alike = all(equal(place * count, i * total) for i, place in enumerate(places))
    return Segments(count, bounds) if count > 0 and alike else None


def _padded_samples(
    bounds: fx.Node, places: list[sympy.Expr], total: sympy.Expr, offsets: Offsets
) -> Segments:
    """Samples of equal length whose second segment is padding. Raises Unproven."""
    if len(places) < 3 or _samples(bounds, places[::2], total) is None or len(places) % 2 == 0:
        raise Unproven(f"they end at {', '.join(_spelled(x) for x in places[:5])}")
    samples = len(places) // 2
    paddings = [sympy.expand(b - a) for a, b in zip(places[1::2], places[2::2], strict=True)]
    lengths = [_most(padding, offsets) for padding in paddings]
    if not all(equal(_size(lengths[0][0]), _size(length)) for length, _ in lengths):
        raise Unproven("their padding differs from sample to sample")
    sure = all(sure for _, sure in lengths)
    return Segments(samples, bounds, lengths[0][0], checked=not sure)


def _most(padding: sympy.Expr, offsets: Offsets) -> tuple[Length, bool]:
    """The most that a length can be, and whether it is sure to be between 0 and that."""
    symbols = [symbol for symbol in padding.free_symbols if symbol in offsets.counts]
    if not symbols:
        if not padding.is_Integer or padding <= 0:
            raise Unproven("the padding is a size that changes, or none")
        return int(padding), True
    if len(symbols) > 1:
        raise Unproven("their lengths depend on several counts")
    count = offsets.counts[symbols[0]]
    counted = equal(padding, count.symbol)  # the count is of the padding itself
    if not counted and not equal(padding + count.symbol, _size(count.most)):
        raise Unproven("the padding is not what a count leaves of its tokens")
    return count.most, count.sure


def _size(length: Length) -> sympy.Expr:
    return expression(length.size) if isinstance(length, SizeOf) else sympy.Integer(length)


def _spelled(place: sympy.Expr) -> str:
    return str(place).replace("_count", "count")
