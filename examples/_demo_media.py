"""Pictures of the demo: a video with both results side by side, and a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from reference_model.sampling import contact_sheet, to_uint8
from torch import Tensor

DIFFERENCE_GAIN = 4
"""How much differences are amplified in pictures; equal pixels are mid-grey."""

_FRAMES_PER_SECOND = 8
_LOOPS = 3
_SCALE = 4
_GAP = 8
_HEADER = 18


def difference(dense: Tensor, sparse: Tensor) -> Tensor:
    """Amplified difference, (B, 3, T, H, W) in [-1, 1] as its inputs; 0 where they are equal."""
    return ((sparse - dense) * DIFFERENCE_GAIN).clamp(-1.0, 1.0)


def write_contact_sheet(
    dense: Tensor, sparse: Tensor, names: Sequence[str], path: Path, frames: int = 8
) -> Path:
    """Write a PNG with three rows a clip (dense, veda, difference) and frames as columns."""
    rows, labels = [], []
    for clip, name in enumerate(names):
        a, b = dense[clip], sparse[clip]
        rows += [a, b, difference(a, b)]
        labels += [
            f"{name}\ndense",
            f"{name}\nveda",
            f"{name}\ndifference x{DIFFERENCE_GAIN}",
        ]
    return contact_sheet(torch.stack(rows), path, frames=frames, labels=labels)


def write_side_by_side(dense: Tensor, sparse: Tensor, path: Path) -> Path:
    """Write an MP4: one row a clip, columns dense, veda, amplified difference; played in a loop."""
    import imageio.v3 as iio

    columns = {
        "dense": to_uint8(dense),
        "veda": to_uint8(sparse),
        f"difference x{DIFFERENCE_GAIN}": to_uint8(difference(dense, sparse)),
    }
    frames = [_frame(columns, t) for t in range(dense.shape[2])]
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(
        path, np.stack(frames * _LOOPS), plugin="pyav", codec="libx264", fps=_FRAMES_PER_SECOND
    )
    return path


def _frame(columns: dict[str, Tensor], t: int) -> np.ndarray:
    """(height, width, 3) uint8, both sides even as the video codec wants them."""
    clips, _, height, width, _ = next(iter(columns.values())).shape
    tall, wide = height * _SCALE, width * _SCALE
    canvas = Image.new(
        "RGB",
        (_GAP + len(columns) * (wide + _GAP), _HEADER + clips * (tall + _GAP)),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    for column, (label, pixels) in enumerate(columns.items()):
        left = _GAP + column * (wide + _GAP)
        draw.text((left, 3), label, fill="black")
        for clip in range(clips):
            picture = Image.fromarray(pixels[clip, t].numpy())
            picture = picture.resize((wide, tall), Image.Resampling.NEAREST)
            canvas.paste(picture, (left, _HEADER + clip * (tall + _GAP)))
    return np.asarray(canvas)
