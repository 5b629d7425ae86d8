"""Models without video self-attention that look as if they had some, or are made of video parts.

Builders return the model and the arguments of a call, as those of the other models do.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from other_models import Built
from torch import Tensor, nn

from benchmarks.zoo import entry


def ace_step() -> Built:
    """Audio tokens; every second block sees a window only."""
    from diffusers import AceStepTransformer1DModel

    model = AceStepTransformer1DModel(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, in_channels=12, audio_acoustic_hidden_dim=4,
        sliding_window=8,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 120, 4),
        "timestep": torch.tensor([0.5]),
        "timestep_r": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 60, 32),  # as long as the audio
        "context_latents": torch.randn(1, 120, 8),
    }


def motion_unet() -> Built:
    """AnimateDiff: a U-Net of images with motion modules between its blocks."""
    from diffusers import UNetMotionModel

    model = UNetMotionModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), layers_per_block=1,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), cross_attention_dim=16,
        motion_num_attention_heads=2,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(1, 4, 8, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(8, 9, 16),
    }


def cosmos_vae() -> Built:
    """Attention in space and attention in time."""
    from diffusers import AutoencoderKLCosmos

    model = AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8), attention_resolutions=(8,), resolution=32,
        num_layers=1,
    )  # fmt: skip
    return model, {"sample": torch.randn(1, 3, 9, 32, 32)}


def wan_vae_frames() -> Built:
    """Several frames, a chunk of them at a time."""
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return model, {"sample": torch.randn(1, 3, 3, 12, 20)}


def of_zoo(name: str, grid: tuple[int, int, int], batch: int, **changes: Any) -> Built:
    """A model of the zoo at a grid and batch that could mislead."""
    model, inputs = entry(name).make(grid, batch)
    return model, inputs | changes


class TextToVideo(nn.Module):
    """Queries of a video over keys of a text, and of the text over the video, B, T, H, W, C."""

    def __init__(self) -> None:
        super().__init__()
        self.video, self.text = nn.Linear(32, 96), nn.Linear(32, 96)

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        """As many tokens of one as of the other."""
        (q, k, v), (p, s, w) = (
            project(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            for project, x in ((self.video, video.flatten(1, 3)), (self.text, text))
        )
        seen = F.scaled_dot_product_attention(q, s, w)
        read = F.scaled_dot_product_attention(p, k, v)
        return seen + read


def text_to_video() -> Built:
    """T = H = W = batch, and a text of T * H * W words."""
    return TextToVideo(), {"video": torch.randn(4, 4, 4, 4, 32), "text": torch.randn(4, 64, 32)}


class ByTurns(nn.Module):
    """Attention in space, then in time, (B, T, H, W, C), written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.time = nn.Linear(32, 96), nn.Linear(32, 96)

    def forward(self, video: Tensor) -> Tensor:
        """Frames as the batch, then places as the batch."""
        b, t, h, w, c = video.shape
        x = video.reshape(b * t, h * w, c)
        x = x + self._attend(self.space(x))
        x = x.view(b, t, h * w, c).transpose(1, 2).reshape(b * h * w, t, c)
        x = x + self._attend(self.time(x))
        return x.view(b, h * w, t, c).transpose(1, 2).reshape(b, t, h, w, c)

    def _attend(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def by_turns(batch: int, grid: tuple[int, int, int]) -> Built:
    """Two calls that are as long as each other, if T is H * W."""
    return ByTurns(), {"video": torch.randn(batch, *grid, 32)}


FACTORISED = {"FACTORISED", "CROSS_ATTENTION", "ONE_FRAME"}

TRAPS = {
    "ace step": (ace_step, {"TEXT_ONLY", "CROSS_ATTENTION"}),
    "motion u-net": (motion_unet, {"FACTORISED", "CROSS_ATTENTION"}),
    "cosmos vae": (cosmos_vae, {"NO_PROVENANCE"}),
    "wan vae of frames": (wan_vae_frames, {"NO_PROVENANCE"}),
    "wan, one frame": (partial(of_zoo, "wan t2v", (1, 6, 10), 1), {"ONE_FRAME", "CROSS_ATTENTION"}),
    "ltx, one frame": (partial(of_zoo, "ltx", (1, 6, 10), 2), {"TEXT_ONLY", "CROSS_ATTENTION"}),
    "hunyuan, one frame": (partial(of_zoo, "hunyuan", (1, 6, 10), 1), {"ONE_FRAME", "TEXT_ONLY"}),
    "cogvideox, one frame": (partial(of_zoo, "cogvideox 5b", (1, 6, 10), 2), {"ONE_FRAME"}),
    "latte, one frame": (partial(of_zoo, "latte", (1, 4, 4), 2), FACTORISED),
    "latte, T = H = W = B": (partial(of_zoo, "latte", (4, 4, 4), 4), FACTORISED),
    "latte, T = H * W": (partial(of_zoo, "latte", (4, 2, 2), 2), FACTORISED),
    "sana video, long text": (
        partial(
            of_zoo, "sana video", (3, 4, 4), 2,
            encoder_hidden_states=torch.zeros(2, 48, 16),
            encoder_attention_mask=torch.ones(2, 48),
        ),
        {"CROSS_ATTENTION"},
    ),
    "text to video": (text_to_video, {"CROSS_ATTENTION"}),
    "by turns, T = H * W": (partial(by_turns, 2, (4, 2, 2)), {"FACTORISED"}),
    "by turns, B * T = H * W": (partial(by_turns, 4, (4, 4, 4)), {"FACTORISED"}),
    "by turns, one frame": (partial(by_turns, 5, (1, 4, 5)), {"ONE_FRAME", "CROSS_ATTENTION"}),
}  # fmt: skip
"""Builders, and the reasons their attention may be left for."""
