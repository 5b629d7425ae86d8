"""Diffusers' models at their real sizes with random weights, and the inputs of one step."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

Grid = tuple[int, int, int]
Inputs = dict[str, Any]

_WAN = "diffusers.models.transformers.transformer_wan"
HUNYUAN = "diffusers.models.transformers.transformer_hunyuan_video"


@dataclass(frozen=True)
class Model:
    """One model. grid: of its tokens. layers: built, of so many in the real one.

    build: the module, from the number of layers; inputs: of one step, from the grid.
    masked: the file of diffusers whose attention gets a key mask that is True everywhere.
    densities: to time, most important first.
    """

    name: str
    grid: Grid
    layers: int
    real_layers: int
    build: Callable[[int], nn.Module]
    inputs: Callable[[Grid, torch.dtype], Inputs]
    masked: str | None = None
    densities: tuple[float, ...] = (0.1, 0.05)

    def make(self, device: str, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
        """In eval mode, without gradients; rotary tables stay float32, as when loaded."""
        with torch.device(device):
            torch.manual_seed(0)
            model = self.build(self.layers).eval().requires_grad_(False)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
            return model, self.inputs(self.grid, dtype)


def _wan(layers: int, **config: Any) -> nn.Module:
    made: nn.Module = _class(
        "diffusers.models.transformers.transformer_wan", "WanTransformer3DModel"
    )(num_layers=layers, **config)
    return made


def _wan_inputs(
    grid: Grid, dtype: torch.dtype, channels: int = 16, text: int = 4096, batch: int = 1
) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, channels, t, 2 * h, 2 * w, dtype=dtype),
        "timestep": torch.tensor([500] * batch),
        "encoder_hidden_states": torch.randn(batch, 512, text, dtype=dtype),
        "return_dict": False,
    }


def _hunyuan(layers: int, **config: Any) -> nn.Module:
    """Of its layers, one in three is of two streams."""
    made: nn.Module = _class(HUNYUAN, "HunyuanVideoTransformer3DModel")(
        num_layers=layers // 3, num_single_layers=layers - layers // 3, **config
    )
    return made


def _hunyuan_inputs(
    grid: Grid, dtype: torch.dtype, channels: int = 16, text: int = 4096, pooled: int = 768
) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": torch.randn(1, channels, t, 2 * h, 2 * w, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 256, text, dtype=dtype),
        "encoder_attention_mask": torch.ones(1, 256, dtype=torch.long),
        "pooled_projections": torch.randn(1, pooled, dtype=dtype),
        "guidance": torch.tensor([6000.0], dtype=dtype),
        "return_dict": False,
    }


def _class(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def _wan_1_3b(layers: int) -> nn.Module:
    return _wan(layers, num_attention_heads=12, ffn_dim=8960)


def _wan_12b(layers: int) -> nn.Module:
    """Of 12 billion parameters with 44 layers: Wan's architecture, other widths."""
    return _wan(layers, num_attention_heads=32, ffn_dim=16384)


MODELS = (
    Model("wan2.1-14b 720p 81 frames", (21, 45, 80), 4, 40, _wan, _wan_inputs,
          densities=(0.05, 0.1, 0.2, 0.15)),
    Model("12b class 245,760 tokens", (60, 64, 64), 2, 44, _wan_12b, _wan_inputs,
          densities=(0.05, 0.1)),
    Model("wan2.1-14b 720p 81 frames, batch 2", (21, 45, 80), 3, 40, _wan,
          partial(_wan_inputs, batch=2), densities=(0.05, 0.1)),
    Model("hunyuanvideo 720p 129 frames", (33, 45, 80), 6, 60, _hunyuan, _hunyuan_inputs,
          HUNYUAN, densities=(0.1, 0.05)),
    Model("wan2.1-1.3b 480p 81 frames", (21, 30, 52), 6, 30, _wan_1_3b, _wan_inputs,
          densities=(0.1, 0.2, 0.05)),
    Model("wan2.1-1.3b 480p 81 frames, all", (21, 30, 52), 30, 30, _wan_1_3b, _wan_inputs),
)  # fmt: skip
"""Most important first."""


def _tiny_wan(layers: int) -> nn.Module:
    return _wan(
        layers, num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=32,
    )  # fmt: skip


def _tiny_hunyuan(layers: int) -> nn.Module:
    return _hunyuan(
        layers, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=64,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(16, 24, 24),
    )  # fmt: skip


SMOKE_MODELS = (
    Model(
        "tiny wan", (3, 6, 8), 2, 2, _tiny_wan,
        lambda grid, dtype: _wan_inputs(grid, dtype, 4, 16),
    ),
    Model(
        "tiny hunyuanvideo", (3, 6, 8), 3, 3, _tiny_hunyuan,
        lambda grid, dtype: _hunyuan_inputs(grid, dtype, 4, 16, 8), HUNYUAN,
    ),
)  # fmt: skip
