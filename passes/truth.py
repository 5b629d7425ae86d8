"""Truth tables: values of a tensor as a function of a few boolean tensors, its leaves.

A mask computed from boolean tensors by elementwise operations takes one of few values per element.
A table lists that value for every combination of the leaves, whatever the leaves will hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

MOST_LEAVES = 6


class Unproven(Exception):
    """What keeps a mask from being understood, in the user's words."""


@dataclass(frozen=True)
class Leaf:
    """A boolean tensor whose elements differ along one side of the mask, and the batch, at most.

    roles: per side of the tensor "b" (batch), "q" (queries), "k" (keys) or "" (size 1).
    """

    node: fx.Node
    roles: tuple[str, ...]

    @property
    def of_queries(self) -> bool:
        """Whether it tells queries apart. Otherwise it tells keys, or only batch elements."""
        return "q" in self.roles


@dataclass(frozen=True, eq=False)
class Table:
    """values: one side of size 2 per leaf, False first, after a side of size 1; in the tensor's
    own dtype. A tensor without sides has none before those of the leaves."""

    leaves: tuple[Leaf, ...]
    values: torch.Tensor

    def over(self, leaves: Sequence[Leaf]) -> torch.Tensor:
        """The values with a side for each of `leaves`, a superset of the table's own."""
        extra = self.values.dim() - len(self.leaves)
        if not self.leaves and not extra:
            return self.values
        shape = [1] * extra + [2 if leaf in self.leaves else 1 for leaf in leaves]
        order = sorted(range(len(self.leaves)), key=lambda i: leaves.index(self.leaves[i]))
        lead = list(range(extra))
        return self.values.permute([*lead, *(extra + i for i in order)]).reshape(shape)


def constant(value: object, dtype: torch.dtype, dims: int) -> Table:
    """The table of a tensor that holds one number everywhere."""
    return Table((), torch.full((1,) if dims else (), value, dtype=dtype))  # type: ignore[call-overload]


def leaf_table(leaf: Leaf, dims: int) -> Table:
    """The table of a leaf itself."""
    values = torch.tensor([False, True])
    return Table((leaf,), values[None] if dims else values)


def combine(
    tables: Sequence[Table], dtype: torch.dtype, apply: Callable[..., torch.Tensor]
) -> Table:
    """The table of an elementwise operation. Raises Unproven where it has too many leaves, or its
    result on tables is of another dtype than on tensors."""
    leaves = tuple(dict.fromkeys(leaf for table in tables for leaf in table.leaves))
    if len(leaves) > MOST_LEAVES:
        raise Unproven(f"it combines {len(leaves)} boolean tensors")
    try:
        result = apply(*(table.over(leaves) for table in tables))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise Unproven(f"an operation of an unknown form: {error}") from error
    if result.dtype != dtype:
        raise Unproven(f"{result.dtype} where tracing saw {dtype}")
    lead = 1 if result.dim() > len(leaves) else 0
    return Table(leaves, result.expand([1] * lead + [2] * len(leaves)))


@dataclass(frozen=True, eq=False)
class Predicate:
    """A boolean function of leaves. values: one side of size 2 per leaf, False first."""

    leaves: tuple[Leaf, ...]
    values: torch.Tensor

    @property
    def always(self) -> bool:
        """Whether it holds whatever the leaves are."""
        return bool(self.values.all())

    @property
    def never(self) -> bool:
        """Whether it cannot hold."""
        return not bool(self.values.any())


def sides(holds: Table) -> tuple[Predicate, Predicate] | None:
    """(queries, keys) such that `holds` is "queries and keys", or None if it is no such product."""
    count = len(holds.leaves)
    values = holds.values.reshape([2] * count)
    of_queries = [i for i, leaf in enumerate(holds.leaves) if leaf.of_queries]
    of_keys = [i for i in range(count) if i not in of_queries]
    queries = values.amax(of_keys, keepdim=True) if of_keys else values
    keys = values.amax(of_queries, keepdim=True) if of_queries else values
    if not torch.equal((queries & keys).expand([2] * count), values):
        return None
    return (
        _relevant([holds.leaves[i] for i in of_queries], _drop(queries, of_keys)),
        _relevant([holds.leaves[i] for i in of_keys], _drop(keys, of_queries)),
    )


def _drop(values: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    return values.squeeze(tuple(dims)) if dims else values


def _relevant(leaves: list[Leaf], values: torch.Tensor) -> Predicate:
    """Without the leaves that make no difference."""
    for place in reversed(range(len(leaves))):
        off, on = values.unbind(place)
        if torch.equal(off, on):
            values, leaves = off, leaves[:place] + leaves[place + 1 :]
    return Predicate(tuple(leaves), values)
