"""Tiny random-weight video transformers with what is true of their attention.

Builders take the grid of *tokens* (T, H, W) and return a model in eval mode with the arguments of
one call. Weights and inputs are the same every time.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import plain_dits
from benchmarks.plain_dits import PlainDiT

Grid = tuple[int, int, int]
Built = tuple[nn.Module, dict[str, Any]]

TEXT = 12
"""Text tokens of every model with a prompt."""


@dataclass(frozen=True)
class Entry:
    """One model and its ground truth.

    sites: video self-attention calls. others: attention calls that must stay dense.
    first, last: extra tokens before and after the video in the sequences of `sites`.
    latent: sides of the input `hidden_states`, such as "BCTHW"; None where it is packed.
    """

    name: str
    build: Callable[[Grid], Built]
    sites: int
    others: int = 0
    first: int = 0
    last: int = 0
    latent: str | None = "BCTHW"

    def make(self, grid: Grid) -> Built:
        """The model for a token grid, and the arguments of a call; leaves global seeds alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = self.build(grid)
            _sharpen(model)
        return model.eval().requires_grad_(False), inputs


def call(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """The model's output tensor."""
    result = model(**inputs)
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def _sharpen(model: nn.Module) -> None:
    """Larger query and key weights: at default initialisation attention is all but uniform, and
    an error in what is kept could hide."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and any(part in name for part in ("to_q", "to_k", "qkv")):
            parameter.data *= 4.0


def _diffusers(module: str, name: str) -> Any:
    found = importlib.import_module(f"diffusers.models.transformers.{module}")
    return getattr(found, name)


def _wan(
    grid: Grid, batch: int = 1, image: bool = False, fused: bool = False, layers: int = 2
) -> Built:
    t, h, w = grid
    extra = {"image_dim": 16, "added_kv_proj_dim": 48} if image else {}
    channels = 9 if image else 4
    model = _diffusers("transformer_wan", "WanTransformer3DModel")(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=channels,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=64, num_layers=layers,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=64, **extra,
    )  # fmt: skip
    if fused:
        model.fuse_qkv_projections()
    inputs = {
        "hidden_states": torch.randn(batch, channels, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 512 if image else TEXT, 16),
        "return_dict": False,
    }
    if image:
        inputs["encoder_hidden_states_image"] = torch.randn(batch, 7, 16)
    return model, inputs


def _hunyuan(grid: Grid, batch: int = 1) -> Built:
    t, h, w = grid
    model = _diffusers("transformer_hunyuan_video", "HunyuanVideoTransformer3DModel")(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1,
        guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(8, 12, 12),
    )  # fmt: skip
    mask = torch.ones(batch, TEXT)
    for row in range(batch):
        mask[row, TEXT - 3 - row :] = 0
    return model, {
        "hidden_states": torch.randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, 8),
        "guidance": torch.full((batch,), 6.0),
        "return_dict": False,
    }


def _cogvideox(grid: Grid, rotary: bool, batch: int = 2) -> Built:
    t, h, w = grid
    model = _diffusers("cogvideox_transformer_3d", "CogVideoXTransformer3DModel")(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=16, num_layers=2, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=TEXT, sample_width=2 * w,
        sample_height=2 * h, sample_frames=4 * (t - 1) + 1,
        use_rotary_positional_embeddings=rotary,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(batch, t, 4, 2 * h, 2 * w),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "timestep": torch.full((batch,), 500),
        "return_dict": False,
    }
    if rotary:
        embed = importlib.import_module("diffusers.models.embeddings").get_3d_rotary_pos_embed
        inputs["image_rotary_emb"] = embed(32, ((0, 0), (h, w)), (h, w), t)
    return model, inputs


def _ltx(grid: Grid, batch: int = 1) -> Built:
    t, h, w = grid
    model = _diffusers("transformer_ltx", "LTXVideoTransformer3DModel")(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=24,
        cross_attention_dim=48, num_layers=2, caption_channels=16,
    )  # fmt: skip
    mask = torch.ones(batch, TEXT)
    mask[:, TEXT - 3 :] = 0
    return model, {
        "hidden_states": torch.randn(batch, t * h * w, 4),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "timestep": torch.full((batch,), 500),
        "encoder_attention_mask": mask,
        "num_frames": t,
        "height": h,
        "width": w,
        "rope_interpolation_scale": (1 / 3, 32.0, 32.0),
        "return_dict": False,
    }


def _cosmos(grid: Grid, batch: int = 1) -> Built:
    t, h, w = grid
    _stand_in_for_torchvision()
    model = _diffusers("transformer_cosmos", "CosmosTransformer3DModel")(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=24, num_layers=2,
        mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4, max_size=(8, 32, 32),
        patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=True,
        extra_pos_embed_type="learnable",
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(batch, 4, t, 2 * h, 2 * w),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, 2 * h, 2 * w),
        "return_dict": False,
    }


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


def _plain(grid: Grid, attend: plain_dits.Attend, batch: int = 1, fused: bool = False) -> Built:
    t, h, w = grid
    model = PlainDiT(attend, fused=fused)
    return model, {"latents": torch.randn(batch, 4, t, 2 * h, 2 * w)}


ENTRIES = (
    Entry("wan t2v", _wan, 2, 2),
    Entry("wan t2v batch 2", partial(_wan, batch=2), 2, 2),
    Entry("wan i2v", partial(_wan, image=True), 2, 4),
    Entry("wan fused qkv", partial(_wan, fused=True), 2, 2),
    Entry("hunyuan", _hunyuan, 4, 1, last=TEXT),
    Entry("hunyuan batch 2", partial(_hunyuan, batch=2), 4, 1, last=TEXT),
    Entry("cogvideox 2b", partial(_cogvideox, rotary=False), 2, first=TEXT, latent="BTCHW"),
    Entry("cogvideox 5b", partial(_cogvideox, rotary=True), 2, first=TEXT, latent="BTCHW"),
    Entry("ltx batch 2", partial(_ltx, batch=2), 2, 2, latent=None),
    Entry("cosmos batch 2", partial(_cosmos, batch=2), 2, 2),
    Entry("plain methods", partial(_plain, attend=plain_dits.by_methods), 2),
    Entry("plain operators", partial(_plain, attend=plain_dits.by_operators, batch=2), 2),
    Entry("plain einsum", partial(_plain, attend=plain_dits.by_einsum, batch=2), 2),
    Entry("plain baddbmm", partial(_plain, attend=plain_dits.by_baddbmm, batch=2), 2),
    Entry("plain float32", partial(_plain, attend=plain_dits.by_float32), 2),
    Entry(
        "plain fused qkv",
        partial(_plain, attend=F.scaled_dot_product_attention, batch=2, fused=True),
        2,
    ),
)
"""All models. Names are unique."""


def entry(name: str) -> Entry:
    """The entry of that name. Raises KeyError."""
    return {known.name: known for known in ENTRIES}[name]
