# SPDX-License-Identifier: Apache-2.0
"""Procedural video clips with eight classes, and the fixed conditioning of each class.

A clip shows one or two objects in front of panning stripes of two colours. The class fixes the
shape of the objects and how they move; colours, stripes, positions and velocities are random. All
lengths are in pixels and do not depend on the frame size, so that a small clip looks like a small
window on a large one and a model may learn on small clips what it needs on large ones.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

SHAPES: Final[tuple[str, ...]] = ("disc", "square", "cross", "ring")
MOTIONS: Final[tuple[str, ...]] = ("bounce", "orbit")
CLASS_NAMES: Final[tuple[str, ...]] = tuple(f"{m} {s}" for m in MOTIONS for s in SHAPES)
NUM_CLASSES: Final[int] = len(CLASS_NAMES)
NULL_CLASS: Final[int] = NUM_CLASSES
"""Class id of the empty condition, for classifier-free guidance."""

TEXT_DIM: Final[int] = 32
TEXT_TOKENS: Final[int] = 4

_MAX_OBJECTS: Final[int] = 2
_PIXELS_PER_OBJECT: Final[int] = 500
_RADIUS: Final[tuple[float, float]] = (5.4, 6.0)
_STRIPE_PERIOD: Final[float] = 12.0
_OBJECT_COLOURS: Final[tuple[tuple[float, float, float], ...]] = (
    (0.95, 0.20, 0.20),
    (0.98, 0.80, 0.10),
    (0.15, 0.80, 0.30),
    (0.15, 0.55, 1.00),
    (0.85, 0.25, 0.90),
)
_GROUND_COLOURS: Final[tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]] = (
    ((0.05, 0.10, 0.30), (0.20, 0.40, 0.65)),
    ((0.05, 0.22, 0.18), (0.25, 0.55, 0.45)),
    ((0.25, 0.08, 0.20), (0.60, 0.35, 0.50)),
    ((0.30, 0.22, 0.12), (0.80, 0.70, 0.55)),
    ((0.12, 0.12, 0.15), (0.60, 0.62, 0.68)),
)
_EDGE_COLOUR: Final[tuple[float, float, float]] = (0.02, 0.02, 0.05)


def class_embedding(class_id: int) -> Tensor:
    """Token embeddings of one class, in closed form: no text encoder is involved.

    Args:
        class_id: 0 to ``NUM_CLASSES - 1``, or ``NULL_CLASS`` for the empty condition.

    Returns:
        float32 tensor ``(TEXT_TOKENS, TEXT_DIM)``; every row is a cosine basis vector whose
        elements have unit mean square. Rows: shape, motion, pair of both, a constant.
    """
    if not 0 <= class_id <= NUM_CLASSES:
        raise ValueError(f"class_id must be in 0..{NUM_CLASSES}, got {class_id}")
    if class_id == NULL_CLASS:
        rows = [1, 1, 1, 1]
    else:
        motion, shape = divmod(class_id, len(SHAPES))
        rows = [2 + shape, 2 + len(SHAPES) + motion, 8 + class_id, 1]
    position = (torch.arange(TEXT_DIM, dtype=torch.float64) + 0.5) * math.pi / TEXT_DIM
    basis = torch.stack([math.sqrt(2.0) * torch.cos(position * row) for row in rows])
    return basis.to(torch.float32)


def class_embeddings(class_ids: Tensor) -> Tensor:
    """Token embeddings of a batch of classes.

    Args:
        class_ids: int64 ``(B,)``.

    Returns:
        float32 ``(B, TEXT_TOKENS, TEXT_DIM)``.
    """
    table = torch.stack([class_embedding(i) for i in range(NUM_CLASSES + 1)])
    return table[class_ids.cpu()].to(class_ids.device)


def _rand(gen: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Uniform float32 values in ``[low, high)``."""
    return torch.rand(shape, generator=gen) * (high - low) + low


def _background(gen: torch.Generator, batch: int, size: tuple[int, int, int]) -> Tensor:
    """Panning stripes of two colours: float32 ``(B, 3, T, H, W)`` in [0, 1]."""
    frames, height, width = size
    t = torch.arange(frames, dtype=torch.float32).view(1, frames, 1, 1)
    y = torch.arange(height, dtype=torch.float32).view(1, 1, height, 1)
    x = torch.arange(width, dtype=torch.float32).view(1, 1, 1, width)

    def per_clip(value: Tensor) -> Tensor:
        return value.view(batch, 1, 1, 1)

    tilt = torch.randint(0, 4, (batch,), generator=gen) * (math.pi / 4.0)
    across = per_clip(tilt.cos()) * x + per_clip(tilt.sin()) * y
    speed = _rand(gen, (batch,), 0.4, 1.0) * (2 * torch.randint(0, 2, (batch,), generator=gen) - 1)
    phase = _rand(gen, (batch,), 0.0, 2.0 * math.pi)
    angle = (2.0 * math.pi / _STRIPE_PERIOD) * (across - per_clip(speed) * t) + per_clip(phase)
    mix = (0.5 + 0.5 * torch.tanh(3.0 * torch.sin(angle))).unsqueeze(1)

    pairs = torch.tensor(_GROUND_COLOURS)
    pick = pairs[torch.randint(0, len(pairs), (batch,), generator=gen)].view(batch, 2, 3, 1, 1, 1)
    return pick[:, 0] + (pick[:, 1] - pick[:, 0]) * mix


def _reflect(position: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Fold positions into ``[low, high]`` as a ball bouncing between two walls would."""
    span = (high - low).clamp_min(1e-3)
    folded = torch.remainder(position - low, 2.0 * span)
    return low + span - (folded - span).abs()


def _centres(
    gen: torch.Generator, orbiting: Tensor, radius: Tensor, size: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Paths of the objects.

    Args:
        gen: random source.
        orbiting: bool ``(B, 1)``.
        radius: float32 ``(B, N)``, pixels.
        size: ``(T, H, W)``.

    Returns:
        ``(x, y)``, each float32 ``(B, N, T)``, pixels; every object stays inside the frame.
    """
    frames, height, width = size
    shape = (radius.shape[0], radius.shape[1])
    t = torch.arange(frames, dtype=torch.float32)
    extent = torch.tensor([width - 1.0, height - 1.0]).view(2, 1, 1)
    margin = radius.unsqueeze(0)

    speed = _rand(gen, shape, 0.9, 1.6)
    heading = _rand(gen, shape, 0.0, 2.0 * math.pi)
    velocity = torch.stack([speed * heading.cos(), speed * heading.sin()])
    start = margin + _rand(gen, (2, *shape), 0.0, 1.0) * (extent - 2.0 * margin)
    path = start.unsqueeze(-1) + velocity.unsqueeze(-1) * t
    bounce = _reflect(path, margin.unsqueeze(-1), (extent - margin).unsqueeze(-1))

    room = (min(height, width) - 1.0) / 2.0 - radius
    swing = torch.minimum(_rand(gen, shape, 5.0, 8.0), room.clamp_min(0.5))
    turn = (1.3 / swing.clamp_min(3.0)) * (2 * torch.randint(0, 2, shape, generator=gen) - 1)
    keep = (margin + swing).expand(2, *shape)
    pivot = keep + _rand(gen, (2, *shape), 0.0, 1.0) * (extent - 2.0 * keep)
    angle = _rand(gen, shape, 0.0, 2.0 * math.pi).unsqueeze(-1) + turn.unsqueeze(-1) * t
    circle = torch.stack([angle.cos(), angle.sin()]) * swing.unsqueeze(-1)
    orbit = pivot.unsqueeze(-1) + circle

    both = torch.where(orbiting.view(1, -1, 1, 1), orbit, bounce)
    return both[0], both[1]


def _depth(dx: Tensor, dy: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """How far inside its outline each pixel of an object lies, in pixels (negative outside).

    Args:
        dx: float32 ``(B, N, T, 1, W)``, offset from the centre.
        dy: float32 ``(B, N, T, H, 1)``.
        radius: float32 ``(B, N, 1, 1, 1)``.
        shape: int64 ``(B, 1, 1, 1, 1)``, index into ``SHAPES``.

    Returns:
        float32 ``(B, N, T, H, W)``.
    """
    ax, ay = dx.abs(), dy.abs()
    distance = torch.sqrt(dx * dx + dy * dy)
    disc = radius - distance
    square = 0.9 * radius - torch.maximum(ax, ay)
    arm, reach = 0.42 * radius, radius
    bar_x = torch.minimum(arm - ay, reach - ax)
    bar_y = torch.minimum(arm - ax, reach - ay)
    cross = torch.maximum(bar_x, bar_y)
    ring = 0.32 * radius - (distance - 0.68 * radius).abs()
    out = torch.where(shape == 0, disc, square)
    out = torch.where(shape == 2, cross, out)
    return torch.where(shape == 3, ring, out)


def make_clips(class_ids: Tensor, size: tuple[int, int, int], seed: int) -> Tensor:
    """Draw a batch of clips; the same arguments always give the same clips.

    Args:
        class_ids: int64 ``(B,)``, values 0 to ``NUM_CLASSES - 1``.
        size: ``(T, H, W)``, frames, height and width in pixels; H and W at least 20.
        seed: seed of every random choice.

    Returns:
        float32 ``(B, 3, T, H, W)``, RGB in [-1, 1].
    """
    frames, height, width = size
    if min(height, width) < 20 or frames < 1:
        raise ValueError(f"clips need at least 1 x 20 x 20, got {size}")
    batch = int(class_ids.shape[0])
    gen = torch.Generator().manual_seed(seed)
    clip = _background(gen, batch, size)

    most = max(1, min(_MAX_OBJECTS, round(height * width / _PIXELS_PER_OBJECT)))
    count = torch.randint(1, most + 1, (batch,), generator=gen)
    radius = _rand(gen, (batch, most), *_RADIUS)
    motion = torch.div(class_ids, len(SHAPES), rounding_mode="floor")
    shape = (class_ids % len(SHAPES)).view(batch, 1, 1, 1, 1)
    cx, cy = _centres(gen, (motion == 1).view(batch, 1), radius, size)
    dx = torch.arange(width, dtype=torch.float32) - cx.view(batch, most, frames, 1, 1)
    dy = torch.arange(height, dtype=torch.float32).view(-1, 1) - cy.view(batch, most, frames, 1, 1)
    depth = _depth(dx, dy, radius.view(batch, most, 1, 1, 1), shape)

    palette = torch.tensor(_OBJECT_COLOURS)
    order = torch.rand((batch, len(palette)), generator=gen).argsort(dim=1)[:, :most]
    colours = palette[order].view(batch, most, 3, 1, 1, 1)
    edge = torch.tensor(_EDGE_COLOUR).view(1, 3, 1, 1, 1)
    for n in range(most):
        shown = (count > n).view(batch, 1, 1, 1, 1)
        inside = depth[:, n].unsqueeze(1)
        body = (inside + 0.5).clamp(0.0, 1.0) * shown
        fill = (inside - 0.5).clamp(0.0, 1.0)
        core = 0.55 * (inside - 2.4).clamp(0.0, 1.0)
        colour = colours[:, n] + core * (1.0 - colours[:, n])
        clip = clip + body * (edge + fill * (colour - edge) - clip)
    return clip * 2.0 - 1.0
