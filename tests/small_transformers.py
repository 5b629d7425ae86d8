"""Small random video transformers of diffusers, their inputs, and what must come out of them.

Norm weights are random, so that layers differ in their small parameters as trained ones do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn

from veda_compile.functional import sparse_attention
from veda_compile.kernels.layout import Layout
from veda_compile.kernels.plan import Plan, least_padding_shape

Grid = tuple[int, int, int]
Inputs = dict[str, Any]

TEXT = 12
EXACT = 2e-5
"""Largest difference between a compiled model and the same sparse attention without compiling."""

QUICK: dict[str, Any] = {
    "min_tokens": 0,
    "sidecar": None,
    "executor": "reference",
    "inner": "eager",
}
"""Options that compile without Inductor and run what the method defines."""


def with_random_norms(model: nn.Module, seed: int) -> Any:
    """The model in eval mode, its one-dimensional parameters moved away from ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def wan(layers: int = 3, seed: int = 0, heads: int = 2, head_dim: int = 24) -> Any:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    return with_random_norms(model, seed)


def wan_inputs(grid: Grid, seed: int = 0) -> Inputs:
    """grid: token grid; the latent is twice as high and wide."""
    t, h, w = grid
    return {
        "hidden_states": _random(seed, 1, 4, t, 2 * h, 2 * w),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _random(seed + 1, 1, TEXT, 16),
        "return_dict": False,
    }


def hunyuan() -> Any:
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(8, 12, 12),
        image_condition_type=None,
    )
    return with_random_norms(model, 0)


def hunyuan_inputs(grid: Grid) -> Inputs:
    """Three of the text tokens are padding."""
    t, h, w = grid
    valid = torch.ones(1, TEXT)
    valid[:, 9:] = 0
    return {
        "hidden_states": _random(0, 1, 4, t, 2 * h, 2 * w),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _random(1, 1, TEXT, 16),
        "encoder_attention_mask": valid,
        "pooled_projections": _random(2, 1, 8),
        "guidance": torch.tensor([6.0]),
        "return_dict": False,
    }


def ltx() -> Any:
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=24,
        cross_attention_dim=48,
        num_layers=2,
        caption_channels=16,
    )
    return with_random_norms(model, 0)


def ltx_inputs(grid: Grid) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": _random(0, 1, math.prod(grid), 4),
        "encoder_hidden_states": _random(1, 1, TEXT, 16),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "num_frames": t,
        "height": h,
        "width": w,
        "rope_interpolation_scale": (1 / 3, 32.0, 32.0),
        "return_dict": False,
    }


def cogvideox() -> Any:
    """The 5B style: rotary positions come with the call."""
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        patch_size=2,
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    )
    return with_random_norms(model, 0)


def cogvideox_inputs(grid: Grid) -> Inputs:
    t, h, w = grid
    return {
        "hidden_states": _random(0, 2, t, 4, 2 * h, 2 * w),
        "encoder_hidden_states": _random(1, 2, TEXT, 16),
        "timestep": torch.tensor([500, 500]),
        "image_rotary_emb": get_3d_rotary_pos_embed(32, ((0, 0), (h, w)), (h, w), t),
        "return_dict": False,
    }


@torch.no_grad()
def run(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    out: torch.Tensor = model(**inputs)[0]
    return out


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def run_by_hand(
    model: nn.Module, inputs: Inputs, layout: Layout, plans: Mapping[str, Plan]
) -> torch.Tensor:
    """The eager model with its named attention layers computed by `sparse_attention` directly."""
    with sparse_by_hand(model, layout, plans):
        return run(model, inputs)


def run_uniform(
    model: nn.Module, inputs: Inputs, layout: Layout, layers: Sequence[str], density: float = 0.3
) -> torch.Tensor:
    """`run_by_hand` with the plan of the backend without a sidecar, for models of two heads."""
    videos = Layout(tuple(video for _, video in layout.videos))
    plan = Plan.uniform(2, least_padding_shape(videos, 64), density)
    return run_by_hand(model, inputs, layout, dict.fromkeys(layers, plan))


@contextmanager
def sparse_by_hand(model: nn.Module, layout: Layout, plans: Mapping[str, Plan]) -> Iterator[None]:
    """Nothing of the compiler is involved: hooks tell the layer, the caller tells the layout."""
    dense = torch.nn.functional.scaled_dot_product_attention
    inside: list[str] = []
    met: set[str] = set()

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **rest: Any,
    ) -> torch.Tensor:
        if not inside:
            return dense(query, key, value, attn_mask, **rest)
        met.add(inside[-1])
        valid = None
        if attn_mask is not None:
            valid = attn_mask.expand(query.shape[0], 1, 1, key.shape[2])[:, 0, 0].bool()
        return sparse_attention(
            query, key, value, layout=layout, plan=plans[inside[-1]], key_valid=valid,
            executor="reference",
        )  # fmt: skip

    hooks = []
    for name in plans:
        layer = model.get_submodule(name)
        hooks.append(layer.register_forward_pre_hook(lambda *_, n=name: inside.append(n)))
        hooks.append(layer.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        with mock.patch("torch.nn.functional.scaled_dot_product_attention", attention):
            yield
    finally:
        for hook in hooks:
            hook.remove()
    assert met == set(plans), f"never ran: {set(plans) - met}"


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
