"""Hand-written transformers: see `benchmarks.plain_dits`."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import plain_dits
from benchmarks.plain_dits import PlainDiT

from .entry import Built, Entry, Grid

SITES = ("blocks.0", "blocks.1")


def _plain(grid: Grid, batch: int, attend: plain_dits.Attend, fused: bool = False) -> Built:
    t, h, w = grid
    model = PlainDiT(attend, fused=fused)
    return model, {"latents": torch.randn(batch, 4, t, 2 * h, 2 * w)}


def _entry(name: str, attend: plain_dits.Attend, batch: int, fused: bool = False) -> Entry:
    build = partial(_plain, attend=attend, fused=fused)
    return Entry(f"plain {name}", build, SITES, batch=batch, blocks=("blocks",), hint="regional")


ENTRIES = (
    _entry("methods", plain_dits.by_methods, 1),
    _entry("operators", plain_dits.by_operators, 2),
    _entry("einsum", plain_dits.by_einsum, 2),
    _entry("baddbmm", plain_dits.by_baddbmm, 2),
    _entry("float32", plain_dits.by_float32, 1),
    _entry("fused qkv", F.scaled_dot_product_attention, 2, fused=True),
)
"""One for every usual way to spell attention out."""
