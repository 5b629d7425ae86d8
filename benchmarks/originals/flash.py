"""flash-attn as compiled graphs show it: its varlen op, and the functions authors call.

The op is registered under flash-attn's own name where the package has not done so.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.originals.parts import default_scale


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention within each segment of packed (N, H, D) tokens; the other outputs are empty."""
    out = torch.zeros_like(q)
    q_bounds, k_bounds = pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist())
    for (q0, q1), (k0, k1) in zip(q_bounds, k_bounds, strict=True):
        part = (x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        attended = F.scaled_dot_product_attention(*part, scale=softmax_scale, is_causal=causal)
        out[q0:q1] = attended.transpose(0, 1)
    return out, q.new_empty(q.shape[1], q.shape[0]), q.new_empty(0), q.new_empty(0)


def _varlen_fake(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse = q.new_empty(q.shape[1], q.shape[0])
    return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(0)


if not hasattr(torch.ops.flash_attn, "_flash_attn_varlen_forward"):
    _op = torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())(
        _varlen
    )
    _op.register_fake(_varlen_fake)


class _VarlenFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int,
        longest_k: int, causal: bool
    ) -> Tensor:  # fmt: skip
        out, lse, *_ = torch.ops.flash_attn._flash_attn_varlen_forward(
            q, k, v, cu_q, cu_k, longest_q, longest_k, 0.0, default_scale(q.shape[-1]), causal
        )
        ctx.save_for_backward(q, k, v, out, lse)
        return out  # type: ignore[no-any-return]


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int,
    causal: bool = False
) -> Tensor:  # fmt: skip
    """Attention over packed (N, H, D) tokens, segments as the offsets say."""
    out: Tensor = _VarlenFunction.apply(q, k, v, cu_q, cu_k, longest_q, longest_k, causal)
    return out
