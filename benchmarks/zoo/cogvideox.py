"""CogVideoX and its kin: text before the video, batches of two."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch

from .entry import Built, Entry, Grid
from .parts import TEXT, diffusers_class, layers

CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 2,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": TEXT,
}
MODEL = "CogVideoXTransformer3DModel"
SITES = layers("transformer_blocks.{}.attn1", 2)
LISTS = ("transformer_blocks",)


def _sample(grid: Grid) -> dict[str, int]:
    """The size the positions without rotation are made for."""
    t, h, w = grid
    return {"sample_frames": 4 * (t - 1) + 1, "sample_height": 2 * h, "sample_width": 2 * w}


def _inputs(grid: Grid, batch: int) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, t, 4, 2 * h, 2 * w),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "timestep": torch.full((batch,), 500),
        "return_dict": False,
    }


def rotary(grid: Grid, **options: Any) -> Any:
    """The tables of cosines and sines that the pipeline makes."""
    t, h, w = grid
    embed = importlib.import_module("diffusers.models.embeddings").get_3d_rotary_pos_embed
    return embed(32, ((0, 0), (h, w)), (h, w), t, **options)


def _cogvideox(grid: Grid, batch: int, rotated: bool, learned: bool = False) -> Built:
    model = diffusers_class("cogvideox_transformer_3d", MODEL)(
        **CONFIG, **_sample(grid), use_rotary_positional_embeddings=rotated,
        use_learned_positional_embeddings=learned,
    )  # fmt: skip
    given = _inputs(grid, batch)
    if rotated:
        given["image_rotary_emb"] = rotary(grid)
    return model, given


def _cogvideox_15(grid: Grid, batch: int) -> Built:
    """Two latent frames a token, patches by a linear layer, the image's frame rate as input."""
    t, h, w = grid
    frames = 2 * t
    model = diffusers_class("cogvideox_transformer_3d", MODEL)(
        **CONFIG, **_sample((frames, h, w)), patch_size_t=2,
        use_rotary_positional_embeddings=True, ofs_embed_dim=8,
    )  # fmt: skip
    given = _inputs((frames, h, w), batch)
    given["ofs"] = torch.full((1,), 2.0)
    given["image_rotary_emb"] = rotary(grid, grid_type="slice", max_size=(h, w))
    return model, given


def _consisid(grid: Grid, batch: int, rotated: bool) -> Built:
    model = diffusers_class("consisid_transformer_3d", "ConsisIDTransformer3DModel")(
        **CONFIG, **_sample(grid), use_rotary_positional_embeddings=rotated, is_train_face=True,
        cross_attn_interval=1, cross_attn_dim_head=16, cross_attn_num_heads=2, LFE_id_dim=16,
        LFE_vit_dim=16, LFE_depth=5, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=2,
        LFE_num_querie=4, LFE_output_dim=42, LFE_ff_mult=2, LFE_num_scale=5,
    )  # fmt: skip
    given = _inputs(grid, batch)
    given["id_cond"] = torch.randn(batch, 16)
    given["id_vit_hidden"] = [torch.randn(batch, 7, 16) for _ in range(5)]
    if rotated:
        given["image_rotary_emb"] = rotary(grid)
    return model, given


def _easyanimate(grid: Grid, batch: int, inpaint: bool = False) -> Built:
    t, h, w = grid
    model = diffusers_class("transformer_easyanimate", "EasyAnimateTransformer3DModel")(
        num_attention_heads=2, attention_head_dim=32, in_channels=9 if inpaint else 4,
        out_channels=4, patch_size=2, sample_width=2 * w, sample_height=2 * h, num_layers=2,
        mmdit_layers=1, time_embed_dim=8, text_embed_dim=16, add_norm_text_encoder=True,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "return_dict": False,
    }
    if inpaint:
        given["inpaint_latents"] = torch.randn(batch, 5, t, 2 * h, 2 * w)
    return model, given


FACES = {"CROSS_ATTENTION or TEXT_ONLY": 7}
"""Five calls of the face extractor, whose queries are among its keys, and one behind each block:
written out as softmax."""

ENTRIES = (
    Entry("cogvideox 2b", partial(_cogvideox, rotated=False), SITES, first=TEXT, model=MODEL,
          latent="BTCHW", batch=2, blocks=LISTS, hint="regional"),
    Entry("cogvideox 5b", partial(_cogvideox, rotated=True), SITES, first=TEXT, model=MODEL,
          latent="BTCHW", batch=2, blocks=LISTS, exact=("image_rotary_emb",)),
    Entry("cogvideox 5b i2v", partial(_cogvideox, rotated=True, learned=True), SITES, first=TEXT,
          model=MODEL, latent="BTCHW", batch=2, blocks=LISTS, exact=("image_rotary_emb",)),
    Entry("cogvideox 1.5 i2v", _cogvideox_15, SITES, first=TEXT, model=MODEL, latent="BTCHW",
          batch=2, blocks=LISTS, exact=("image_rotary_emb",)),
    Entry("consisid", partial(_consisid, rotated=False), SITES, FACES, first=TEXT,
          model="ConsisIDTransformer3DModel", latent="BTCHW", batch=2, blocks=LISTS,
          hint="regional"),
    Entry("consisid rotary", partial(_consisid, rotated=True), SITES, FACES, first=TEXT,
          model="ConsisIDTransformer3DModel", latent="BTCHW", batch=2, blocks=LISTS,
          exact=("image_rotary_emb",)),
    Entry("easyanimate", _easyanimate, layers("transformer_blocks.{}.attn1", 2), first=TEXT,
          model="EasyAnimateTransformer3DModel", batch=2, blocks=LISTS),
    Entry("easyanimate inpaint", partial(_easyanimate, inpaint=True),
          layers("transformer_blocks.{}.attn1", 2), first=TEXT,
          model="EasyAnimateTransformer3DModel", batch=2, blocks=LISTS),
)  # fmt: skip
"""CogVideoX, ConsisID and EasyAnimate."""
