"""q, k, v of the reference model on clips of a split."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .rule import Site
from .splits import Split

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Size = tuple[int, int, int]
"""Frames, height and width in pixels; height and width even."""
SIZE: Size = (16, 32, 32)
GRID = (16, 16, 16)
"""Tokens: the model's patch is (1, 2, 2)."""


def grid_of(size: Size) -> tuple[int, int, int]:
    """The tokens (T, H, W) of clips of a size."""
    return (size[0], size[1] // 2, size[2] // 2)


def reference_model() -> Any:
    """The trained model, in eval mode on CPU."""
    _import_examples()
    from sampling import load_reference_model

    return load_reference_model()


def record(model: Any, split: Split, count: int, size: Size = SIZE) -> Iterator[list[Site]]:
    """The sites of every layer for each of `count` probes of a split: noised clips of the data."""
    grid = grid_of(size)
    _import_examples()
    from _demo_attention import record_attention
    from dataset import class_embeddings, make_clips

    for label, level, seed in split.probes(count):
        labels = torch.tensor([label])
        clip = make_clips(labels, size, seed)
        noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
        inputs = {
            "hidden_states": (1 - level) * clip + level * noise,
            "timestep": torch.tensor([1000.0 * level]),
            "encoder_hidden_states": class_embeddings(labels),
            "return_dict": False,
        }
        yield [
            Site(q.contiguous(), k.contiguous(), v.contiguous(), grid, layer)
            for layer, (q, k, v) in enumerate(record_attention(model, inputs))
        ]


def sample(model: Any, label: int, size: Size, steps: int, seed: int) -> torch.Tensor:
    """(1, 3, T, H, W): one clip, without guidance."""
    _import_examples()
    from sampling import sample as sampled

    clip: torch.Tensor = sampled(model, [label], size, steps, seed, guidance=1.0)
    return clip


def _import_examples() -> None:
    """The examples are scripts, not a package: they import each other by bare names."""
    for folder in (_EXAMPLES / "reference_model", _EXAMPLES):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
