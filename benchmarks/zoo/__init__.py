"""Tiny random-weight video transformers with what is true of their attention.

Every class of diffusers that attends over videos is here, in every variant that attends
otherwise, and transformers written by hand. Builders take the grid of *tokens* (T, H, W). Weights
and inputs are the same every time.
"""

from __future__ import annotations

from . import (
    cogvideox,
    cosmos,
    hunyuan,
    joint,
    kandinsky,
    ltx,
    plain,
    sana,
    separate,
    wan,
    wan_cached,
)
from .entry import Built, Entry, Grid, call
from .parts import TEXT

__all__ = ["ENTRIES", "FIRST", "TEXT", "Built", "Entry", "Grid", "call", "entry"]

ENTRIES: tuple[Entry, ...] = (
    *wan.ENTRIES,
    *wan_cached.ENTRIES,
    *hunyuan.ENTRIES,
    *cogvideox.ENTRIES,
    *ltx.ENTRIES,
    *cosmos.ENTRIES,
    *kandinsky.ENTRIES,
    *sana.ENTRIES,
    *joint.ENTRIES,
    *separate.ENTRIES,
    *plain.ENTRIES,
)
"""All models. Names are unique."""


def entry(name: str) -> Entry:
    """The entry of that name. Raises KeyError."""
    return {known.name: known for known in ENTRIES}[name]


FIRST: tuple[Entry, ...] = tuple(
    entry(name)
    for name in (
        "wan t2v", "wan t2v batch 2", "wan i2v", "wan fused qkv", "hunyuan", "hunyuan batch 2",
        "cogvideox 2b", "cogvideox 5b", "ltx batch 2", "cosmos batch 2", "plain methods",
        "plain operators", "plain einsum", "plain baddbmm", "plain float32", "plain fused qkv",
    )
)  # fmt: skip
"""A few, for quick checks."""
