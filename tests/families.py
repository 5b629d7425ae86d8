"""The small transformers by family: their inputs, attention layers, and where their text stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from small_transformers import (
    TEXT,
    Grid,
    Inputs,
    cogvideox,
    cogvideox_inputs,
    hunyuan,
    hunyuan_inputs,
    ltx,
    ltx_inputs,
    wan,
    wan_inputs,
)

from veda_compile.kernels.layout import Extra, Layout, Segment, Video


@dataclass(frozen=True)
class Family:
    """text: "before" or "after" the video in every sequence, or "" where there is none in it."""

    build: Callable[[], Any]
    inputs: Callable[[Grid], Inputs]
    layers: tuple[str, ...]
    text: str = ""

    def layout(self, grid: Grid) -> Layout:
        """Where the tokens of a call on this grid stand."""
        video: tuple[Segment, ...] = (Video(*grid),)
        text: tuple[Segment, ...] = (Extra(TEXT),)
        return Layout({"": video, "before": text + video, "after": video + text}[self.text])


def _layers(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.format(number) for number in range(2))


FAMILIES = {
    "wan": Family(lambda: wan(layers=2), wan_inputs, _layers("blocks.{}.attn1")),
    "hunyuan": Family(
        hunyuan,
        hunyuan_inputs,
        _layers("transformer_blocks.{}.attn") + _layers("single_transformer_blocks.{}.attn"),
        "after",
    ),
    "cogvideox": Family(
        cogvideox, cogvideox_inputs, _layers("transformer_blocks.{}.attn1"), "before"
    ),
    "ltx": Family(ltx, ltx_inputs, _layers("transformer_blocks.{}.attn1")),
}
