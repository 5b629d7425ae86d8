"""Custom attention ops: known by name and schema, read by argument, left where they do more."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiling import run
from torch import Tensor
from toys import GRID, TOKENS, latents, toy

from veda_compile.passes.attention_ops import AttentionOp, register_attention_op

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Softmax attention over (B, N, H, D) and its log-sum-exp (B, H, N)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).contiguous(), torch.logsumexp(scale * q @ k.mT, -1)


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse = _attend(q, k, v, softmax_scale)
    return out, lse, q.new_empty(0), q.new_empty(0)


@flash.register_fake
def _(q, k, v, *_):  # type: ignore[no-untyped-def]
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1])
    return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(0)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
def flash_varlen(
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
) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    bounds = cu_seqlens_q.tolist()
    for start, stop in pairwise(bounds):
        out, lse = _attend(*(x[None, start:stop] for x in (q, k, v)), softmax_scale)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, -1)


@flash_varlen.register_fake
def _(q, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])


@torch.library.custom_op("toyattention::fused", mutates_args=())
def fused(query: Tensor, key: Tensor, value: Tensor, factor: float) -> Tensor:
    return _attend(query, key, value, factor)[0]


@fused.register_fake
def _(query, key, value, factor):  # type: ignore[no-untyped-def]
    return torch.empty_like(query)


@torch.library.custom_op("flash_attn_3::_flash_attn_forward", mutates_args=())
def flash3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    rotary_interleaved: bool = True,
    softmax_scale: float | None = None,
    causal: bool = False,
    num_splits: int = 1,
) -> tuple[Tensor, Tensor]:
    return _attend(q, k, v, softmax_scale)


@flash3.register_fake
def _(q, *_, **__):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1])


@torch.library.custom_op("_flash_attn2_cu128_588b404::_flash_attn_forward", mutates_args=())
def hub(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _attend(query, key, value, None)[0]


@hub.register_fake
def _(query, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(query)


@torch.library.custom_op("sageattention::qk_int8_sv_f16_accum_f16_attn", mutates_args=())
def sage(query: Tensor, key: Tensor, value: Tensor, sm_scale: float) -> Tensor:
    return _attend(query, key, value, sm_scale)[0]


@sage.register_fake
def _(query, *_):  # type: ignore[no-untyped-def]
    return torch.empty_like(query)


register_attention_op(
    AttentionOp("toyattention::fused", q="query", k="key", v="value", scale="factor", causal=None,
                output_first=False)
)  # fmt: skip


Op = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_flash(causal: bool = False, dropout: float = 0.0, left: int = -1, cap: float = 0.0) -> Op:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, *_ = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, dropout, 0.3, causal, left, -1, cap, None, False
        )
        return out.transpose(1, 2)

    return attend


def by_flash_keywords(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.ops.flash_attn._flash_attn_forward(
        q=q, k=k, v=v, dropout_p=0.0, softmax_scale=0.3, causal=False, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return out[0].transpose(1, 2)


def by_flash_with_lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = flash(q, k, v, 0.0, 0.3, False, -1, -1, 0.0, None, False)
    return out.transpose(1, 2) * torch.sigmoid(lse)[..., None]


def by_varlen(bounds: list[int], longest: int) -> Op:
    offsets = torch.tensor(bounds, dtype=torch.int32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        out, _ = torch.ops.flash_attn._flash_attn_varlen_forward(
            q, k, v, offsets, offsets, longest, longest, 0.0, 0.3, False
        )
        return out.transpose(0, 1)[None]

    return attend


def by_registered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.toyattention.fused(*(x.transpose(1, 2) for x in (q, k, v)), 0.3).transpose(
        1, 2
    )


def tokens_first(op: Callable[..., Any], **options: Any) -> Op:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = op(*(x.transpose(1, 2) for x in (q, k, v)), **options)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def by_aten_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=0.3)[0]


@pytest.mark.parametrize(
    "attend",
    [
        by_flash(),
        by_flash_keywords,
        by_varlen([0, TOKENS], TOKENS),
        by_registered,
        tokens_first(flash3, num_splits=2),
        tokens_first(torch.ops.flash_attn_3._flash_attn_forward, softmax_scale=0.3),
        tokens_first(hub),
        by_aten_flash,
    ],
    ids=[
        "positional", "keywords", "varlen", "registered", "default scale", "scale", "hub", "aten"
    ],
)  # fmt: skip
def test_known_ops_are_rewritten_in_every_layer(attend: Op) -> None:
    model, x = toy(attend, layers=3), latents()
    dense = model(x)
    out, sites = run(model, x)
    assert [site.grid for site in sites if site.rewritten] == [GRID] * 3, sites
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=0.0)
    sparse, _ = run(model, x, density=0.3)
    assert (sparse - dense).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("attend", "reason", "words"),
    [
        (by_flash(causal=True), "CAUSAL", "causal"),
        (by_flash(dropout=0.1), "DROPOUT", "0.1"),
        (by_flash(left=8), "PLAIN_SOFTMAX", "window_size_left = 8"),
        (by_flash(cap=30.0), "PLAIN_SOFTMAX", "softcap = 30.0"),
        (by_flash_with_lse, "OUTPUT_USED", "log-sum-exp"),
        (by_varlen([0, 30, TOKENS], 42), "SEGMENTS", "outside the graph"),
        (by_varlen([0, TOKENS], TOKENS - 1), "SEGMENTS", "outside the graph"),
        (tokens_first(flash3, rotary_interleaved=False), "PLAIN_SOFTMAX", "rotary_interleaved"),
        (tokens_first(sage, sm_scale=0.3), "PLAIN_SOFTMAX", "8 bits"),
    ],
)
def test_calls_that_do_more_are_left(attend: Op, reason: str, words: str) -> None:
    model, x = toy(attend), latents()
    out, sites = run(model, x)
    assert [site.reason for site in sites] == [reason] * 2
    assert all(words in str(site.explanation) for site in sites)
    assert torch.equal(out, model(x))


def test_arguments_that_are_not_known_hold_their_defaults() -> None:
    def with_more_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash3(q, k, v, k_new=k)[0].transpose(1, 2)

    model, x = toy(with_more_keys), latents()
    _, sites = run(model, x)
    assert [site.reason for site in sites] == ["PLAIN_SOFTMAX"] * 2
    assert "k_new" in str(sites[0].explanation)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match=r"toyattention::fused.*registered already"):
        register_attention_op(AttentionOp("toyattention::fused"))
