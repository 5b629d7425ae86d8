"""Token codes: which element of which source each element of a tensor came from.

A *source* is a tensor whose elements we can name: a graph input, a module buffer, or a sequence
made in the graph (arange, linspace). A *code* is the flat index of an element of one source, -1
for "none". A tracked tensor holds, per source, an integer tensor of its own rank whose sides are
either full or 1, 1 meaning that the code does not depend on that dimension. That keeps the cost
proportional to tokens, not to tokens times channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import sympy
import torch
from torch import fx

NONE = -1
_LARGE = 1 << 24  # elements; beyond it the feature axis of a source is not told apart


class SourceKind(Enum):
    """Where the elements of a source come from."""

    INPUT = "input"
    BUFFER = "buffer"
    CREATED = "created"


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor whose elements are told apart. `name` is the graph node that holds it.

    shape: hints. sizes: the shape as the graph has it, symbols where it may change; sources of
    equal sizes have equal shapes in every call.
    reads: graph inputs whose *values* decided where the elements stand (index tensors). Nothing
    guards values, so that who relies on these codes must check them on every call. Codes that went
    through an index count as another source, with the same `root`.
    """

    name: str
    kind: SourceKind
    shape: tuple[int, ...]
    sizes: tuple[sympy.Expr, ...]
    reads: frozenset[fx.Node] = frozenset()
    origin: Source | None = None
    _indexed: dict[frozenset[fx.Node], Source] = field(default_factory=dict)

    @property
    def root(self) -> Source:
        """The source as it entered the graph."""
        return self.origin or self

    def indexed(self, reads: frozenset[fx.Node]) -> Source:
        """The source for codes that were moved by the values of some graph inputs."""
        if reads <= self.reads:
            return self
        known = self.root._indexed
        wanted = self.reads | reads
        if wanted not in known:
            known[wanted] = Source(self.name, self.kind, self.shape, self.sizes, wanted, self.root)
        return known[wanted]

    def codes(self) -> torch.Tensor:
        """The source's own codes: every element is itself."""
        count = 1
        for side in self.shape:
            count *= side
        dtype = torch.int32 if count < 2**31 else torch.int64
        if count > _LARGE and len(self.shape) == 3:
            # a packed (B, S, C) sequence: its features are no axis of a grid
            batch, sequence, features = self.shape
            first = torch.arange(0, batch * sequence, dtype=torch.int64) * features
            return first.to(dtype).view(batch, sequence, 1)
        return torch.arange(count, dtype=dtype).view(self.shape)


@dataclass(frozen=True, eq=False)
class Tracked:
    """A tensor of the graph: its shape (hints of symbolic sizes) and its codes per source.

    known: the tensor itself where the graph (or an input, see `reads`) tells its values.
    reads: graph inputs whose values went into `known`.
    """

    shape: tuple[int, ...]
    codes: Mapping[Source, torch.Tensor] = field(default_factory=dict)
    known: torch.Tensor | None = None
    reads: frozenset[fx.Node] = frozenset()

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def map(self, shape: Sequence[int], move: Callable[[torch.Tensor], torch.Tensor]) -> Tracked:
        """The tensor of `shape` whose codes are `move` of these."""
        return Tracked(tuple(shape), {source: move(c) for source, c in self.codes.items()})

    def key(self) -> tuple[object, ...]:
        """Equal for tensors with the same shape and the very same code tensors."""
        codes = sorted((id(s), id(c)) for s, c in self.codes.items())
        return (self.shape, id(self.known), self.reads, *codes)


def expand_dims(codes: torch.Tensor, shape: Sequence[int], dims: Sequence[int]) -> torch.Tensor:
    """`codes` with the named dimensions at their full size."""
    sizes = [shape[d] if d in dims else codes.shape[d] for d in range(codes.dim())]
    return codes.expand(sizes)


def collapse(codes: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Shrink to 1 those of `dims` along which the codes are constant."""
    for d in dims:
        if codes.shape[d] > 1:
            first = codes.narrow(d, 0, 1)
            if bool((codes == first).all()):
                codes = first
    return codes


def reduce_dims(codes: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """Contract dimensions, keeping them at size 1: the largest code stands for all."""
    full = [d for d in dims if codes.shape[d] > 1]
    return codes.amax(full, keepdim=True) if full else codes


def reshape_codes(codes: torch.Tensor, before: Sequence[int], after: Sequence[int]) -> torch.Tensor:
    """Codes of `x.reshape(after)` for x of shape `before`.

    Dimensions are grouped where the products of sizes agree; a group on which the codes do not
    depend stays at size 1, so features never blow up.
    """
    sizes: list[int] = []
    out: list[int] = []
    for group_in, group_out in _matched_groups(before, after):
        if all(codes.shape[d] == 1 for d in group_in):
            sizes += [1] * len(group_in)
            out += [1] * len(group_out)
        else:
            sizes += [before[d] for d in group_in]
            out += [after[d] for d in group_out]
    return codes.expand(sizes).reshape(out)


def _matched_groups(
    before: Sequence[int], after: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Runs of input and output dimensions with equal products, in order."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        ins, outs, p, q = [], [], 1, 1
        if i < len(before):
            ins, p, i = [i], before[i], i + 1
        if j < len(after):
            outs, q, j = [j], after[j], j + 1
        while p != q:
            if p < q and i < len(before):
                p, i = p * before[i], i + 1
                ins.append(i - 1)
            elif j < len(after):
                q, j = q * after[j], j + 1
                outs.append(j - 1)
            else:
                raise ValueError(f"cannot reshape {tuple(before)} to {tuple(after)}")
        groups.append((ins, outs))
    return groups


def aligned(codes: torch.Tensor, rank: int) -> torch.Tensor:
    """`codes` with leading dimensions of size 1 up to `rank`, as broadcasting adds them."""
    if codes.dim() == rank:
        return codes  # the very same object: equal operations are recognised by identity
    return codes.view((1,) * (rank - codes.dim()) + tuple(codes.shape))


def union(shape: Sequence[int], operands: Sequence[Tracked]) -> Tracked:
    """Codes of an elementwise operation that broadcasts `operands` to `shape`.

    Where two operands hold the same source, the one whose codes vary more wins (a scale computed
    from a tensor does not rename its tokens); elements without a code take the other's.
    """
    merged: dict[Source, torch.Tensor] = {}
    for operand in operands:
        for source, codes in operand.codes.items():
            codes = aligned(codes, len(shape))
            held = merged.get(source)
            if held is None:
                merged[source] = codes
            elif held is not codes and not _same_view(held, codes):
                winner, other = (codes, held) if codes.numel() > held.numel() else (held, codes)
                if bool((winner == NONE).any()):
                    winner = torch.where(winner == NONE, other, winner)
                merged[source] = winner
    return Tracked(tuple(shape), merged)


def _same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
