"""Packed attention over segments: rewritten where the offsets are proven, else left alone."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled, run, sparse_calls
from packed_samples import (
    TEXT,
    Bounds,
    Model,
    by_varlen,
    cumulated,
    inputs,
    joined,
    model,
    one_by_one,
    strided,
    two_texts_of_five,
    whole_samples,
)
from torch import Tensor
from toys import GRID, TOKENS

import veda_compile
from benchmarks.originals.flash import flash_attn_varlen_func
from veda_compile import Extra, Layout, Plan, Video, sparse_attention

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("valid", [(5,), (5, 2), (0, 8)])
@pytest.mark.parametrize(
    "bounds", [one_by_one, strided, cumulated, joined], ids=lambda b: b.__name__
)
def test_text_and_padding_of_every_sample(
    bounds: Bounds, valid: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = inputs(valid, dtype)
    dense = model(bounds)(*x)
    out, sites = run(model(bounds), *x)
    assert [(s.grid, s.layout) for s in sites] == [(GRID, "video 72 + extra 8")] * 2, sites
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=0.0)  # padding too


@pytest.mark.parametrize("bounds", [two_texts_of_five, whole_samples])
@pytest.mark.parametrize("batch", [1, 2])
def test_lengths_that_are_fixed(bounds: Bounds, batch: int) -> None:
    x = inputs((5,) * batch)
    out, sites = run(model(bounds), *x)
    assert [site.grid for site in sites if site.rewritten] == [GRID] * 2, sites
    torch.testing.assert_close(out, model(bounds)(*x), atol=2e-5, rtol=0.0)


def test_fewer_heads_of_keys() -> None:
    def grouped(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        return by_varlen(q, k, v, bounds)

    def repeated(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        return by_varlen(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2), bounds)

    x = inputs((5, 2))
    dense = model(one_by_one, repeated, kv_heads=1)(*x)
    with sparse_calls() as calls:
        out, _ = run(model(one_by_one, grouped, kv_heads=1), *x)
    assert [call.k.shape[1] for call, _ in calls] == [1, 1]
    torch.testing.assert_close(out, dense, atol=2e-5, rtol=0.0)


@pytest.mark.parametrize("executor", ["cpu", "reference"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_sparse_is_the_sparse_reference_on_the_true_grid(executor: str, inner: str) -> None:
    """With the padding attending to itself, exactly."""
    x, valid = inputs((5, 2)), torch.tensor([5, 2])
    with sparse_calls() as calls:
        out, _ = run(model(one_by_one), *x, density=0.3, executor=executor, inner=inner)
    plan: Plan = calls[0][0].plan
    assert plan.density == (0.3,) * 2

    def reference(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        own = torch.arange(TOKENS + TEXT) < TOKENS + valid[:, None]
        layout = Layout.of(Video(*GRID), Extra(TEXT))
        first = sparse_attention(
            q, k, v, layout=layout, plan=plan, key_valid=own, executor="reference"
        )
        rest = F.scaled_dot_product_attention(q, k, v, attn_mask=~own[:, None, None])
        return torch.where(own[:, None, :, None], first, rest).transpose(1, 2)

    expected = model(one_by_one, reference)(*x)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=0.0)
    assert (out - model(one_by_one)(*x)).abs().max() > 1e-3


class Blanked(Model):
    """A model whose graph shows that text and mask are equally long."""

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x, text.masked_fill(~mask.bool()[..., None], 0.0), mask)


def test_other_sizes_in_one_graph() -> None:
    blanked = Blanked(one_by_one).eval().requires_grad_(False)
    options = {"min_tokens": 0, "sidecar": None, "inner": "eager", "density": 1.0}
    fn = torch.compile(blanked, backend="veda", dynamic=True, options=options)
    for grid, text, valid in (((3, 5, 6), 9, 5), ((5, 6, 2), 11, 0), ((2, 7, 3), 5, 5)):
        x = inputs((valid, 1), text=text, grid=grid)
        with torch.no_grad(), sparse_calls() as calls:
            out = fn(*x)
        assert [call.layout.videos[0][1].grid for call, _ in calls] == [grid] * 2
        torch.testing.assert_close(out, blanked(*x), atol=2e-5, rtol=0.0)
    assert len(veda_compile.report().graphs) == 1


def cut_in_two(mask: Tensor, video: int) -> Tensor:
    return torch.tensor([0, video // 2, video + mask.shape[1]], dtype=torch.int32)


def cut_at_a_third_by_count(mask: Tensor, video: int) -> Tensor:
    whole = video + mask.shape[1]
    return torch.stack([torch.tensor(0), video // 3 + mask.sum(), torch.tensor(whole)]).int()


def three_parts(mask: Tensor, video: int) -> Tensor:
    ends = [0, video, video + 5, video + mask.shape[1]]
    return torch.tensor(ends, dtype=torch.int32)


def frames(mask: Tensor, video: int) -> Tensor:
    ends = [*range(0, video + 1, video // 3), video + mask.shape[1]]
    return torch.tensor(ends, dtype=torch.int32)


def written_again(mask: Tensor, video: int) -> Tensor:
    bounds = one_by_one(mask, video)
    bounds[1] = 30
    return bounds


def written_by_view(mask: Tensor, video: int) -> Tensor:
    bounds = one_by_one(mask, video)
    bounds[1:2].fill_(30)
    return bounds


def less_than_nothing(mask: Tensor, video: int) -> Tensor:
    """The count is taken off instead of put on."""
    ends = [torch.tensor(0), video - mask.sum(), torch.tensor(video + mask.shape[1])]
    return torch.stack(ends).int()


def padding_left_out(mask: Tensor, video: int) -> Tensor:
    return F.pad((video + mask.sum(1)).cumsum(0), (1, 0)).int()


def picked(mask: Tensor, video: int) -> Tensor:
    """The right numbers, by places that are computed."""
    return one_by_one(mask, video)[mask.sum() * torch.arange(3) // mask.sum()]


def halves(mask: Tensor, video: int) -> Tensor:
    whole = video + mask.shape[1]
    return torch.tensor([0, whole // 2, whole], dtype=torch.int32)


@pytest.mark.parametrize(
    "bounds",
    [cut_in_two, cut_at_a_third_by_count, three_parts, frames, written_again, written_by_view,
     less_than_nothing, picked, halves],
    ids=lambda bounds: bounds.__name__,
)  # fmt: skip
def test_other_segments_stay(bounds: Bounds) -> None:
    x = inputs((5,))
    out, sites = run(model(bounds), *x, density=0.3)
    expected = "TOKEN_ORDER" if bounds is halves else "SEGMENTS"
    assert [site.reason for site in sites] == [expected] * 2, sites
    assert all(site.explanation for site in sites)
    assert torch.equal(out, model(bounds)(*x))


def test_padding_left_out_stays() -> None:
    # what the op returns for tokens of no segment is undefined, or it returns fewer rows
    veda_compile.reset_report()
    with contextlib.suppress(RuntimeError), torch.no_grad():
        compiled(model(padding_left_out), density=0.3)(*inputs((5,)))
    assert [site.reason for site in veda_compile.report().sites] == ["SEGMENTS"] * 2


def test_offsets_from_outside_the_graph_stay() -> None:
    x, whole = inputs((5,)), model(one_by_one)
    given = one_by_one(x[2], TOKENS)
    out, sites = run(model(lambda mask, video: mask), *x[:2], given)
    assert [site.reason for site in sites] == ["SEGMENTS"] * 2
    assert all("outside the graph" in str(site.explanation) for site in sites)
    assert all("cu_seqlens" in str(site.remedy) for site in sites)
    assert torch.equal(out, whole(*x))


def test_a_longest_segment_that_is_too_short_stays() -> None:
    def shorter(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        packed = (x.flatten(0, 1) for x in (q, k, v))
        return flash_attn_varlen_func(*packed, bounds, bounds, TOKENS, TOKENS).view(q.shape)

    _, sites = run(model(one_by_one, shorter), *inputs((5,)))
    assert [site.reason for site in sites] == ["SEGMENTS"] * 2


def test_keys_that_end_elsewhere_stay() -> None:
    def apart(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        packed = [x.flatten(0, 1) for x in (q, k, v)]
        other = bounds.clone()
        other[1] = other[1] - 1
        return flash_attn_varlen_func(*packed, bounds, other, 80, 80).view(q.shape)

    x = inputs((5,))
    out, sites = run(model(one_by_one, apart), *x)
    assert [site.reason for site in sites] == ["SEGMENTS"] * 2
    assert torch.equal(out, model(one_by_one, apart)(*x))


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_mask_of_numbers_that_do_not_count_tokens_is_refused_when_it_comes(inner: str) -> None:
    fn = compiled(model(one_by_one), density=0.3, inner=inner)
    x, text, mask = inputs((5,))
    with torch.no_grad():
        fn(x, text, mask)
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            fn(x, text, -mask)


def test_a_whole_sequence_that_is_none_is_refused_when_it_comes() -> None:
    """Two offsets from outside the graph, whose longest segment is told to be everything."""
    fn = compiled(model(lambda mask, video: mask), density=0.3)
    x, text, _ = inputs((5,))
    with torch.no_grad(), sparse_calls() as calls:
        fn(x, text, torch.tensor([0, TOKENS + TEXT], dtype=torch.int32))
        assert len(calls) == 2
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            fn(x, text, torch.tensor([0, TOKENS], dtype=torch.int32))


def test_a_cross_attention_is_called_one() -> None:
    def to_text(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        packed = [x.flatten(0, 1) for x in (q[:, :TOKENS], k[:, TOKENS:], v[:, TOKENS:])]
        ends = [torch.stack([bounds[0], bounds[0] + n]) for n in (TOKENS, TEXT - 3)]
        out = flash_attn_varlen_func(*packed, *ends, TOKENS, TEXT)
        return F.pad(out[None], (0, 0, 0, 0, 0, TEXT))

    x = inputs((5,))
    out, sites = run(model(one_by_one, to_text), *x)
    assert [site.reason for site in sites] == ["CROSS_ATTENTION"] * 2
    assert torch.equal(out, model(one_by_one, to_text)(*x))
