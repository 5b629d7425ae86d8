"""Dense attention as it is best done without us."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.flex import flex
from benchmarks.gpu.machine import missing
from benchmarks.gpu.stage import SkippedError

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From q, k, v (B, H, N, D) to the output, with the usual scale."""


def baselines(device: str) -> dict[str, Callable[[], Attention]]:
    """Makers of dense attentions by name. A maker raises SkippedError where it has none."""
    if device != "cuda":
        return {"sdpa": lambda: F.scaled_dot_product_attention, "flex": flex}
    return {
        "sdpa cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
        "sdpa flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
        "flex": flex,
        "flash-attn-4": _flash_attn_4,
    }


def _sdpa(backend: SDPBackend) -> Attention:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def _flash_attn_4() -> Attention:
    reason = missing("flash_attn")
    if reason:
        raise SkippedError(reason)
    from flash_attn.cute import flash_attn_func

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend
