"""HunyuanVideo, HunyuanVideo 1.5 and FramePack: text behind the video, padded."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from veda_compile.kernels.layout import Extra, Layout

from .entry import Built, Entry, Grid
from .parts import PADDED, TEXT, diffusers_class, layers, runs, text_mask

CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (8, 12, 12),
}
SITES = (*layers("transformer_blocks.{}.attn", 2), *layers("single_transformer_blocks.{}.attn", 2))
LISTS = ("transformer_blocks", "single_transformer_blocks")
MODEL = "HunyuanVideoTransformer3DModel"


def _inputs(grid: Grid, batch: int, channels: int = 4) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, channels, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "encoder_attention_mask": text_mask(batch),
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6.0),
        "return_dict": False,
    }


def _hunyuan(grid: Grid, batch: int, image: str | None = None) -> Built:
    """With "latent_concat" the conditioning image and its mask are further channels."""
    channels = 9 if image == "latent_concat" else 4
    model = diffusers_class("transformer_hunyuan_video", MODEL)(
        **{**CONFIG, "in_channels": channels}, image_condition_type=image
    )
    return model, _inputs(grid, batch, channels)


IMAGE_15, BYT5_15, TEXT_15 = 3, 4, 6


def _hunyuan_15(grid: Grid, batch: int, image: bool = False) -> Built:
    t, h, w = grid
    model = diffusers_class("transformer_hunyuan_video15", "HunyuanVideo15Transformer3DModel")(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2,
        num_refiner_layers=1, mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16,
        text_embed_2_dim=10, image_embed_dim=8, rope_axes_dim=(8, 12, 12), target_size=16,
        task_type="i2v" if image else "t2v",
    )  # fmt: skip
    embeds = torch.randn(batch, IMAGE_15, 8)
    return model, {
        "hidden_states": torch.randn(batch, 4, t, h, w),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, TEXT_15, 16),
        "encoder_attention_mask": text_mask(batch, TEXT_15, 2),
        "encoder_hidden_states_2": torch.randn(batch, BYT5_15, 10),
        "encoder_attention_mask_2": text_mask(batch, BYT5_15, 1),
        "image_embeds": embeds if image else torch.zeros_like(embeds),
        "return_dict": False,
    }


IMAGE, CLEAN, HALF, QUARTER = 5, 2, 2, 16
"""FramePack: image tokens; frames of the three histories."""


def _framepack(grid: Grid, batch: int) -> Built:
    t, h, w = grid
    model = diffusers_class(
        "transformer_hunyuan_video_framepack", "HunyuanVideoFramepackTransformer3DModel"
    )(**CONFIG, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True)
    given = _inputs(grid, batch)
    given["image_embeds"] = torch.randn(batch, IMAGE, 16)
    start = 0
    for name, frames in (("history_4x", QUARTER), ("history_2x", HALF), ("clean", CLEAN)):
        given[f"latents_{name}"] = torch.randn(batch, 4, frames, 2 * h, 2 * w)
        given[f"indices_latents_{name}"] = torch.arange(start, start + frames).float()
        start += frames
    given["indices_latents"] = torch.arange(start, start + t).float()
    return model, given


def _framepack_layouts(grid: Grid, batch: int = 1) -> tuple[Layout, ...]:
    """One sample alone has its padding cut off."""
    _, h, w = grid
    quarter = (-(-QUARTER // 4), -(-h // 4), -(-w // 4))
    half = (-(-HALF // 2), -(-h // 2), -(-w // 2))
    text = IMAGE + TEXT - (PADDED if batch == 1 else 0)
    return (Layout((*runs(quarter, half, (CLEAN, h, w), grid), Extra(text))),) * 4


ENTRIES = (
    Entry("hunyuan", _hunyuan, SITES, {"TEXT_ONLY": 1}, last=TEXT, model=MODEL),
    Entry("hunyuan batch 2", _hunyuan, SITES, {"TEXT_ONLY": 1}, last=TEXT, model=MODEL, batch=2),
    Entry("hunyuan i2v token replace", partial(_hunyuan, image="token_replace"), SITES,
          {"TEXT_ONLY": 1}, last=TEXT, model=MODEL, blocks=LISTS),
    Entry("hunyuan i2v latent concat", partial(_hunyuan, image="latent_concat"), SITES,
          {"TEXT_ONLY": 1}, last=TEXT, model=MODEL),
    Entry("hunyuan 1.5", _hunyuan_15, layers("transformer_blocks.{}.attn", 2), {"TEXT_ONLY": 1},
          last=IMAGE_15 + BYT5_15 + TEXT_15, model="HunyuanVideo15Transformer3DModel"),
    Entry("hunyuan 1.5 i2v", partial(_hunyuan_15, image=True),
          layers("transformer_blocks.{}.attn", 2), {"TEXT_ONLY": 1},
          last=IMAGE_15 + BYT5_15 + TEXT_15, model="HunyuanVideo15Transformer3DModel"),
    Entry("framepack", _framepack, SITES, {"TEXT_ONLY": 1}, special=_framepack_layouts,
          model="HunyuanVideoFramepackTransformer3DModel", blocks=LISTS, hint="regional",
          batches=(1,)),
    Entry("framepack batch 2", _framepack, SITES, {"TEXT_ONLY": 1},
          special=partial(_framepack_layouts, batch=2),
          model="HunyuanVideoFramepackTransformer3DModel", blocks=LISTS, hint="regional", batch=2,
          batches=(2,)),
)  # fmt: skip
"""The Hunyuan family."""
