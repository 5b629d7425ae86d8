"""Static modes: heads whose kept tiles follow from the token grid alone (arXiv 2506.03065).

A static head takes no scores and no budget. Its list of key tiles is a rule over the head's grid of
tiles; `docs/method.md`, section 3, says which. Positions of tiles are (t, h, w) in tiles, their
raster number is (t * rows + h) * columns + w.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch

from .errors import PlanError
from .layout import Layout

KINDS = ("full", "skip", "diagonal", "multi_diagonal", "stripe")
"""The rules. In an encoded plan a kind is its place here, from 1 on; 0 is a scored head."""

MAX_COLUMNS = 64
"""Most columns of one stripe."""

Position = tuple[float, float, float]
"""(t, h, w) as shares of the grid, each in [0, 1)."""

_Sides = tuple[int, int, int]
_REACHES = {"diagonal": 1, "multi_diagonal": 2}  # how many of the two a kind reads
_MAX_REACH = 2**31 - 1
_UNUSED = (-1.0, -1.0, -1.0)
_LARGEST_DENOMINATOR = 1000  # a position is the simple fraction it stands for: 0.7 is 7/10
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class StaticMode:
    """Which key tiles a head's query tiles keep, whatever q and k hold.

    kind: one of `KINDS`. "full": every tile. "skip": none, so extra and context keys alone.
        "diagonal": tiles whose raster number is at most reach[0] from the query tile's.
        "multi_diagonal": tiles at most reach[0] frames of tiles away, whose raster number within
        the frame is at most reach[1] from the query tile's. "stripe": the tiles at `columns`, and
        the query's own.
    reach: in tiles; what a kind does not read must be 0.
    columns: 1 to `MAX_COLUMNS` positions of a stripe, kept in float32 precision; () otherwise.

    Raises PlanError, naming the value and what it must be.
    """

    kind: str
    reach: tuple[int, int] = (0, 0)
    columns: tuple[Position, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(f"static mode {self.kind!r}: must be one of {', '.join(KINDS)}")
        reach = self.reach
        if not isinstance(reach, tuple) or len(reach) != 2 or not all(map(_is_reach, reach)):
            raise PlanError(f"reach {reach!r}: must be two ints from 0 to {_MAX_REACH}, in tiles")
        for place in range(_REACHES.get(self.kind, 0), 2):
            if reach[place]:
                raise PlanError(f"reach {reach} of mode {self.kind!r}: number {place} must be 0")
        if not isinstance(self.columns, tuple):
            raise PlanError(f"columns {self.columns!r}: must be a tuple of (t, h, w)")
        most, least = (MAX_COLUMNS, 1) if self.kind == "stripe" else (0, 0)
        if not least <= len(self.columns) <= most:
            raise PlanError(
                f"{len(self.columns)} columns with mode {self.kind!r}: must be "
                + (f"{least} to {most}" if most else "none, a stripe alone has them")
            )
        object.__setattr__(self, "columns", tuple(_position(column) for column in self.columns))


Modes = tuple[StaticMode | None, ...]
"""Per head its static mode; None for a scored head."""


@dataclass(frozen=True, eq=False)
class StaticLists:
    """The key tiles that each of n query tiles keeps; on CPU, cached, read-only.

    indices: (n, K) int32, ascending, 0 from `counts` on; K is at least 1. counts: (n,) int32.
    """

    indices: torch.Tensor
    counts: torch.Tensor

    def map(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """(n, n) bool: does query tile i (dim 0) keep key tile j; (m, n) of the query tiles `rows`.

        rows: (m,) int64 on CPU, or None for all n.
        """
        tiles, width = self.indices.shape
        indices, counts = self.indices, self.counts
        if rows is not None:
            indices, counts = indices[rows], counts[rows]
        listed = torch.arange(width, device="cpu") < counts[:, None]
        # what is not listed goes to a column that is cut off
        places = torch.where(listed, indices, tiles).long()
        keep = torch.zeros(len(indices), tiles + 1, dtype=torch.bool, device="cpu")
        return keep.scatter_(1, places, True)[:, :tiles]


@lru_cache(maxsize=256)
def static_lists(layout: Layout, shape: _Sides, mode: StaticMode) -> StaticLists:
    """What a head with `mode` and tiles of `shape` keeps, before `key_valid` takes tiles out.

    A query tile applies the rule in every video segment of the keys from its own place: in its own
    segment where it stands, in others at the same share of every side of the grid.
    """
    grids = [_tile_sides(video.grid, shape) for _, video in layout.videos]
    counts, flat = [], []
    for q_sides in grids:
        for rows in torch.arange(math.prod(q_sides), device="cpu").split(_ROWS_AT_ONCE):
            keep = torch.cat([_kept(mode, rows, q_sides, k_sides) for k_sides in grids], dim=1)
            counts.append(keep.sum(1).int())
            flat.append(keep.nonzero()[:, 1].int())
    count = torch.cat(counts)
    width = max(int(count.max()), 1)
    indices = torch.zeros(len(count), width, dtype=torch.int32, device="cpu")
    indices[torch.arange(width, device="cpu") < count[:, None]] = torch.cat(flat)
    return StaticLists(indices, count)


@lru_cache(maxsize=4096)
def mode_density(layout: Layout, shape: _Sides, mode: StaticMode) -> float:
    """The share of tile pairs, over all video segments, that `mode` keeps."""
    counts = static_lists(layout, shape, mode).counts
    return int(counts.sum()) / len(counts) ** 2


def _kept(mode: StaticMode, rows: torch.Tensor, q_sides: _Sides, k_sides: _Sides) -> torch.Tensor:
    """(r, m) bool: what query tiles `rows` (r,) of one segment keep of another's m tiles."""
    tiles = math.prod(k_sides)
    if mode.kind in ("full", "skip"):
        kept = mode.kind == "full"
        return torch.full((len(rows), tiles), kept, dtype=torch.bool, device="cpu")
    place = _proportional(rows, q_sides, k_sides)[:, None]
    keys = torch.arange(tiles, device="cpu")
    if mode.kind == "diagonal":
        return (place - keys).abs() <= mode.reach[0]
    if mode.kind == "multi_diagonal":
        frame = k_sides[1] * k_sides[2]
        near = (place // frame - keys // frame).abs() <= mode.reach[0]
        return near & ((place % frame - keys % frame).abs() <= mode.reach[1])
    stripe = torch.zeros(tiles, dtype=torch.bool, device="cpu")
    stripe[[_tile_at(column, k_sides) for column in mode.columns]] = True
    return stripe | (place == keys)


def _proportional(rows: torch.Tensor, q_sides: _Sides, k_sides: _Sides) -> torch.Tensor:
    """The tiles of one grid that hold the middles of tiles `rows` of another; itself if equal."""
    at = (
        rows // (q_sides[1] * q_sides[2]),
        rows // q_sides[2] % q_sides[1],
        rows % q_sides[2],
    )
    t, h, w = ((2 * x + 1) * k // (2 * q) for x, q, k in zip(at, q_sides, k_sides, strict=True))
    return (t * k_sides[1] + h) * k_sides[2] + w


def _tile_at(position: Position, sides: _Sides) -> int:
    t, h, w = (
        min(int(Fraction(share).limit_denominator(_LARGEST_DENOMINATOR) * side), side - 1)
        for share, side in zip(position, sides, strict=True)
    )
    return (t * sides[1] + h) * sides[2] + w


def _tile_sides(grid: _Sides, shape: _Sides) -> _Sides:
    t, h, w = (-(-side // step) for side, step in zip(grid, shape, strict=True))
    return (t, h, w)


def _is_reach(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_REACH


def _position(value: object) -> Position:
    shares = value if isinstance(value, list | tuple) else ()
    if len(shares) == 3 and all(isinstance(share, float | int) for share in shares):
        # as the op hands them on, so that a mode equals what becomes of it there
        t, h, w = (_float32(share) for share in shares)
        if all(0.0 <= share < 1.0 for share in (t, h, w)):  # also refuses NaN
            return (t, h, w)
    raise PlanError(f"column {value!r}: must be (t, h, w), each at least 0 and below 1")


def _float32(value: float) -> float:
    try:
        found: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.inf
    return found


def encode_modes(
    modes: Modes | None, width: int | None = None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The form the op takes: (modes (H, 3) int32, columns (H, C, 3) float32), on CPU.

    A row of modes is (kind, reach[0], reach[1]), zeros for a scored head. Unused columns are -1.
    width: C; None is the most columns of any head. columns is None where C is 0. Without modes both
    are None.
    """
    if modes is None:
        return None, None
    codes = [(0, 0, 0) if m is None else (KINDS.index(m.kind) + 1, *m.reach) for m in modes]
    columns = [() if mode is None else mode.columns for mode in modes]
    if width is None:
        width = max(len(head) for head in columns)
    table = torch.tensor(codes, dtype=torch.int32, device="cpu")
    if width == 0:
        return table, None
    filled = [[*head, *[_UNUSED] * (width - len(head))] for head in columns]
    return table, torch.tensor(filled, dtype=torch.float32, device="cpu")


def decode_modes(modes: torch.Tensor | None, columns: torch.Tensor | None) -> Modes | None:
    """Inverse of `encode_modes`. Raises PlanError on anything else."""
    if modes is None:
        if columns is not None:
            raise PlanError("columns without modes: give both or no columns")
        return None
    if modes.dim() != 2 or modes.shape[1] != 3 or not _on_cpu(modes, torch.int32):
        raise PlanError(
            f"modes is {modes.dtype} of shape {tuple(modes.shape)} on {modes.device}: must be "
            "torch.int32 of shape (H, 3) on cpu"
        )
    heads = modes.shape[0]
    if columns is None:
        columns = torch.empty(heads, 0, 3, device="cpu")
    if columns.shape != (heads, *columns.shape[1:2], 3) or not _on_cpu(columns, torch.float32):
        raise PlanError(
            f"columns is {columns.dtype} of shape {tuple(columns.shape)} on {columns.device}: must "
            f"be torch.float32 of shape ({heads}, C, 3) on cpu"
        )
    rows = zip(modes.tolist(), columns.tolist(), strict=True)
    return _decoded(tuple((tuple(code), tuple(map(tuple, given))) for code, given in rows))


def _on_cpu(table: torch.Tensor, dtype: torch.dtype) -> bool:
    return table.dtype == dtype and table.device.type == "cpu"


@lru_cache(maxsize=4096)  # layers x grids, met on every call
def _decoded(heads: Sequence[tuple[tuple[int, int, int], tuple[Position, ...]]]) -> Modes:
    found: list[StaticMode | None] = []
    for (kind, *reach), columns in heads:
        given = tuple(column for column in columns if column != _UNUSED)
        if not 0 <= kind <= len(KINDS):
            raise PlanError(f"mode {kind}: must be from 0 to {len(KINDS)}")
        if kind:
            found.append(StaticMode(KINDS[kind - 1], (reach[0], reach[1]), given))
        elif any(reach) or given:
            raise PlanError(f"reach {tuple(reach)} or columns {given} of a scored head: must be 0")
        else:
            found.append(None)
    return tuple(found)
