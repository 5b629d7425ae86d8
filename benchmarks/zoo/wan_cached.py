"""Descendants of Wan with histories and caches: several videos in one sequence."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from veda_compile.kernels.layout import Context, Extra, Layout, Video

from .entry import Built, Entry, Grid
from .parts import TEXT, diffusers_class, layers, runs
from .wan import CONFIG, CROSS, SITES, inputs

LONG, MIDDLE, SHORT = 8, 3, 2
"""Frames of Helios' histories, of which ever larger patches become one token."""


def _helios(grid: Grid, batch: int, history: bool = True) -> Built:
    config = {key: value for key, value in CONFIG.items() if key != "rope_max_seq_len"}
    model = diffusers_class("transformer_helios", "HeliosTransformer3DModel")(
        **config, rope_dim=(8, 8, 8), has_multi_term_memory_patch=True, guidance_cross_attn=True,
        zero_history_timestep=True, is_amplify_history=True,
    )  # fmt: skip
    t, h, w = grid
    given = inputs(grid, batch)
    if not history:
        return model, given
    start = 0
    for name, frames in (("long", LONG), ("mid", MIDDLE), ("short", SHORT)):
        numbers = torch.arange(start, start + frames).float().expand(batch, -1)
        given[f"indices_latents_history_{name}"] = numbers
        given[f"latents_history_{name}"] = torch.randn(batch, 4, frames, 2 * h, 2 * w)
        start += frames
    given["indices_hidden_states"] = torch.arange(start, start + t).float().expand(batch, -1)
    return model, given


def _helios_layouts(grid: Grid) -> tuple[Layout, ...]:
    _, h, w = grid
    long = (-(-LONG // 4), -(-h // 4), -(-w // 4))
    middle = (-(-MIDDLE // 2), -(-h // 2), -(-w // 2))
    return (Layout(runs(long, middle, (SHORT, h, w), grid)),) * 2


def _anyflow_config() -> dict[str, Any]:
    return {key: value for key, value in CONFIG.items() if key != "qk_norm"}


def _anyflow(grid: Grid, batch: int) -> Built:
    model = diffusers_class("transformer_anyflow", "AnyFlowTransformer3DModel")(**_anyflow_config())
    return model, _anyflow_inputs(grid, batch)


def _anyflow_inputs(grid: Grid, batch: int) -> dict[str, Any]:
    t, h, w = grid
    return {
        "hidden_states": torch.randn(batch, t, 4, 2 * h, 2 * w),
        "timestep": torch.full((batch, t), 500.0),
        "r_timestep": torch.full((batch, t), 250.0),
        "encoder_hidden_states": torch.randn(batch, TEXT, 16),
        "return_dict": False,
    }


CACHED_FRAMES = 2


def _anyflow_far(grid: Grid, batch: int, step: str) -> Built:
    """Training ("train"), filling the cache with a chunk that is done ("fill"), or reading it."""
    model = diffusers_class("transformer_anyflow_far", "AnyFlowFARTransformer3DModel")(
        **_anyflow_config(), compressed_patch_size=(1, 4, 4), full_chunk_limit=3
    )
    t, h, w = grid
    given = _anyflow_inputs(grid, batch)
    if step == "train":
        given["chunk_partition"] = [1, t - 1]
        return model, given
    fill = step == "fill"
    given["chunk_partition"] = [1, t - 1] if fill else [CACHED_FRAMES, t]
    keys = (t if fill else CACHED_FRAMES) * h * w
    given["kv_cache"] = [
        {
            "compressed_cache": torch.zeros(2, batch, 2, keys, 24),
            "full_cache": torch.randn(2, batch, 2, keys, 24),
        }
        for _ in range(2)
    ]
    given["kv_cache_flag"] = {"is_cache_step": fill, "num_cached_chunks": 1}
    return model, given


def _anyflow_far_layouts(grid: Grid) -> tuple[Layout, ...]:
    """The chunk is padded to a multiple of 128 tokens, which no mask hides."""
    t, h, w = grid
    padding = -(t * h * w) % 128
    end = (Extra(padding),) if padding else ()
    return (Layout((Context(CACHED_FRAMES * h * w), Video(*grid), *end)),) * 2


def _animate_2(grid: Grid, batch: int, cached: bool) -> Built:
    """The reference video fills a cache ("extract"), which every step then reads ("cached")."""
    model = diffusers_class("transformer_wan_animate_2", "WanAnimate2Transformer3DModel")(
        patch_size=(1, 2, 2), text_len=16, in_dim=12, dim=64, ffn_dim=64, freq_dim=32,
        text_dim=16, out_dim=4, num_heads=2, num_layers=2, use_img_emb=True,
    )  # fmt: skip
    t, h, w = grid
    cache = diffusers_class("transformer_wan_animate_2", "WanAnimate2KVCache")(2)
    given = {
        "hidden_states": [torch.randn(4, t, 2 * h, 2 * w)],
        "condition_latents": [torch.randn(8, t, 2 * h, 2 * w)],
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": [torch.randn(9, 16)],
        "encoder_hidden_states_image": torch.randn(1, 5, 1280),
        "kv_cache": cache,
        "kv_cache_mode": "extract",
        "seq_len": t * h * w,
        "offset_grid_sizes": torch.tensor([[t, h, w]]),
        "return_dict": False,
    }
    if not cached:
        return model, given
    with torch.no_grad():
        model(**given)
    del given["offset_grid_sizes"]
    given |= {
        "kv_cache_mode": "cached",
        "hidden_states": [torch.randn(4, t + 1, 2 * h, 2 * w)],
        "condition_latents": [torch.randn(8, t + 1, 2 * h, 2 * w)],
        "seq_len": (t + 1) * h * w,
        "reference_grid_sizes": torch.tensor([[t, h, w]]),
        "origin_len": 4 * (t - 1) + 1,
        "origin_area": [16 * h, 16 * w],
    }
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model(**given)  # the model keeps its block mask, which it would make with Inductor
    return model, given


ENTRIES = (
    Entry("helios", _helios, SITES, CROSS, special=_helios_layouts,
          model="HeliosTransformer3DModel", hint="regional"),
    Entry("helios first", partial(_helios, history=False), SITES, CROSS,
          model="HeliosTransformer3DModel"),
    Entry("anyflow", _anyflow, SITES, CROSS, model="AnyFlowTransformer3DModel", latent="BTCHW"),
    Entry("anyflow far train", partial(_anyflow_far, step="train"), (),
          {**CROSS, "BLOCK_MASK": 2}, model="AnyFlowFARTransformer3DModel",
          latent="BTCHW"),
    Entry("anyflow far fill", partial(_anyflow_far, step="fill"), (),
          {**CROSS, "BLOCK_MASK": 2}, model="AnyFlowFARTransformer3DModel",
          latent="BTCHW"),
    Entry("anyflow far infer", partial(_anyflow_far, step="infer"), SITES, CROSS,
          special=_anyflow_far_layouts, model="AnyFlowFARTransformer3DModel", latent="BTCHW"),
    Entry("wan animate 2 extract", partial(_animate_2, cached=False),
          layers("blocks.{}.self_attn", 2), CROSS, model="WanAnimate2Transformer3DModel",
          latent=None, batches=(1,), cut=True),
    Entry("wan animate 2 cached", partial(_animate_2, cached=True), (),
          {**CROSS, "BLOCK_MASK": 1}, model="WanAnimate2Transformer3DModel",
          latent=None, batches=(1,), cut=True),
)  # fmt: skip
"""Helios, AnyFlow and Wan-Animate-2."""
