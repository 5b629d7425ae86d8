"""Attention calls are found in every spelling, and nothing else is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiling import capture
from torch import Tensor

from benchmarks import plain_dits
from veda_compile.passes.sites import Site, find_sites

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SHAPE = (2, 3, 20, 8)
SCALE = SHAPE[-1] ** -0.5


def sites_of(fn: Callable[..., Any], *args: Tensor) -> list[Site]:
    q, k, v = (torch.randn(SHAPE) for _ in range(3))
    return list(find_sites(capture(fn, q, k, v, *args).gm))


def only(fn: Callable[..., Any], *args: Tensor) -> Site:
    (site,) = sites_of(fn, *args)
    return site


def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch._C._nn.scaled_dot_product_attention(q, key=k, value=v)


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: F.scaled_dot_product_attention(value=v, query=q, key=k),
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, value=v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, False),
        spelled,
    ],
)
def test_sdpa_in_all_call_forms(fn: Callable[..., Any]) -> None:
    site = only(fn)
    assert [operand.node.name for operand in (site.q, site.k, site.v)] == ["l_q_", "l_k_", "l_v_"]
    assert {site.q.axes, site.k.axes, site.v.axes, site.out_axes} == {"bhnd"}
    assert (site.mask, site.dropout, site.causal, site.scale) == (None, 0.0, False, None)
    assert site.oddity is None and not site.calls


def test_sdpa_arguments_are_read_by_position_and_by_name() -> None:
    mask = torch.ones(20, 20, dtype=torch.bool)
    by_name = only(
        lambda q, k, v, m: F.scaled_dot_product_attention(
            q, k, v, attn_mask=m, dropout_p=0.25, scale=0.5
        ),
        mask,
    )
    by_place = only(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, 0.25), mask)
    for site in (by_name, by_place):
        assert site.mask is not None and site.mask.name == "l_m_"
        assert site.dropout == 0.25
    assert by_name.scale == 0.5
    assert by_place.scale is None
    assert only(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)).causal


def test_sdpa_with_fewer_kv_heads_and_of_other_ranks() -> None:
    grouped = only(
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
    )
    assert grouped.oddity is None
    flat = only(lambda q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0]))
    assert flat.q.axes == flat.out_axes == "hnd"


@pytest.mark.parametrize(
    ("attend", "q_axes", "k_axes", "scale"),
    [
        (plain_dits.by_methods, "bhnd", "bhdn", SCALE),
        (plain_dits.by_operators, "bhnd", "bhdn", 1.0),
        (plain_dits.by_einsum, "bnhd", "bnhd", SCALE),
        (plain_dits.by_baddbmm, "bnd", "bdn", SCALE),
        (plain_dits.by_float32, "bhnd", "bhdn", SCALE),
    ],
)
def test_softmax_written_out(
    attend: plain_dits.Attend, q_axes: str, k_axes: str, scale: float
) -> None:
    site = only(attend)
    assert (site.q.axes, site.k.axes) == (q_axes, k_axes)
    assert site.scale == pytest.approx(scale)
    assert site.oddity is None


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, k, v: F.softmax(input=q @ k.mT, dim=-1) @ v,
        lambda q, k, v: torch.matmul(torch.softmax(torch.matmul(input=q, other=k.mT), -1), v),
        lambda q, k, v: torch.softmax(torch.mul(q @ k.mT, other=0.5), -1) @ v,
        lambda q, k, v: torch.softmax(input=torch.mul(input=q @ k.mT, other=0.5), dim=3) @ v,
        lambda q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), p=0.0) @ v,
        lambda q, k, v: (q @ k.mT).div(2.0).softmax(-1, torch.float32).type_as(v) @ v,
    ],
)
def test_softmax_with_keyword_arguments_never_breaks_the_search(fn: Callable[..., Any]) -> None:
    for site in sites_of(fn):
        assert site.oddity is None
        assert (site.q.node.name, site.v.node.name) == ("l_q_", "l_v_")


def test_scales_before_and_after_the_product_multiply() -> None:
    site = only(lambda q, k, v: (2.0 * (q @ k.transpose(2, 3)) / 8.0).softmax(-1) @ v)
    assert site.scale == pytest.approx(0.25)


def test_dropout_on_the_weights_is_read() -> None:
    dropped = only(lambda q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), 0.5) @ v)
    kept = only(lambda q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), 0.5, training=False) @ v)
    assert (dropped.dropout, kept.dropout) == (0.5, 0.0)


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, k, v, m: torch.softmax(q @ k.mT + m, -1) @ v,
        lambda q, k, v, m: (q @ k.mT).masked_fill(m > 0, -1e9).softmax(-1) @ v,
        lambda q, k, v, m: torch.where(m > 0, q @ k.mT, -1e9).softmax(-1) @ v,
    ],
)
def test_a_mask_on_the_logits_is_more_than_plain_softmax(fn: Callable[..., Any]) -> None:
    assert only(fn, torch.randn(20, 20)).oddity is not None


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, k, v: torch.softmax(q @ k.mT, -2) @ v,  # over the queries
        lambda q, k, v: torch.softmax(q @ k.mT, 1) @ v,  # over the heads
        lambda q, k, v: torch.sigmoid(q @ k.mT) @ v,
        lambda q, k, v: torch.softmax(v, -1) @ v.mT @ v,  # no product below the softmax
        lambda q, k, v: torch.softmax((q @ k.mT) ** 2, -1) @ v,
        lambda q, k, v: torch.softmax(-(q @ k.mT), -1) @ v,
        lambda q, k, v: torch.softmax(torch.tanh(q @ k.mT / 50.0) * 50.0, -1) @ v,  # soft cap
        lambda q, k, v: (torch.softmax(q @ k.mT, -1) * 2.0) @ v,
        lambda q, k, v: torch.einsum("bhij,bhid->bhjd", torch.softmax(q @ k.mT, -1), v),
        lambda q, k, v: torch.softmax(torch.div(q @ k.mT, 2, rounding_mode="floor"), -1) @ v,
        lambda q, k, v: torch.softmax(torch.add(q @ k.mT, k @ q.mT), -1) @ v,
        lambda q, k, v: torch.softmax(
            torch.baddbmm(v[0] @ k[0].mT, q[0], k[0].mT), -1) @ v[0],  # beta = 1 adds a bias
        lambda q, k, v: v @ torch.softmax(v.mT @ k, -1),  # weights on the right
    ],
)  # fmt: skip
def test_near_misses_are_not_plain_attention(fn: Callable[..., Any]) -> None:
    assert all(site.oddity is not None for site in sites_of(fn))


def test_weights_may_be_used_elsewhere_too() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(q @ k.mT, -1)
        return weights @ v, weights.mean()

    assert only(fn).oddity is None
