"""Inputs for `veda explain`: the arguments of one call of diffusers' video transformers.

One function per class, from the model's config and the size of the latent to keyword arguments.
They are called under a FakeTensorMode: tensors have shapes and dtypes, but no values and no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Latent:
    """The latent's frames and sides, before patching, and the dtype of floating inputs."""

    frames: int
    height: int
    width: int
    dtype: torch.dtype

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor whose values do not matter."""
        return torch.empty(shape, dtype=dtype or self.dtype)

    def channels_first(self, channels: int) -> torch.Tensor:
        """(1, C, T, H, W)."""
        return self.tensor(1, channels, self.frames, self.height, self.width)

    def timestep(self, batch: int = 1) -> torch.Tensor:
        """(B,) int64."""
        return self.tensor(batch, dtype=torch.int64)


@dataclass(frozen=True)
class Recipe:
    """How to call a class of models.

    frames, side: pixels of the video per latent frame and per latent row, as its VAE has them.
    patch: latent rows per token. arguments: (config, latent) -> keyword arguments of one call.
    """

    frames: int
    side: int
    patch: int
    arguments: Callable[[Any, Latent], Arguments]

    @property
    def step(self) -> int:
        """The sides of a video in pixels are multiples of this."""
        return self.side * self.patch


def _wan(config: Any, latent: Latent) -> Arguments:
    image = {}
    if config.get("image_dim"):
        image["encoder_hidden_states_image"] = latent.tensor(1, 257, config.image_dim)
    return {
        "hidden_states": latent.channels_first(config.in_channels),
        "timestep": latent.timestep(),
        "encoder_hidden_states": latent.tensor(1, 512, config.text_dim),
        **image,
    }


def _wan_vace(config: Any, latent: Latent) -> Arguments:
    return {
        **_wan(config, latent),
        "control_hidden_states": latent.channels_first(config.vace_in_channels),
    }


def _hunyuan(config: Any, latent: Latent) -> Arguments:
    guidance = {"guidance": latent.tensor(1)} if config.guidance_embeds else {}
    return {
        "hidden_states": latent.channels_first(config.in_channels),
        "timestep": latent.timestep(),
        "encoder_hidden_states": latent.tensor(1, 256, config.text_embed_dim),
        "encoder_attention_mask": latent.tensor(1, 256, dtype=torch.int64),
        "pooled_projections": latent.tensor(1, config.pooled_projection_dim),
        **guidance,
    }


def _cogvideox(config: Any, latent: Latent) -> Arguments:
    patch, patch_t = config.patch_size, config.patch_size_t or 1
    tokens = latent.frames // patch_t * (latent.height // patch) * (latent.width // patch)
    more: Arguments = {}
    if config.use_rotary_positional_embeddings:
        table = latent.tensor(tokens, config.attention_head_dim, dtype=torch.float32)
        more["image_rotary_emb"] = (table, table.clone())
    if config.ofs_embed_dim:
        more["ofs"] = latent.tensor(1)
    text = (2, config.max_text_seq_length, config.text_embed_dim)
    return {
        "hidden_states": latent.tensor(
            2, latent.frames, config.in_channels, latent.height, latent.width
        ),
        "encoder_hidden_states": latent.tensor(*text),
        "timestep": latent.timestep(2),
        **more,
    }


def _ltx(config: Any, latent: Latent) -> Arguments:
    tokens = latent.frames * latent.height * latent.width
    return {
        "hidden_states": latent.tensor(2, tokens, config.in_channels),
        "encoder_hidden_states": latent.tensor(2, 128, config.caption_channels),
        "timestep": latent.timestep(2),
        "encoder_attention_mask": latent.tensor(2, 128, dtype=torch.int64),
        "num_frames": latent.frames,
        "height": latent.height,
        "width": latent.width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _mochi(config: Any, latent: Latent) -> Arguments:
    length = config.max_sequence_length
    return {
        "hidden_states": latent.channels_first(config.in_channels),
        "encoder_hidden_states": latent.tensor(1, length, config.text_embed_dim),
        "timestep": latent.timestep(),
        "encoder_attention_mask": latent.tensor(1, length, dtype=torch.bool),
    }


def _cosmos(config: Any, latent: Latent) -> Arguments:
    channels = config.in_channels
    width = config.crossattn_proj_in_channels if config.use_crossattn_projection else (
        config.text_embed_dim
    )  # fmt: skip
    padding = {}
    if config.concat_padding_mask:
        padding["padding_mask"] = latent.tensor(1, 1, latent.height, latent.width)
    return {
        "hidden_states": latent.channels_first(channels),
        "timestep": latent.tensor(1),
        "encoder_hidden_states": latent.tensor(1, 512, width),
        "fps": 24,
        **padding,
    }


def _allegro(config: Any, latent: Latent) -> Arguments:
    t, h, w = latent.frames, latent.height // config.patch_size, latent.width // config.patch_size
    places = tuple(latent.tensor(1, t * h * w, dtype=torch.int64) for _ in range(3))
    axes = tuple(
        (
            latent.tensor(side, config.attention_head_dim // 3, dtype=torch.float32),
            latent.tensor(side, config.attention_head_dim // 3, dtype=torch.float32),
        )
        for side in (t, h, w)
    )
    return {
        "hidden_states": latent.channels_first(config.in_channels),
        "encoder_hidden_states": latent.tensor(1, 512, config.caption_channels),
        "timestep": latent.timestep(),
        "attention_mask": latent.tensor(1, t, latent.height, latent.width),
        "encoder_attention_mask": latent.tensor(1, 512),
        "image_rotary_emb": (axes, places),
    }


def _kandinsky(config: Any, latent: Latent) -> Arguments:
    channels = 2 * config.in_visual_dim + 1 if config.visual_cond else config.in_visual_dim
    patch_t, patch_h, patch_w = config.patch_size
    axes = (latent.frames // patch_t, latent.height // patch_h, latent.width // patch_w)
    return {
        "hidden_states": latent.tensor(1, latent.frames, latent.height, latent.width, channels),
        "encoder_hidden_states": latent.tensor(1, 256, config.in_text_dim),
        "timestep": latent.tensor(1),
        "pooled_projections": latent.tensor(1, config.in_text_dim2),
        "visual_rope_pos": [torch.arange(side) for side in axes],
        "text_rope_pos": torch.arange(256),
    }


RECIPES = {
    "WanTransformer3DModel": Recipe(4, 8, 2, _wan),
    "ChronoEditTransformer3DModel": Recipe(4, 8, 2, _wan),
    "SkyReelsV2Transformer3DModel": Recipe(4, 8, 2, _wan),
    "WanVACETransformer3DModel": Recipe(4, 8, 2, _wan_vace),
    "HunyuanVideoTransformer3DModel": Recipe(4, 8, 2, _hunyuan),
    "CogVideoXTransformer3DModel": Recipe(4, 8, 2, _cogvideox),
    "LTXVideoTransformer3DModel": Recipe(8, 32, 1, _ltx),
    "MochiTransformer3DModel": Recipe(6, 8, 2, _mochi),
    "CosmosTransformer3DModel": Recipe(8, 8, 2, _cosmos),
    "AllegroTransformer3DModel": Recipe(4, 8, 2, _allegro),
    "Kandinsky5Transformer3DModel": Recipe(4, 8, 2, _kandinsky),
}
"""The classes `veda explain` can call by itself, by name."""
