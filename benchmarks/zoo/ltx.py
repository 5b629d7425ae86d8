"""LTX-Video, LTX-2 and SANA-WM's refiner: the video comes packed, (B, N, C)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from veda_compile.kernels.layout import Context, Layout, Video

from .entry import Built, Entry, Grid
from .parts import TEXT, diffusers_class, layers, text_mask

SITES = layers("transformer_blocks.{}.attn1", 2)
AUDIO = 9


def _ltx(grid: Grid, batch: int, coordinates: bool = False) -> Built:
    t, h, w = grid
    model = diffusers_class("transformer_ltx", "LTXVideoTransformer3DModel")(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=24,
        cross_attention_dim=48, num_layers=2, caption_channels=16,
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(batch, t * h * w, 4),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": text_mask(batch),
        "return_dict": False,
    }
    if coordinates:
        axes = torch.meshgrid(*(torch.arange(side).float() for side in grid), indexing="ij")
        places = torch.stack([axis.flatten() for axis in axes])
        scale = torch.tensor([[8 / 25], [32.0], [32.0]])
        given["video_coords"] = (places * scale).expand(batch, -1, -1).contiguous()
    else:
        given |= {"num_frames": t, "height": h, "width": w}
        given["rope_interpolation_scale"] = (1 / 3, 32.0, 32.0)
    return model, given


_CONFIG_2: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "cross_attention_dim": 48,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 16,
    "rope_double_precision": False,
}


_CONFIG_23: dict[str, Any] = {
    **_CONFIG_2,
    "rope_type": "split",
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}


def _ltx_2(grid: Grid, batch: int, later: bool = False, masked: bool = False) -> Built:
    """LTX-2, or with `later` LTX-2.3."""
    t, h, w = grid
    model = diffusers_class("transformer_ltx2", "LTX2VideoTransformer3DModel")(
        **(_CONFIG_23 if later else _CONFIG_2)
    )
    given = {
        "hidden_states": torch.randn(batch, t * h * w, 4),
        "audio_hidden_states": torch.randn(batch, AUDIO, 4),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "audio_encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "timestep": torch.full((batch,), 500.0),
        "encoder_attention_mask": text_mask(batch),
        "audio_encoder_attention_mask": text_mask(batch),
        "num_frames": t,
        "height": h,
        "width": w,
        "fps": 25.0,
        "audio_num_frames": AUDIO,
        "return_dict": False,
    }
    if later:
        given["encoder_hidden_states"] = torch.randn(batch, TEXT, 48)
        given["sigma"] = torch.full((batch,), 500.0)
        given["audio_encoder_hidden_states"] = torch.randn(batch, TEXT, 16)
    if masked:  # how strongly the reference's tokens bear on the others
        given["video_self_attention_mask"] = torch.rand(batch, t * h * w, t * h * w)
    return model, given


HISTORY = 20
"""Keys of earlier tokens in the refiner's cache."""


def _refiner(grid: Grid, batch: int, mode: str | None = None) -> Built:
    """mode: whether the cache's keys and values are read or written."""
    t, h, w = grid
    module = "transformer_sana_wm_refiner"
    model = diffusers_class(module, "SanaWMLTX2RefinerTransformer3DModel")(**_CONFIG_2)
    device = torch.device("cpu")
    places = model.rope.prepare_video_coords(batch, t, h, w, device, fps=24.0)
    given = {
        "hidden_states": torch.randn(batch, t * h * w, 4),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "timestep": torch.full((batch,), 500.0),
        "video_rotary_emb": model.rope(places, device=device),
        "encoder_attention_mask": text_mask(batch),
        "return_dict": False,
    }
    if mode is not None:
        cache = diffusers_class(module, "SanaWMRefinerKVCache")(2)
        for layer in cache.layer_caches:
            layer.store_history(torch.randn(batch, HISTORY, 48), torch.randn(batch, HISTORY, 48))
        given |= {"kv_cache": cache, "kv_cache_mode": mode}
    return model, given


def _refiner_layouts(grid: Grid) -> tuple[Layout, ...]:
    return (Layout.of(Context(HISTORY), Video(*grid)),) * 2


CROSS = {"CROSS_ATTENTION": 2}
BOTH = {"CROSS_ATTENTION": 8, "TEXT_ONLY": 2}
"""Text, audio to video and video to audio; and the audio's own attention."""

ENTRIES = (
    Entry("ltx", _ltx, SITES, CROSS, model="LTXVideoTransformer3DModel", latent=None),
    Entry("ltx batch 2", _ltx, SITES, CROSS, model="LTXVideoTransformer3DModel", latent=None,
          batch=2),
    Entry("ltx coordinates", partial(_ltx, coordinates=True), SITES, CROSS,
          model="LTXVideoTransformer3DModel", latent=None, batch=2, exact=("video_coords",)),
    Entry("ltx 2", _ltx_2, SITES, BOTH, model="LTX2VideoTransformer3DModel", latent=None, batch=2),
    Entry("ltx 2.3", partial(_ltx_2, later=True), SITES, BOTH,
          model="LTX2VideoTransformer3DModel", latent=None, batch=2),
    Entry("ltx 2 masked", partial(_ltx_2, masked=True), (),
          {**BOTH, "MASK_NOT_A_KEY_LENGTH": 2}, model="LTX2VideoTransformer3DModel", latent=None,
          batch=2),
    Entry("sana wm refiner", _refiner, SITES, CROSS, latent=None,
          model="SanaWMLTX2RefinerTransformer3DModel", exact=("video_rotary_emb",)),
    Entry("sana wm refiner capture", partial(_refiner, mode="capture_pre_rope"), SITES, CROSS,
          latent=None, model="SanaWMLTX2RefinerTransformer3DModel", exact=("video_rotary_emb",)),
    Entry("sana wm refiner cached", partial(_refiner, mode="inject"), SITES, CROSS,
          special=_refiner_layouts, latent=None, model="SanaWMLTX2RefinerTransformer3DModel",
          exact=("video_rotary_emb",)),
)  # fmt: skip
"""The LTX family."""
