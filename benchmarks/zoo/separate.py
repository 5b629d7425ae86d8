"""Allegro, whose text is attended to apart, and the factorised Latte and AnimateDiff."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch

from .entry import Built, Entry, Grid
from .parts import TEXT, diffusers_class, layers, text_mask


def _allegro(grid: Grid, batch: int, masked: bool = False) -> Built:
    t, h, w = grid
    model = diffusers_class("transformer_allegro", "AllegroTransformer3DModel")(
        num_attention_heads=2, attention_head_dim=24, num_layers=2, cross_attention_dim=48,
        sample_height=2 * h, sample_width=2 * w, sample_frames=t, caption_channels=16,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(batch, 4, t, 2 * h, 2 * w),
        "encoder_hidden_states": torch.randn(batch, 1, TEXT, 16),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": text_mask(batch),
        "image_rotary_emb": _allegro_rotary(grid),
        "return_dict": False,
    }
    if masked:
        given["attention_mask"] = torch.ones(batch, t, 2 * h, 2 * w)
        given["attention_mask"][:, :, : 2 * h - 2] = 0
    return model, given


def _allegro_rotary(grid: Grid) -> tuple[Any, Any]:
    """A table of frequencies per axis, and each token's place on it."""
    t, h, w = grid
    embed = importlib.import_module("diffusers.models.embeddings").get_3d_rotary_pos_embed_allegro
    tables = embed(24, ((0, 0), (h, w)), (h, w), t, interpolation_scale=(2.2, 2.0, 2.0))[:3]
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid))
    return tables, tuple(places.T[:, None].contiguous())


def _latte(grid: Grid, batch: int) -> Built:
    t, h, w = grid
    model = diffusers_class("latte_transformer_3d", "LatteTransformer3DModel")(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=32, num_attention_heads=2,
        caption_channels=16, in_channels=4, cross_attention_dim=64, out_channels=8,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        video_length=t,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(batch, 4, t, 2 * h, 2 * w),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "timestep": torch.full((batch,), 500),
        "return_dict": False,
    }


def _animatediff(grid: Grid, batch: int) -> Built:
    """The motion module of AnimateDiff; frames come as a batch of images."""
    t, h, w = grid
    model = diffusers_class("transformer_temporal", "TransformerTemporalModel")(
        num_attention_heads=2, attention_head_dim=32, in_channels=32, num_layers=1,
        norm_num_groups=8,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(batch * t, 32, h, w),
        "num_frames": t,
        "return_dict": False,
    }


ALLEGRO = layers("transformer_blocks.{}.attn1", 2)
LISTS = ("transformer_blocks",)

ENTRIES = (
    Entry("allegro", _allegro, ALLEGRO, {"CROSS_ATTENTION": 2}, batch=2, blocks=LISTS,
          hint="regional", model="AllegroTransformer3DModel", exact=("image_rotary_emb",)),
    Entry("allegro masked", partial(_allegro, masked=True), (),
          {"CROSS_ATTENTION": 2, "MASK_NOT_A_KEY_LENGTH": 2}, batch=2, blocks=LISTS,
          model="AllegroTransformer3DModel", exact=("image_rotary_emb",)),
    Entry("latte", _latte, (), {"FACTORISED": 4, "CROSS_ATTENTION": 2}, batch=2,
          model="LatteTransformer3DModel",
          blocks=("transformer_blocks", "temporal_transformer_blocks")),
    Entry("animatediff", _animatediff, (), {"FACTORISED": 2}, model="TransformerTemporalModel",
          latent=None, blocks=LISTS),
)  # fmt: skip
"""Allegro, Latte, AnimateDiff."""
