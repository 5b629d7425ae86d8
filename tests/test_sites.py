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
    assert (site.masks, site.dropout, site.causal, site.scale) == ((), 0.0, False, None)
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
        assert [mask.node.name for mask in site.masks] == ["l_m_"]
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


def test_masks_on_the_logits_are_read() -> None:
    def added(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return torch.softmax((q @ k.mT + m) / 2.0, -1) @ v

    def filled(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(m, -1e9).softmax(-1) @ v

    def chosen(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return torch.where(m, q @ k.mT, -torch.inf).softmax(-1) @ v

    def in_the_product(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return torch.softmax(torch.baddbmm(m, q[0], k[0].mT), -1) @ v[0]

    sides = ("b", "h", "q", "k")
    boolean = torch.ones(20, 20, dtype=torch.bool)
    (mask,) = only(added, torch.randn(20, 20)).masks
    assert (mask.node.name, mask.roles, mask.hides, mask.factor) == ("l_m_", sides, None, 0.5)
    (mask,) = only(filled, boolean).masks
    assert (mask.node.name, mask.hides, mask.shown_where) == ("l_m_", -1e9, False)
    (mask,) = only(chosen, boolean).masks
    assert (mask.node.name, mask.hides, mask.shown_where) == ("l_m_", -torch.inf, True)
    (mask,) = only(in_the_product, torch.randn(20, 20)).masks
    assert (mask.node.name, mask.roles) == ("l_m_", ("b", "q", "k"))


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, k, v: torch.nn.Softmax(dim=-1)(q @ k.mT) @ v,
        lambda q, k, v: F.softmax(q @ k.mT, dim=3) @ v,
        lambda q, k, v: torch.einsum(
            "...ij,...jd->...id", torch.softmax(torch.einsum("...id,...jd->...ij", q, k), -1), v
        ),
        lambda q, k, v: torch.bmm(
            torch.softmax(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT), -1), v.flatten(0, 1)
        ),
        lambda q, k, v: torch.bmm(
            torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT)
            .view(2, 3, 20, 20)
            .softmax(-1)
            .view(6, 20, 20),
            v.flatten(0, 1),
        ),
        lambda q, k, v: (v.mT @ torch.softmax(k @ q.mT, -2)).mT,
        lambda q, k, v: torch.einsum(
            "bhji,bhjd->bhid", torch.softmax(torch.einsum("bhjd,bhid->bhji", k, q), 2), v
        ),
        lambda q, k, v: torch.softmax(
            torch.baddbmm(torch.zeros(2, 20, 20), q[:, 0], k[:, 0].mT), -1) @ v[:, 0],
    ],
)  # fmt: skip
def test_other_spellings_of_products_and_softmax(fn: Callable[..., Any]) -> None:
    site = only(fn)
    assert site.oddity is None
    assert site.q.node.all_input_nodes or site.q.node.name == "l_q_"


def stable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.mT * SCALE
    exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
    return (exponentials / exponentials.sum(-1, keepdim=True)) @ v


def stable_divided_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.mT * SCALE
    exponentials = torch.exp(logits - logits.max(dim=-1, keepdim=True).values)
    return (exponentials @ v) / torch.sum(exponentials, dim=-1, keepdim=True)


def stable_over_other_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.mT
    return torch.softmax(logits - logits.amax(-2, keepdim=True), -1) @ v


def normalised_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    exponentials = (q @ k.mT).exp()
    return (exponentials / exponentials.sum(-2, keepdim=True)) @ v


def test_softmax_as_exponentials_over_their_sum() -> None:
    for fn in (stable, stable_divided_last):
        site = only(fn)
        assert (site.oddity, site.scale) == (None, pytest.approx(SCALE)), fn
    for fn in (stable_over_other_rows, normalised_over_queries):
        assert not sites_of(fn), fn


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda q, k, v: torch.softmax((q @ k.mT).clamp(-5, 5), -1) @ v, "clamp"),
        (lambda q, k, v: torch.softmax(torch.tanh(q @ k.mT), -1) @ v, "tanh"),
        (lambda q, k, v: torch.softmax(q @ k.mT * v.mean(), -1) @ v, "scaled by a tensor"),
        (lambda q, k, v: torch.softmax(q @ k.mT - v.mean(), -1) @ v, "subtracted"),
        (lambda q, k, v: torch.softmax(q @ k.mT, -1).relu() @ v, "weights pass through relu"),
        (lambda q, k, v: (torch.softmax(q @ k.mT, -1) * 2.0) @ v, "weights pass through mul"),
    ],
)
def test_what_else_happens_to_logits_and_weights_is_named(fn: Any, words: str) -> None:
    assert words in str(only(fn).oddity)


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
        lambda q, k, v: torch.softmax(
            torch.baddbmm(v[0] @ k[0].mT, q[0], k[0].mT, beta=2), -1) @ v[0],
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
