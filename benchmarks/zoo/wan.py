"""Wan and its variants that keep its class or its blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .entry import Built, Entry, Grid
from .parts import TEXT, diffusers_class, layers

IMAGE_TEXT = 512
"""With image embeddings, Wan takes the last 512 tokens of the context for text."""

CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}
"""Also the base of the classes that were made from Wan."""

SITES = layers("blocks.{}.attn1", 2)


def inputs(grid: Grid, batch: int, channels: int = 4, text: int = TEXT) -> dict[str, Any]:
    """The arguments all of them take."""
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, channels, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, text, 16),
        "return_dict": False,
    }


def _wan(
    grid: Grid, batch: int, image: bool = False, fused: bool = False, per_token: bool = False
) -> Built:
    extra = {"image_dim": 16, "added_kv_proj_dim": 48, "in_channels": 9} if image else {}
    model = diffusers_class("transformer_wan", "WanTransformer3DModel")(**{**CONFIG, **extra})
    if fused:
        model.fuse_qkv_projections()
    if image:
        given = inputs(grid, batch, 9, IMAGE_TEXT)
        given["encoder_hidden_states_image"] = torch.randn(batch, 7, 16)
        return model, given
    given = inputs(grid, batch)
    if per_token:  # one noise level for every token: the first frame is clean
        t, h, w = grid
        given["timestep"] = torch.full((batch, t * h * w), 500.0)
        given["timestep"][:, : h * w] = 0.0
    return model, given


def _vace(grid: Grid, batch: int) -> Built:
    model = diffusers_class("transformer_wan_vace", "WanVACETransformer3DModel")(
        **CONFIG, vace_layers=[0], vace_in_channels=6
    )
    given = inputs(grid, batch)
    t, h, w = grid
    given["control_hidden_states"] = torch.randn(batch, 6, t, 2 * h, 2 * w)
    return model, given


def _animate(grid: Grid, batch: int) -> Built:
    model = diffusers_class("transformer_wan_animate", "WanAnimateTransformer3DModel")(
        **{**CONFIG, "in_channels": 12}, latent_channels=4, image_dim=16, added_kv_proj_dim=48,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16,
        motion_style_dim=8, motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=16,
        face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip
    t, h, w = grid
    given = inputs(grid, batch, 12, IMAGE_TEXT)
    given["encoder_hidden_states_image"] = torch.randn(batch, 7, 16)
    given["pose_hidden_states"] = torch.randn(batch, 4, t - 1, 2 * h, 2 * w)
    given["face_pixel_values"] = torch.randn(batch, 3, 4 * (t - 1), 16, 16)
    return model, given


def _chronoedit(grid: Grid, batch: int) -> Built:
    """With two frames left, the second one's position is that of the whole clip's end."""
    model = diffusers_class("transformer_chronoedit", "ChronoEditTransformer3DModel")(
        **CONFIG, rope_temporal_skip_len=8
    )
    return model, inputs(grid, batch)


def _skyreels(
    grid: Grid, batch: int, frame_levels: bool = False, frames_per_block: int = 1
) -> Built:
    model = diffusers_class("transformer_skyreels_v2", "SkyReelsV2Transformer3DModel")(
        **CONFIG, num_frame_per_block=frames_per_block
    )
    given = inputs(grid, batch)
    if frame_levels:  # diffusion forcing: every frame has a noise level
        given["timestep"] = torch.full((batch, grid[0]), 500)
        given["enable_diffusion_forcing"] = True
    return model, given


CROSS = {"CROSS_ATTENTION": 2}

ENTRIES = (
    Entry("wan t2v", _wan, SITES, CROSS, model="WanTransformer3DModel"),
    Entry("wan t2v batch 2", _wan, SITES, CROSS, model="WanTransformer3DModel", batch=2),
    Entry("wan i2v", partial(_wan, image=True), SITES, {"CROSS_ATTENTION": 4},
          model="WanTransformer3DModel"),
    Entry("wan fused qkv", partial(_wan, fused=True), SITES, CROSS, model="WanTransformer3DModel"),
    Entry("wan ti2v", partial(_wan, per_token=True), SITES, CROSS, model="WanTransformer3DModel"),
    Entry("wan vace", _vace, ("vace_blocks.0.attn1", *SITES), {"CROSS_ATTENTION": 3},
          model="WanVACETransformer3DModel"),
    Entry("wan animate", _animate, SITES, {"CROSS_ATTENTION": 5},
          model="WanAnimateTransformer3DModel"),
    Entry("chronoedit", _chronoedit, SITES, CROSS, model="ChronoEditTransformer3DModel"),
    Entry("chronoedit last steps", _chronoedit, SITES, CROSS,
          model="ChronoEditTransformer3DModel", frames=2),
    Entry("skyreels v2", _skyreels, SITES, CROSS, model="SkyReelsV2Transformer3DModel"),
    Entry("skyreels v2 df", partial(_skyreels, frame_levels=True), SITES, CROSS,
          model="SkyReelsV2Transformer3DModel"),
    Entry("skyreels v2 df causal", partial(_skyreels, frame_levels=True, frames_per_block=2), (),
          {**CROSS, "MASK_NOT_A_KEY_LENGTH": 2}, model="SkyReelsV2Transformer3DModel",
          unit=(2, 1, 1)),
)  # fmt: skip
"""Wan 2.1 and 2.2 and what shares its blocks."""
