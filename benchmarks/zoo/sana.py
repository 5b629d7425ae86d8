"""SANA-Video, whose attention is linear, and SANA-WM, where every n-th block is not."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .entry import Built, Entry, Grid
from .parts import TEXT, diffusers_class, text_mask


def _video(grid: Grid, batch: int) -> Built:
    t, h, w = grid
    model = diffusers_class("transformer_sana_video", "SanaVideoTransformer3DModel")(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=24, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=24, cross_attention_dim=48,
        caption_channels=16, sample_size=8, patch_size=(1, 2, 2),
        qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(batch, 4, t, 2 * h, 2 * w),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": text_mask(batch),
        "return_dict": False,
    }


def _world(grid: Grid, batch: int, camera: bool = True, frames: bool = False) -> Built:
    """Two blocks, the second with softmax attention, and a second one along camera rays. With
    `frames` all of them are said to be valid."""
    t, h, w = grid
    model = diffusers_class("transformer_sana_wm", "SanaWMTransformer3DModel")(
        in_channels=4, num_layers=2, hidden_size=48, num_attention_heads=2, softmax_every_n=2,
        linear_head_dim=24, caption_channels=16, chunk_plucker_channels=6,
        chunk_plucker_post_attn_blocks=2,
    )  # fmt: skip
    given: dict[str, Any] = {
        "hidden_states": torch.randn(batch, 4, t, h, w),
        "timestep": torch.full((batch, 1, t), 500.0),
        "encoder_hidden_states": torch.randn(batch, 1, TEXT, 16),
        "encoder_attention_mask": text_mask(batch),
        "return_dict": False,
    }
    if camera:
        pose = torch.eye(4).flatten().expand(batch, t, -1).clone()
        pose[..., 3] = torch.arange(t) * 0.1
        lens = torch.tensor([w / 1.0, h / 1.0, w / 2.0, h / 2.0]).expand(batch, t, -1)
        given["camera_conditions"] = torch.cat([pose, lens], -1)
        given["chunk_plucker"] = torch.randn(batch, 6, t, h, w)
    if frames:
        given["frame_valid_mask"] = torch.ones(batch, t)
    return model, given


ENTRIES = (
    Entry("sana video", _video, (), {"CROSS_ATTENTION": 2}, model="SanaVideoTransformer3DModel",
          batch=2, blocks=("transformer_blocks",)),
    Entry("sana wm", _world, ("blocks.1.attn.attn", "blocks.1.attn.cam_attn"),
          {"CROSS_ATTENTION": 2}, model="SanaWMTransformer3DModel", batch=2, half=True,
          float32_only=True),
    Entry("sana wm frames", partial(_world, frames=True),
          ("blocks.1.attn.attn", "blocks.1.attn.cam_attn"), {"CROSS_ATTENTION": 2},
          model="SanaWMTransformer3DModel", batch=2, half=True,
          float32_only=True, cut=True),
    Entry("sana wm no camera", partial(_world, camera=False), ("blocks.1.attn.attn",),
          {"CROSS_ATTENTION": 2}, model="SanaWMTransformer3DModel", batch=2, half=True),
)  # fmt: skip
"""The SANA family."""
