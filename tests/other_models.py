"""Models without video self-attention: images, text, audio, encoders of video, and video models
that attend in space and time by turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, dict[str, Any]]


def sd3() -> Built:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=16, out_channels=4, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 9, 32),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([500, 500]),
    }


def flux() -> Built:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16,
        guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(6.0), torch.arange(10.0))
    return model, {
        "hidden_states": torch.randn(1, 60, 4),
        "encoder_hidden_states": torch.randn(1, 60, 32),  # as many words as patches
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(60, 3),
    }


def pixart() -> Built:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=16, num_attention_heads=2,
        in_channels=4, cross_attention_dim=32, caption_channels=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 9, 32),
        "timestep": torch.tensor([500, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def unet_3d() -> Built:
    from diffusers import UNet3DConditionModel

    model = UNet3DConditionModel(
        sample_size=16, block_out_channels=(8,), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D",), up_block_types=("UpBlock3D",),
        cross_attention_dim=16, layers_per_block=1,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(2, 4, 3, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 9, 16),
    }


def unet_spatio_temporal() -> Built:
    from diffusers import UNetSpatioTemporalConditionModel

    model = UNetSpatioTemporalConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("UpBlockSpatioTemporal",), cross_attention_dim=16, layers_per_block=1,
        num_attention_heads=(2,),
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(1, 3, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 1, 16),
        "added_time_ids": torch.randn(1, 3),
    }


def latte() -> Built:
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=16, num_attention_heads=2,
        caption_channels=32, in_channels=4, cross_attention_dim=32, out_channels=8,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=3,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 3, 8, 8),
        "encoder_hidden_states": torch.randn(1, 9, 32),
        "timestep": torch.tensor([500]),
        "enable_temporal_attentions": True,
    }


def animate_diff() -> Built:
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel

    model = TransformerTemporalModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=16, norm_num_groups=4,
        positional_embeddings="sinusoidal", num_positional_embeddings=8, double_self_attention=True,
    )  # fmt: skip
    return model, {"hidden_states": torch.randn(6, 16, 6, 6), "num_frames": 6}


def stable_audio() -> Built:
    from diffusers import StableAudioDiTModel
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    model = StableAudioDiTModel(
        sample_size=60, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=32,
        time_proj_dim=8, global_states_input_dim=16, cross_attention_input_dim=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 60),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 9, 32),
        "global_hidden_states": torch.randn(1, 1, 16),
        "rotary_embedding": get_1d_rotary_pos_embed(8, 61, use_real=True),
    }


def wan_vae() -> Built:
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return model, {"sample": torch.randn(1, 3, 1, 12, 20)}


def hunyuan_vae() -> Built:
    from diffusers import AutoencoderKLHunyuanVideo

    model = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return model, {"sample": torch.randn(1, 3, 9, 32, 48)}


def image_vae() -> Built:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    return model, {"sample": torch.randn(2, 3, 12, 20)}


def vit() -> Built:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8,
    )  # fmt: skip
    return ViTModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def video_mae() -> Built:
    from transformers import TimesformerConfig, TimesformerModel

    config = TimesformerConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, num_frames=4,
    )  # fmt: skip
    return TimesformerModel(config), {"pixel_values": torch.randn(1, 4, 3, 32, 32)}


def llama() -> Built:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaModel(config), {"input_ids": torch.randint(0, 99, (2, 60)), "use_cache": False}


def clip_text() -> Built:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=60, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config), {"input_ids": torch.randint(0, 99, (2, 60))}


def t5() -> Built:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    return T5EncoderModel(config), {
        "input_ids": torch.randint(0, 99, (2, 60)),
        "attention_mask": torch.ones(2, 60, dtype=torch.long),
    }


def plain_encoder() -> Built:
    """torch's own encoder over a (B, N, C) sequence."""
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return model, {"src": torch.randn(2, 60, 32)}


HARMLESS = {"ONE_FRAME", "CROSS_ATTENTION", "FACTORISED", "TEXT_ONLY"}
UNSEEN = {"NO_GRID", "NO_PROVENANCE"}
"""Reasons for graphs with nothing but text or audio, or whose tokens nobody can follow."""

WITHOUT: dict[str, tuple[Callable[[], Built], set[str]]] = {
    "sd3": (sd3, {"ONE_FRAME"}),
    "flux": (flux, {"TEXT_ONLY", "ONE_FRAME"}),
    "pixart": (pixart, {"ONE_FRAME", "CROSS_ATTENTION"}),
    "unet 3d": (unet_3d, {"FACTORISED", "CROSS_ATTENTION"}),
    "unet spatio-temporal": (unet_spatio_temporal, HARMLESS | UNSEEN),
    "latte": (latte, {"FACTORISED", "CROSS_ATTENTION"}),
    "animate-diff": (animate_diff, {"FACTORISED"}),
    "stable audio": (stable_audio, HARMLESS | UNSEEN),
    "wan vae": (wan_vae, HARMLESS | UNSEEN),
    "hunyuan vae": (hunyuan_vae, HARMLESS | UNSEEN | {"MASK_NOT_A_KEY_LENGTH"}),
    "image vae": (image_vae, {"ONE_FRAME"}),
    "vit": (vit, {"ONE_FRAME"}),
    "timesformer": (video_mae, {"FACTORISED", "ONE_FRAME"}),
    "llama": (llama, HARMLESS | UNSEEN | {"CAUSAL"}),
    "clip text": (clip_text, HARMLESS | UNSEEN | {"CAUSAL"}),
    "t5": (t5, HARMLESS | UNSEEN | {"MASK_NOT_A_KEY_LENGTH"}),
    "plain encoder": (plain_encoder, HARMLESS | UNSEEN),
}
"""Builders, and the reasons their attention may be left for."""
