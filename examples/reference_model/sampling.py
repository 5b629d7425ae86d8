# SPDX-License-Identifier: Apache-2.0
"""Flow-matching sampler, contact sheets, and the loader of the reference model.

Importing this module needs torch alone; diffusers, PIL and the sibling ``dataset.py`` are loaded by
the functions that use them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

FOLDER: Final[Path] = Path(__file__).resolve().parent
WEIGHTS: Final[Path] = FOLDER / "weights"
DEFAULT_SIZE: Final[tuple[int, int, int]] = (16, 32, 32)
"""Frames, height, width in pixels: 16 x 16 x 16 = 4096 tokens with the patch (1, 2, 2)."""

StepCallback = Callable[[int, int, Tensor], None]
"""Called as ``callback(step, steps, latents)`` after each step; latents is (B, C, T, H, W)."""


def _dataset() -> ModuleType:
    """The sibling ``dataset.py``, however this module itself was imported."""
    name = "reference_model_dataset"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / "dataset.py")
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot load {FOLDER / 'dataset.py'}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def noise_levels(steps: int, shift: float = 3.0) -> Tensor:
    """Noise levels of a sampling run, from pure noise to a clean clip.

    Args:
        steps: number of Euler steps.
        shift: 1 spaces the levels evenly; larger values spend more steps at high noise.

    Returns:
        float64 ``(steps + 1,)``, falling from 1 to 0.
    """
    if steps < 1 or shift <= 0.0:
        raise ValueError(f"need steps >= 1 and shift > 0, got {steps} and {shift}")
    s = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return shift * s / (1.0 + (shift - 1.0) * s)


def initial_noise(batch: int, size: tuple[int, int, int], seed: int, channels: int = 3) -> Tensor:
    """Standard normal noise; clip ``i`` depends on ``seed + i`` alone, not on the batch.

    Returns:
        float32 ``(batch, channels, T, H, W)`` on the CPU.
    """
    clips = [
        torch.randn((channels, *size), generator=torch.Generator().manual_seed(seed + i))
        for i in range(batch)
    ]
    return torch.stack(clips)


@torch.no_grad()
def sample_steps(
    model: Callable[..., Any],
    class_ids: Sequence[int],
    size: tuple[int, int, int] = DEFAULT_SIZE,
    steps: int = 20,
    seed: int = 0,
    *,
    guidance: float = 1.5,
    shift: float = 3.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """Draw clips step by step; see :func:`sample` for the arguments.

    Yields:
        The latents after each step, float32 ``(B, 3, T, H, W)``; the last are the clips.
    """
    data = _dataset()
    first = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    if device is None:
        device = first.device if first is not None else "cpu"
    if dtype is None:
        default = first.dtype if first is not None else torch.float32
        dtype = getattr(model, "dtype", default)
    batch = len(class_ids)
    guided = guidance != 1.0
    text = data.class_embeddings(torch.tensor(list(class_ids), dtype=torch.int64))
    if guided:
        null = data.class_embeddings(torch.full((batch,), data.NULL_CLASS, dtype=torch.int64))
        text = torch.cat([text, null])
    text = text.to(device=device, dtype=dtype)
    levels = noise_levels(steps, shift)
    x = initial_noise(batch, size, seed).to(device)
    for step in range(steps):
        now, after = float(levels[step]), float(levels[step + 1])
        inputs = torch.cat([x, x]) if guided else x
        timestep = torch.full((inputs.shape[0],), 1000.0 * now, device=device)
        velocity = model(
            hidden_states=inputs.to(dtype),
            timestep=timestep,
            encoder_hidden_states=text,
            return_dict=False,
        )[0].float()
        if guided:
            with_class, without = velocity.chunk(2)
            velocity = without + guidance * (with_class - without)
        x = x + (after - now) * velocity
        yield x


@torch.no_grad()
def sample(
    model: Callable[..., Any],
    class_ids: Sequence[int],
    size: tuple[int, int, int] = DEFAULT_SIZE,
    steps: int = 20,
    seed: int = 0,
    *,
    guidance: float = 1.5,
    shift: float = 3.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Draw clips with Euler steps along the learned flow.

    Args:
        model: called as ``model(hidden_states=..., timestep=..., encoder_hidden_states=...,
            return_dict=False)`` and returning a tuple whose first element is the velocity
            ``noise - clip``; a ``WanTransformer3DModel`` or anything that acts like one.
        class_ids: class of each clip; ``dataset.NULL_CLASS`` samples without a class.
        size: ``(T, H, W)`` in pixels; H and W even.
        steps: Euler steps.
        seed: clip ``i`` starts from the noise of ``seed + i``.
        guidance: weight of classifier-free guidance; 1 runs the class condition alone, and any
            other value doubles the batch that the model sees (class first, then no class).
        shift: see :func:`noise_levels`.
        device: where to sample; by default the device of the model's parameters, else the CPU.
        dtype: dtype of what the model is given; by default that of the model, else float32.
        callback: called after each step.

    Returns:
        float32 ``(B, 3, T, H, W)``, RGB nominally in [-1, 1], not clamped.
    """
    states = sample_steps(
        model, class_ids, size, steps, seed,
        guidance=guidance, shift=shift, device=device, dtype=dtype,
    )  # fmt: skip
    x = torch.empty(0)
    for step, x in enumerate(states):
        if callback is not None:
            callback(step, steps, x)
    return x


def to_uint8(clips: Tensor) -> Tensor:
    """Convert ``(B, 3, T, H, W)`` in [-1, 1] to uint8 ``(B, T, H, W, 3)`` on the CPU."""
    scaled = (clips.detach().float().cpu().clamp(-1.0, 1.0) + 1.0) * 127.5
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def contact_sheet(
    clips: Tensor,
    path: Path | str,
    *,
    frames: int = 8,
    scale: int = 3,
    gap: int = 2,
    labels: Sequence[str] | None = None,
) -> Path:
    """Write a PNG whose rows are clips and whose columns are frames evenly spaced in time.

    Args:
        clips: ``(B, 3, T, H, W)`` in [-1, 1].
        path: file to write.
        frames: columns, at most T.
        scale: size of a pixel on the sheet.
        gap: white space between the frames, in sheet pixels.
        labels: one text per row, drawn at its left.

    Returns:
        The path written.
    """
    from PIL import Image, ImageDraw

    pixels = to_uint8(clips)
    batch, total, height, width, _ = pixels.shape
    columns = min(frames, total)
    picks = torch.linspace(0, total - 1, columns).round().long().tolist()
    tall, wide = height * scale, width * scale
    left = 110 if labels is not None else 0
    shape = (left + columns * (wide + gap) + gap, batch * (tall + gap) + gap)
    sheet = Image.new("RGB", shape, "white")
    draw = ImageDraw.Draw(sheet)
    for row in range(batch):
        top = gap + row * (tall + gap)
        if labels is not None:
            draw.text((4, top + tall // 2 - 6), labels[row], fill="black")
        for column, index in enumerate(picks):
            frame = Image.fromarray(pixels[row, index].numpy())
            frame = frame.resize((wide, tall), Image.Resampling.NEAREST)
            sheet.paste(frame, (left + gap + column * (wide + gap), top))
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)
    return target


def load_reference_model(
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    weights: Path | str = WEIGHTS,
) -> Any:
    """Load the trained ``diffusers.WanTransformer3DModel`` of this folder, in eval mode.

    Args:
        dtype: dtype of the parameters (diffusers keeps the norms and time embedding in float32).
        device: where to put the model.
        weights: folder with ``config.json`` and the safetensors file.
    """
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(str(weights), torch_dtype=dtype)
    return model.to(device).eval().requires_grad_(False)
