"""What a sidecar may contain: its parts as dataclasses that cannot hold an invalid value."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import SidecarError, shown
from .fingerprint import FINGERPRINT_LENGTH
from .kernels.plan import TileShape
from .kernels.static_modes import MAX_COLUMNS, Modes, StaticMode

VERSION = 2
"""Version of the sidecar format that this release reads and writes."""

SIDECAR_SCORES = ("closed_form", "mean", "projection")

MAX_HEADS = 4096
MAX_HEAD_DIM = 1024
MAX_LAYERS = 10_000
MAX_SIDE = 65_536
"""Largest side of a token grid."""

MAX_HEAD_PLANS = 2**20
"""Most (grid, layer, head) entries of one sidecar; a large model with 100 grids has 160,000."""

MAX_PROJECTION_VALUES = 2**31
"""Most projection values of one sidecar (8 GiB), and most factor values; a 14B model has 0.16e9."""

MAX_POSITIONS = 2**22
"""Most positions of stripe columns in one sidecar, unused ones included."""

_MAX_NAME = 512
_MAX_NESTING = 32

Grid = tuple[int, int, int]
"""(T, H, W): frames, rows and columns of tokens."""

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def whole(value: object, what: str, least: int, most: int) -> int:
    """`value` if it is an int (not a bool) from `least` to `most`, else SidecarError."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise SidecarError(f"{what} is {shown(value)}: must be an int from {least} to {most}")
    return value


def plain_name(value: object, what: str) -> str:
    """`value` if it is a printable name without "/", else SidecarError."""
    if (
        isinstance(value, str)
        and 0 < len(value) <= _MAX_NAME
        and value.isprintable()
        and "/" not in value
    ):
        return value
    raise SidecarError(
        f"{what} is {shown(value)}: must be 1 to {_MAX_NAME} printable characters without '/'"
    )


def checked_grid(value: object, what: str) -> Grid:
    """`value` if it is a tuple of three sides from 1 to `MAX_SIDE`, else SidecarError."""
    if not isinstance(value, tuple) or len(value) != 3:
        raise SidecarError(f"{what} is {shown(value)}: must be three ints (T, H, W)")
    for side in value:
        if type(side) is not int or not 1 <= side <= MAX_SIDE:
            raise SidecarError(
                f"{what} is {shown(value)}: every side must be an int from 1 to {MAX_SIDE}"
            )
    return value


def checked_density(value: object, what: str) -> float:
    """`value` if it is a number in (0, 1], else SidecarError. Refuses NaN."""
    if isinstance(value, float | int) and not isinstance(value, bool) and 0.0 < value <= 1.0:
        return float(value)
    raise SidecarError(f"{what} is {shown(value)}: must be a number above 0 and at most 1")


@dataclass(frozen=True)
class LayerCard:
    """One attention layer of the model a sidecar was made for.

    name: its qualified name, such as "blocks.0.attn1". heads, head_dim: of its queries.
    fingerprint: see `veda_compile.fingerprint`, or None where it has no small parameters.
    """

    name: str
    heads: int
    head_dim: int
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        plain_name(self.name, "a layer name")
        whole(self.heads, f"heads of layer {self.name}", 1, MAX_HEADS)
        whole(self.head_dim, f"head_dim of layer {self.name}", 1, MAX_HEAD_DIM)
        mark = self.fingerprint
        pattern = rf"[0-9a-f]{{{FINGERPRINT_LENGTH}}}"
        if mark is not None and not (isinstance(mark, str) and re.fullmatch(pattern, mark)):
            raise SidecarError(
                f"fingerprint of layer {self.name} is {shown(mark)}: must be "
                f"{FINGERPRINT_LENGTH} lowercase hexadecimal digits or None"
            )


@dataclass(frozen=True)
class ModelCard:
    """The model a sidecar was made for: its class name and attention layers, in order."""

    model_class: str
    layers: tuple[LayerCard, ...]

    def __post_init__(self) -> None:
        plain_name(self.model_class, "the model class")
        if not isinstance(self.layers, tuple) or not 1 <= len(self.layers) <= MAX_LAYERS:
            count = len(self.layers) if isinstance(self.layers, tuple | list) else self.layers
            raise SidecarError(f"{shown(count)} layers: must be a tuple of 1 to {MAX_LAYERS}")
        seen: set[str] = set()
        for layer in self.layers:
            if not isinstance(layer, LayerCard):
                raise SidecarError(f"a layer is {shown(layer)}: must be a LayerCard")
            if layer.name in seen:
                raise SidecarError(f"layer {layer.name} appears twice: names must be unique")
            seen.add(layer.name)


@dataclass(frozen=True)
class GridPlan:
    """What every head of every layer keeps on one token grid.

    grid: (T, H, W) tokens. tile_shapes: per layer, per head, (pt, ph, pw) tokens.
    density: per layer, per head, share of key tiles kept, in (0, 1]; of static heads not used.
    modes: per layer, per head its static mode, None for a scored head; None for a layer, or in
        place of all, means that no head of it is static.
    Lists are taken too and kept as tuples; values are checked where the heads are known.
    """

    grid: Grid
    tile_shapes: tuple[tuple[TileShape, ...], ...]
    density: tuple[tuple[float, ...], ...]
    modes: tuple[Modes | None, ...] | None = None

    def __post_init__(self) -> None:
        checked_grid(self.grid, "grid")
        try:
            shapes = tuple(tuple(tuple(s) for s in layer) for layer in self.tile_shapes)
            density = tuple(tuple(layer) for layer in self.density)
            modes = None
            if self.modes is not None:
                modes = tuple(None if layer is None else tuple(layer) for layer in self.modes)
            hash((shapes, density, modes))
        except TypeError as error:
            raise SidecarError(
                f"grid {self.grid}: tile_shapes must be (pt, ph, pw) per layer and head, density a "
                f"number and modes a StaticMode or None per layer and head ({error})"
            ) from error
        object.__setattr__(self, "tile_shapes", shapes)
        object.__setattr__(self, "density", density)
        if modes is not None:
            modes = tuple(layer if layer is not None and any(layer) else None for layer in modes)
        object.__setattr__(self, "modes", modes if modes is not None and any(modes) else None)
        if self.modes is not None and len(self.modes) != len(self.tile_shapes):
            raise SidecarError(
                f"grid {self.grid} has modes for {len(self.modes)} layers and tile shapes for "
                f"{len(self.tile_shapes)}: give one of each per layer"
            )
        if len(self.tile_shapes) != len(self.density):
            raise SidecarError(
                f"grid {self.grid} has tile shapes for {len(self.tile_shapes)} layers and "
                f"densities for {len(self.density)}: give one of each per layer"
            )

    def check_layer(self, index: int, card: LayerCard, tile_size: int) -> None:
        """Raise SidecarError unless layer `index` has a valid plan for the layer of `card`."""
        where = f"layer {card.name} on grid {self.grid}"
        shapes, density = self.tile_shapes[index], self.density[index]
        if len(shapes) != card.heads or len(density) != card.heads:
            raise SidecarError(
                f"{where} has {len(shapes)} tile shapes and {len(density)} densities for "
                f"{card.heads} heads: give one of each per head"
            )
        for shape in set(shapes):
            checked_grid(shape, f"tile shape of {where}")
            if math.prod(shape) != tile_size:
                raise SidecarError(
                    f"tile shape {shape} of {where} holds {math.prod(shape)} tokens: "
                    f"must hold the sidecar's tile size, {tile_size}"
                )
        for value in set(density):
            checked_density(value, f"density of {where}")
        modes = self.modes_of(index)
        if modes is not None and len(modes) != card.heads:
            raise SidecarError(
                f"{where} has {len(modes)} modes for {card.heads} heads: give one per head"
            )
        for mode in modes or ():
            if mode is not None and not isinstance(mode, StaticMode):
                raise SidecarError(
                    f"mode of {where} is {shown(mode)}: must be a StaticMode, or None for a "
                    "scored head"
                )

    def modes_of(self, index: int) -> Modes | None:
        """The static modes of layer `index`, None where all its heads are scored."""
        return None if self.modes is None else self.modes[index]


@dataclass(frozen=True)
class LayerExtent:
    """How much of what not every layer has a file holds for one layer.

    static: whether a head is static on some grid. columns: the most columns of any stripe.
    rank: of its factors, 0 where it has none.
    """

    static: bool
    columns: int
    rank: int

    def check(self, card: LayerCard) -> None:
        """Raise SidecarError unless the layer of `card` can have as much."""
        if not isinstance(self.static, bool):
            raise SidecarError(
                f"static of layer {card.name} is {shown(self.static)}: must be true or false"
            )
        most = MAX_COLUMNS if self.static else 0
        whole(self.columns, f"columns of layer {card.name}", 0, most)
        whole(self.rank, f"rank of layer {card.name}", 0, card.head_dim)


def check_extents(model: ModelCard, grids: int, extents: Sequence[LayerExtent]) -> None:
    """Raise SidecarError if all columns, or all factors, together are absurdly large."""
    both = list(zip(model.layers, extents, strict=True))
    positions = grids * sum(card.heads * extent.columns for card, extent in both)
    if positions > MAX_POSITIONS:
        raise SidecarError(
            f"stripes of {positions} positions: at most {MAX_POSITIONS} are allowed, leave out "
            "grids or columns"
        )
    values = sum(2 * card.heads * card.head_dim * extent.rank for card, extent in both)
    if values > MAX_PROJECTION_VALUES:
        raise SidecarError(
            f"factors of {values} values: at most {MAX_PROJECTION_VALUES} are allowed, use a "
            "lower rank"
        )


def check_totals(model: ModelCard, grids: int, score: str) -> None:
    """Raise SidecarError if all plans, or all projections, together are absurdly large."""
    entries = grids * sum(card.heads for card in model.layers)
    if entries > MAX_HEAD_PLANS:
        raise SidecarError(
            f"{grids} grids for {len(model.layers)} layers make {entries} head plans: at most "
            f"{MAX_HEAD_PLANS} are allowed, leave out grids"
        )
    values = sum(math.prod(projection_shape(card)) for card in model.layers)
    if score == "projection" and values > MAX_PROJECTION_VALUES:
        raise SidecarError(
            f"projections of {values} values: at most {MAX_PROJECTION_VALUES} are allowed, use "
            "score 'closed_form'"
        )


def projection_shape(card: LayerCard) -> tuple[int, int, int, int]:
    """(2, heads, 3 * head_dim, head_dim): [0] for q and [1] for k, on [mean | max | min]."""
    return (2, card.heads, 3 * card.head_dim, card.head_dim)


def plain_json(value: object, where: str, nesting: int = 0) -> Json:
    """A copy of `value` as plain JSON data, tuples as lists. Raises SidecarError naming the place.

    Refuses what would not come back from a file as it went in: NaN, infinities, ints beyond 64
    bits, keys that are no strings, and every type but None, bool, int, float, str, list, dict.
    """
    if nesting > _MAX_NESTING:
        raise SidecarError(f"{where} is nested deeper than {_MAX_NESTING} levels: flatten it")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, list | tuple):
        return [plain_json(x, f"{where}[{i}]", nesting + 1) for i, x in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise SidecarError(f"{where} has the key {shown(key)}: keys must be strings")
        return {k: plain_json(x, f"{where}.{k}", nesting + 1) for k, x in value.items()}
    raise SidecarError(
        f"{where} is {shown(value)} ({type(value).__name__}): must be plain JSON data "
        "(None, bool, 64-bit int, finite float, str, list, dict)"
    )
