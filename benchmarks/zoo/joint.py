"""Mochi, Motif-Video, JoyImage and MiniMax-H3: text and video in one attention."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from veda_compile.kernels.layout import Extra, Layout, Video

from .entry import Built, Entry, Grid
from .parts import PADDED, TEXT, diffusers_class, layers, text_mask

MOCHI_LAYERS = 2


def _mochi(grid: Grid, batch: int) -> Built:
    t, h, w = grid
    model = diffusers_class("transformer_mochi", "MochiTransformer3DModel")(
        patch_size=2, num_attention_heads=2, attention_head_dim=32, num_layers=MOCHI_LAYERS,
        pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=8,
        max_sequence_length=TEXT,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(batch, 4, t, 2 * h, 2 * w),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": text_mask(batch).bool(),
        "return_dict": False,
    }


def _mochi_layouts(grid: Grid, batch: int) -> tuple[Layout, ...]:
    """One call per sample, each with the valid text of its own."""
    samples = tuple(
        Layout.of(Video(*grid), Extra(TEXT - PADDED - sample)) for sample in range(batch)
    )
    return samples * MOCHI_LAYERS


MOTIF_IMAGE = 5


def _motif(grid: Grid, batch: int, image: bool = True) -> Built:
    """With an image, and a decoder; or neither."""
    t, h, w = grid
    model = diffusers_class("transformer_motif_video", "MotifVideoTransformer3DModel")(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=1,
        num_single_layers=2, num_decoder_layers=int(image), mlp_ratio=2.0, text_embed_dim=16,
        image_embed_dim=10, rope_axes_dim=(8, 12, 12), enable_text_cross_attention_dual=image,
        enable_text_cross_attention_single=image,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(batch, 9, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "encoder_attention_mask": text_mask(batch),
        "image_embeds": torch.randn(batch, MOTIF_IMAGE, 10) if image else None,
        "return_dict": False,
    }


def _motif_layouts(grid: Grid) -> tuple[Layout, ...]:
    """The decoder's blocks attend to the encoder's video in place of the text."""
    encoder = Layout.of(Video(*grid), Extra(MOTIF_IMAGE + TEXT))
    return (encoder, encoder, Layout.of(Video(*grid), Video(*grid)))


_JOY: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 2,
    "rope_dim_list": [8, 12, 12],
}


def _joy(grid: Grid, batch: int, items: bool = False) -> Built:
    """An edit: the frames are the images; with `items` they come one by one, (B, N, C, 1, H, W)."""
    t, h, w = grid
    model = diffusers_class("transformer_joyimage", "JoyImageEditTransformer3DModel")(**_JOY)
    shape = (batch, t, 4, 1, 2 * h, 2 * w) if items else (batch, 4, t, 2 * h, 2 * w)
    return model, {
        "hidden_states": torch.randn(shape),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "return_dict": False,
    }


REFERENCE: Grid = (2, 4, 3)
PATCH_PADDING = 6


def _joy_plus(grid: Grid, batch: int, reference: bool = False) -> Built:
    """Packed patches; with `reference` those of a smaller video, and padding, come behind them."""
    model = diffusers_class("transformer_joyimage_edit_plus", "JoyImageEditPlusTransformer3DModel")(
        **_JOY
    )
    grids = [grid, REFERENCE] if reference else [grid]
    patches = sum(math.prod(part) for part in grids) + (PATCH_PADDING if reference else 0)
    given = {
        "hidden_states": torch.randn(batch, patches, 4, 1, 2, 2),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "shape_list": [grids] * batch,
        "return_dict": False,
    }
    if reference:
        given["encoder_hidden_states_mask"] = text_mask(batch)
    return model, given


def _joy_plus_layouts(grid: Grid) -> tuple[Layout, ...]:
    return (Layout.of(Video(*grid), Video(*REFERENCE), Extra(PATCH_PADDING + TEXT)),) * 2


H3_AUDIO = 9


def _minimax(grid: Grid, batch: int) -> Built:
    """Text, audio and video are copied to their places in one sequence."""
    model = diffusers_class("transformer_minimax_h3", "MiniMaxH3Transformer3DModel")(
        num_attention_heads=2, attention_head_dim=32, hidden_size=48, num_layers=2,
        num_refiner_layers=1, ffn_dim=32, in_channels=4, audio_in_channels=6,
        patch_size=(1, 2, 2), text_dim=16, freq_dim=8, time_embed_hidden_dim=24,
        time_embed_dim=16, rope_freq_dim=4,
    )  # fmt: skip
    start = TEXT + H3_AUDIO
    total = start + math.prod(grid)
    places = torch.zeros(total, 3)
    places[:start, 0] = torch.arange(start).float()
    axes = torch.meshgrid(*(torch.arange(side).float() for side in grid), indexing="ij")
    places[start:] = torch.stack([axis.flatten() for axis in axes], -1)
    places[start:, 0] += start
    tags = torch.zeros(total, dtype=torch.long)
    tags[:TEXT], tags[TEXT:start] = 1, 2
    times = torch.zeros(total, dtype=torch.long)
    times[TEXT:start] = 1
    return model, {
        "hidden_states": torch.randn(batch, math.prod(grid), 16),
        "audio_hidden_states": torch.randn(batch, H3_AUDIO, 6),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": times,
        "token_tags": tags,
        "position_ids": places,
        "text_indices": torch.arange(TEXT),
        "audio_indices": torch.arange(TEXT, start),
        "video_indices": torch.arange(start, total),
        "return_dict": False,
    }


UNBACKED = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}
"""Mochi picks the valid text by index; without these its attention is in no graph."""

POOL = {"CROSS_ATTENTION": 1}
"""One query over the text."""

MOCHI = layers("transformer_blocks.{}.attn1", MOCHI_LAYERS)
MOTIF = ("transformer_blocks.0.attn", *layers("single_transformer_blocks.{}.attn", 2))
JOY = layers("double_blocks.{}.attn", 2)

ENTRIES = (
    Entry("mochi", _mochi, MOCHI, POOL, special=partial(_mochi_layouts, batch=1),
          model="MochiTransformer3DModel", dynamo=UNBACKED, blocks=("transformer_blocks",),
          hint="regional", batches=(1,)),
    Entry("mochi batch 2", _mochi, tuple(name for name in MOCHI for _ in range(2)), POOL,
          special=partial(_mochi_layouts, batch=2), model="MochiTransformer3DModel",
          dynamo=UNBACKED, blocks=("transformer_blocks",), hint="regional", batch=2,
          batches=(2,)),
    Entry("motif t2v", partial(_motif, image=False), MOTIF, last=TEXT,
          model="MotifVideoTransformer3DModel"),
    Entry("motif", _motif, MOTIF,
          {"CROSS_ATTENTION": 2}, special=_motif_layouts, model="MotifVideoTransformer3DModel"),
    Entry("joyimage edit", _joy, JOY, last=TEXT, model="JoyImageEditTransformer3DModel"),
    Entry("joyimage edit items", partial(_joy, items=True), JOY, last=TEXT,
          model="JoyImageEditTransformer3DModel", latent="BTCTHW"),
    Entry("joyimage edit plus", _joy_plus, JOY, last=TEXT, latent=None,
          model="JoyImageEditPlusTransformer3DModel"),
    Entry("joyimage edit plus reference", partial(_joy_plus, reference=True), JOY,
          special=_joy_plus_layouts, latent=None, model="JoyImageEditPlusTransformer3DModel",
          hint="regional"),
    Entry("minimax h3", _minimax, layers("transformer_blocks.{}.attn", 2), {"TEXT_ONLY": 1},
          first=TEXT + H3_AUDIO, latent=None, model="MiniMaxH3Transformer3DModel", hint="regional",
          batches=(1,), exact=("position_ids",)),
)  # fmt: skip
"""Models with joint attention that belong to no larger family here."""
