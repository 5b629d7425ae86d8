"""All stand-ins of original code bases."""

from __future__ import annotations

from benchmarks.originals import hunyuan, ltx, open_sora, packed, wan
from benchmarks.originals.parts import Original

STYLES: tuple[Original, ...] = (
    *wan.STYLES,
    *hunyuan.STYLES,
    *ltx.STYLES,
    *open_sora.STYLES,
    *packed.STYLES,
)
"""Names are unique."""


def style(name: str) -> Original:
    """The stand-in of that name. Raises KeyError."""
    return {known.name: known for known in STYLES}[name]
