"""Kandinsky 5 and 6: channels last; some of them sparse already."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch

from .entry import Built, Entry, Grid
from .parts import TEXT, diffusers_class, layers

CONFIG: dict[str, Any] = {
    "in_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "out_visual_dim": 4,
    "patch_size": (1, 2, 2),
    "model_dim": 64,
    "ff_dim": 64,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (8, 12, 12),
    "visual_cond": True,
}
SITES = layers("visual_transformer_blocks.{}.self_attention", 2)
SITES_6 = layers("visual_transformer_blocks.{}.video_dec_block.self_attention", 2)


def _inputs(grid: Grid, batch: int) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, t, 2 * h, 2 * w, 9),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "pooled_projections": torch.randn(batch, 8),
        "timestep": torch.full((batch,), 500.0),
        "return_dict": False,
    }


def _kandinsky_5(grid: Grid, batch: int, sparse: bool = False) -> Built:
    t, h, w = grid
    model = diffusers_class("transformer_kandinsky", "Kandinsky5Transformer3DModel")(**CONFIG)
    given = _inputs(grid, batch)
    given["visual_rope_pos"] = [torch.arange(side) for side in grid]
    given["text_rope_pos"] = torch.arange(TEXT)
    if sparse:
        _use_flex(model.visual_transformer_blocks)
        module = "diffusers.pipelines.kandinsky5.pipeline_kandinsky"
        pipeline = importlib.import_module(module).Kandinsky5T2VPipeline
        near = pipeline.fast_sta_nabla(t, h // 8, w // 8, 3, 3, 3, device="cpu")
        given["sparse_params"] = {
            "sta_mask": near[None, None],
            "attention_type": "nabla",
            "to_fractal": True,
            "P": 0.8,
            "wT": 3,
            "wH": 3,
            "wW": 3,
            "add_sta": True,
            "visual_shape": grid,
            "method": "topcdf",
        }
    return model, given


def _use_flex(blocks: Any) -> None:
    """Flexible attention for these blocks only. The model's own `set_attention_backend` would
    change the backend of every model of this process."""
    for block in blocks:
        block.self_attention.processor._attention_backend = "flex"


AUDIO = 9


def _kandinsky_6(grid: Grid, batch: int, audio: bool = True) -> Built:
    model = diffusers_class("transformer_kandinsky6", "Kandinsky6Transformer3DModel")(
        **CONFIG, in_audio_dim=6, out_audio_dim=6
    )
    given = _inputs(grid, batch)
    if audio:
        given["audio_hidden_states"] = torch.randn(batch, AUDIO, 6)
    return model, given


def _kandinsky_6_sr(grid: Grid, batch: int) -> Built:
    t, h, w = grid
    model = diffusers_class("transformer_kandinsky6_sr", "Kandinsky6SRTransformer3DModel")(
        in_visual_dim=4, out_visual_dim=4, time_dim=16, patch_size=(1, 1, 1), model_dim=64,
        ff_dim=64, num_visual_blocks=2, axes_dims=(8, 12, 12),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(batch, t, h, w, 9),
        "timestep": torch.full((batch,), 500.0),
        "return_dict": False,
    }


SPARSE = {"BLOCK_MASK": 2}
"""A mask that depends on the data, over tokens in blocks of 8 x 8."""

ENTRIES = (
    Entry("kandinsky 5", _kandinsky_5, SITES, {"CROSS_ATTENTION": 2, "TEXT_ONLY": 1},
          model="Kandinsky5Transformer3DModel", latent="BTHWC", half=True),
    Entry("kandinsky 5 nabla", partial(_kandinsky_5, sparse=True), (),
          {"CROSS_ATTENTION": 2, "TEXT_ONLY": 1, **SPARSE}, model="Kandinsky5Transformer3DModel",
          latent="BTHWC", unit=(1, 8, 8), batches=(1,), half=True),
    Entry("kandinsky 6", _kandinsky_6, SITES_6, {"CROSS_ATTENTION": 8, "TEXT_ONLY": 4},
          model="Kandinsky6Transformer3DModel", latent="BTHWC", half=True),
    Entry("kandinsky 6 silent", partial(_kandinsky_6, audio=False), SITES_6,
          {"CROSS_ATTENTION": 2, "TEXT_ONLY": 2}, model="Kandinsky6Transformer3DModel",
          latent="BTHWC", half=True),
    Entry("kandinsky 6 sr", _kandinsky_6_sr, (), SPARSE,
          model="Kandinsky6SRTransformer3DModel", latent="BTHWC", unit=(1, 8, 8),
          batches=(1,), half=True),
)  # fmt: skip
"""The Kandinsky family."""
