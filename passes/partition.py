"""The partition test: a token grid from positions alone, whatever their encoding or order.

A column of positional codes or values that depends on one axis groups the tokens into "same t",
"same h" or "same w". Three such groupings whose sizes multiply to the number of tokens, and whose
joint label is unique, are the grid. Nothing is counted in runs, so that a token order other than
raster is seen as such and never mistaken for another grid.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch

_MAX_GROUPINGS = 64
"""Distinct groupings considered; rotary tables have a handful."""

_SAMPLE = 512
"""Rows, drawn evenly at random, that tell one grouping from another."""


@dataclass(frozen=True)
class PositionGrid:
    """A grid read from positions.

    raster: the tokens stand in raster order. members: which groupings are its T, H and W.
    joint: (N,) the place of every token in raster order, as the groupings number it.
    """

    grid: tuple[int, int, int]
    raster: bool
    members: tuple[int, int, int]
    joint: torch.Tensor


def groupings(columns: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """The distinct ways the columns of a (N, F) tensor group its rows.

    Each as (N,) int64 labels and the first column that groups so.

    Labels are numbered by first appearance. Constant columns group nothing and are left out.
    Columns that group a sample of the rows alike are taken to group all of them alike.
    """
    count = columns.shape[0]
    sample = _places(count)
    found: dict[tuple[int, ...], tuple[torch.Tensor, int]] = {}
    for place, column in enumerate(columns.unbind(1)):
        probe = column[sample]
        if bool((probe == probe[0]).all()) and bool((column == column[0]).all()):
            continue
        key = tuple(_by_first_appearance(torch.unique(probe, return_inverse=True)[1]).tolist())
        if key not in found:
            labels = _by_first_appearance(torch.unique(column, return_inverse=True)[1])
            found[key] = (labels, place)
        if len(found) == _MAX_GROUPINGS:
            break
    return list(found.values())


def grid_from_groupings(found: list[torch.Tensor]) -> PositionGrid | None:
    """The one grid three of the groupings make; None if there is none or more than one."""
    if not found:
        return None
    tokens = found[0].shape[0]
    sizes = [int(labels.max()) + 1 for labels in found]
    grids: dict[tuple[int, int, int], PositionGrid] = {}
    for trio in itertools.combinations(range(len(found)), 3):
        if sizes[trio[0]] * sizes[trio[1]] * sizes[trio[2]] != tokens:
            continue
        # t changes least often along the sequence, w most
        slow_first = sorted(trio, key=lambda i: int((found[i][1:] != found[i][:-1]).sum()))
        t, h, w = (found[i] for i in slow_first)
        grid = (sizes[slow_first[0]], sizes[slow_first[1]], sizes[slow_first[2]])
        joint = (t * grid[1] + h) * grid[2] + w
        if torch.unique(joint).numel() != tokens:
            continue
        raster = torch.equal(joint, torch.arange(tokens, device=joint.device))
        members = (slow_first[0], slow_first[1], slow_first[2])
        grids.setdefault(grid, PositionGrid(grid, raster, members, joint))
    return next(iter(grids.values())) if len(grids) == 1 else None


def _by_first_appearance(labels: torch.Tensor) -> torch.Tensor:
    count = int(labels.max()) + 1
    places = torch.arange(labels.numel(), device=labels.device)
    first = torch.full((count,), labels.numel(), device=labels.device).scatter_reduce(
        0, labels, places, "amin"
    )
    rank = torch.empty_like(first)
    rank[first.argsort()] = torch.arange(count, device=labels.device)
    return rank[labels]


@lru_cache(maxsize=64)
def _places(count: int) -> torch.Tensor:
    """The rows of a sample, the same ones for every tensor of `count` rows."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator, device="cpu")[:_SAMPLE]


def sampled(rows: torch.Tensor) -> torch.Tensor:
    """A random sample of (N, F) rows, on the CPU."""
    return rows[_places(rows.shape[0]).to(rows.device)].cpu()


def confirms_grid(rows: torch.Tensor, grid: tuple[int, int, int]) -> bool:
    """Whether positions (N, F) agree with a raster grid on a random sample of their rows.

    Cheap enough for every call: for each axis some column must group the sample as that axis does.
    """
    tokens = grid[0] * grid[1] * grid[2]
    if rows.shape[0] != tokens:
        return False
    sample = _places(tokens)
    seen = {
        tuple(_by_first_appearance(torch.unique(c, return_inverse=True)[1]).tolist())
        for c in sampled(rows).unbind(1)
    }
    places = (sample // (grid[1] * grid[2]), sample // grid[2] % grid[1], sample % grid[2])
    return all(
        tuple(_by_first_appearance(torch.unique(p, return_inverse=True)[1]).tolist()) in seen
        for p in places
    )
