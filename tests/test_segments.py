"""Packed attention over segments: rewritten where the offsets are proven, else left alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled, run, sparse_calls
from torch import Tensor, nn
from toys import GRID, TOKENS, latents

import veda_compile
from benchmarks.originals.flash import flash_attn_varlen_func
from veda_compile import Extra, Layout, Plan, Video, sparse_attention

pytestmark = pytest.mark.usefixtures("fresh_compiler")

TEXT = 8
Bounds = Callable[[Tensor, int], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def one_by_one(mask: Tensor, video: int) -> Tensor:
    batch, length = mask.shape
    counts = mask.sum(dim=1)
    bounds = torch.zeros([2 * batch + 1], dtype=torch.int32)
    for i in range(batch):
        bounds[2 * i + 1] = i * (video + length) + video + counts[i]
        bounds[2 * i + 2] = (i + 1) * (video + length)
    return bounds


def strided(mask: Tensor, video: int) -> Tensor:
    batch, length = mask.shape
    starts = torch.arange(0, batch) * (video + length)
    bounds = torch.zeros(2 * batch + 1, dtype=torch.int32)
    bounds[1::2] = (starts + video + torch.count_nonzero(mask, dim=-1)).to(torch.int32)
    bounds[2::2] = starts + (video + length)
    return bounds


def cumulated(mask: Tensor, video: int) -> Tensor:
    counts = mask.bool().long().sum(-1)
    lengths = torch.stack([counts + video, mask.shape[1] - counts], dim=1).flatten()
    return F.pad(lengths.cumsum(0), (1, 0)).int()


def joined(mask: Tensor, video: int) -> Tensor:
    batch, length = mask.shape
    parts = [torch.zeros(1, dtype=torch.int64)]
    for i in range(batch):
        hidden = torch.sum(mask == 0, dim=1, keepdim=True)[i]
        end = torch.full((1,), (i + 1) * (video + length))
        parts += [end - hidden, end]
    return torch.cat(parts).to(torch.int32)


def two_texts_of_five(mask: Tensor, video: int) -> Tensor:
    whole = video + mask.shape[1]
    ends = [end for i in range(len(mask)) for end in (i * whole, (i + 1) * whole - 3)]
    return torch.tensor([*ends, len(mask) * whole], dtype=torch.int32)


def whole_samples(mask: Tensor, video: int) -> Tensor:
    whole = video + mask.shape[1]
    return torch.arange(0, (len(mask) + 1) * whole, whole, dtype=torch.int32)


def by_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    batch, tokens = q.shape[:2]
    packed = (x.reshape(batch * tokens, *x.shape[2:]) for x in (q, k, v))
    return flash_attn_varlen_func(*packed, bounds, bounds, tokens, tokens).view(q.shape)


class Model(nn.Module):
    """Two layers over a (B, 4, T, H, W) video and the text behind it, packed."""

    def __init__(self, bounds: Bounds, attend: Attend = by_varlen, kv_heads: int = 2) -> None:
        super().__init__()
        self.bounds, self.attend, self.kv_heads = bounds, attend, kv_heads
        self.embed, self.text = nn.Linear(4, 32), nn.Linear(4, 32)
        self.qkv = nn.ModuleList(nn.Linear(32, 32 + 2 * 16 * kv_heads) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        video = self.embed(x.flatten(2).transpose(1, 2))
        tokens = torch.cat([video, self.text(text)], 1)
        bounds = self.bounds(mask, video.shape[1])
        for layer in self.qkv:
            heads = layer(F.layer_norm(tokens, (32,))).unflatten(-1, (-1, 16))
            q, k, v = heads.split([2, self.kv_heads, self.kv_heads], dim=2)
            tokens = tokens + self.attend(q * 3.0, k, v, bounds).flatten(2)
        return tokens


def model(*args: Any, **kwargs: Any) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(*args, **kwargs).eval().requires_grad_(False)


def inputs(valid: tuple[int, ...], dtype: torch.dtype = torch.int64, text: int = TEXT,
           grid: tuple[int, int, int] = GRID) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    words = torch.randn(len(valid), text, 4, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(text) < torch.tensor(valid)[:, None]
    return latents(grid, batch=len(valid)), words, mask.to(dtype)


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
