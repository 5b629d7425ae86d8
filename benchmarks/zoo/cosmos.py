"""Cosmos 1, 2, 2.5 and Cosmos 3."""

from __future__ import annotations

import importlib
import math
import types
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veda_compile.kernels.layout import Context, Extra, Layout, Video

from .entry import Built, Entry, Grid
from .parts import TEXT, diffusers_class, layers

CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (8, 32, 32),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": True,
}
MODEL = "CosmosTransformer3DModel"


def _inputs(grid: Grid, batch: int, fps: int) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "fps": fps,
        "padding_mask": torch.zeros(1, 1, 2 * h, 2 * w),
        "return_dict": False,
    }


def _cosmos(grid: Grid, batch: int) -> Built:
    _stand_in_for_torchvision()
    model = diffusers_class("transformer_cosmos", MODEL)(**CONFIG, extra_pos_embed_type="learnable")
    return model, _inputs(grid, batch, fps=30)


def _cosmos_2(grid: Grid, batch: int, image_context: bool = False, control: bool = False) -> Built:
    """A mask channel for the given frames, a noise level for every frame; with `image_context`
    (2.5) each block attends to image features too; `control` adds to every second block."""
    _stand_in_for_torchvision()
    t, h, w = grid
    extra: dict[str, Any] = {}
    if image_context:
        extra = {
            "img_context_dim_in": 10,
            "img_context_dim_out": 48,
            "img_context_num_tokens": 7,
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": 20,
            "encoder_hidden_states_channels": 16,
        }
    if control:
        extra["controlnet_block_every_n"] = 2
    model = diffusers_class("transformer_cosmos", MODEL)(
        **{**CONFIG, "in_channels": 5}, extra_pos_embed_type=None, **extra
    )
    given = _inputs(grid, batch, fps=16)
    given["timestep"] = torch.full((batch, 1, t, 1, 1), 500.0)
    given["condition_mask"] = torch.ones(batch, 1, t, 2 * h, 2 * w)
    if image_context:
        text = torch.randn(batch, TEXT, 20)
        given["encoder_hidden_states"] = (text, torch.randn(batch, 7, 10))
    if control:
        given["block_controlnet_hidden_states"] = [torch.randn(batch, math.prod(grid), 48)]
    return model, given


def _stand_in_for_torchvision() -> None:
    """Cosmos needs torchvision for one nearest-neighbour resize of its padding mask. Where
    torchvision is missing, torch's own interpolation does the same."""
    module = importlib.import_module("diffusers.models.transformers.transformer_cosmos")
    if "transforms" in vars(module):
        return

    def resize(x: Tensor, size: list[int], interpolation: str) -> Tensor:
        return F.interpolate(x, size=size, mode=interpolation)

    functional = types.SimpleNamespace(resize=resize)
    modes = types.SimpleNamespace(NEAREST="nearest")
    stand_in = types.SimpleNamespace(functional=functional, InterpolationMode=modes)
    vars(module)["transforms"] = stand_in


PROMPT, SOUND = 7, 8


def _cosmos_3(grid: Grid, batch: int, sound: bool = False) -> Built:
    """One packed sequence: text, which is causal among itself and read by all, then the video
    and, with `sound`, its audio."""
    t, h, w = grid
    video, audio = math.prod(grid), SOUND if sound else 0
    total = PROMPT + video + audio
    model = diffusers_class("transformer_cosmos3", "Cosmos3OmniTransformer")(
        head_dim=24, hidden_size=48, intermediate_size=64, latent_channel=4, latent_patch_size=2,
        num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2, patch_latent_dim=16,
        vocab_size=50, rope_axes_dim=(4, 4, 4), sound_gen=sound, sound_dim=6 if sound else None,
    )  # fmt: skip
    axes = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    places = torch.zeros(3, total, dtype=torch.long)
    places[:, :PROMPT] = torch.arange(PROMPT)
    places[:, PROMPT : PROMPT + video] = torch.stack([axis.flatten() for axis in axes])
    places[0, PROMPT:] += 100
    places[:, PROMPT + video :] = 100 + torch.arange(audio)
    at = torch.arange(PROMPT, PROMPT + video)
    given = {
        "input_ids": torch.arange(PROMPT),
        "text_indexes": torch.arange(PROMPT),
        "position_ids": places,
        "und_len": PROMPT,
        "sequence_length": total,
        "vision_tokens": [torch.randn(1, 4, t, 2 * h, 2 * w)],
        "vision_token_shapes": [grid],
        "vision_sequence_indexes": at,
        "vision_mse_loss_indexes": at,
        "vision_timesteps": torch.full((video,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(t)],
        "return_dict": False,
    }
    if sound:
        heard = torch.arange(PROMPT + video, total)
        given |= {
            "sound_tokens": [torch.randn(6, SOUND)],
            "sound_token_shapes": [(SOUND, 1, 1)],
            "sound_sequence_indexes": heard,
            "sound_mse_loss_indexes": heard,
            "sound_timesteps": torch.full((SOUND,), 500.0),
            "sound_noisy_frame_indexes": [torch.arange(SOUND)],
        }
    return model, given


def _cosmos_3_layouts(grid: Grid, sound: int = 0) -> tuple[Layout, ...]:
    end = (Extra(sound),) if sound else ()
    return (Layout((Context(PROMPT), Video(*grid), *end)),) * 2


LISTS = ("transformer_blocks",)
CROSS = {"CROSS_ATTENTION": 2}
SITES = layers("transformer_blocks.{}.attn1", 2)
OMNI = layers("layers.{}.self_attn", 2)

ENTRIES = (
    Entry("cosmos", _cosmos, SITES, CROSS, model=MODEL, blocks=LISTS),
    Entry("cosmos batch 2", _cosmos, SITES, CROSS, model=MODEL, batch=2, blocks=LISTS),
    Entry("cosmos 2", _cosmos_2, SITES, CROSS, model=MODEL, blocks=LISTS),
    Entry("cosmos 2.5", partial(_cosmos_2, image_context=True), SITES, {"CROSS_ATTENTION": 4},
          model=MODEL, blocks=LISTS),
    Entry("cosmos 2.5 transfer", partial(_cosmos_2, image_context=True, control=True), SITES,
          {"CROSS_ATTENTION": 4}, model=MODEL, blocks=LISTS),
    Entry("cosmos 3", _cosmos_3, OMNI, {"TEXT_ONLY or CAUSAL": 2}, special=_cosmos_3_layouts,
          model="Cosmos3OmniTransformer", latent=None, batches=(1,)),
    Entry("cosmos 3 sound", partial(_cosmos_3, sound=True), OMNI, {"TEXT_ONLY or CAUSAL": 2},
          special=partial(_cosmos_3_layouts, sound=SOUND), model="Cosmos3OmniTransformer",
          latent=None, batches=(1,), hint="regional"),
)  # fmt: skip
"""The Cosmos family."""
