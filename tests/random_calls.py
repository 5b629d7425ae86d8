"""Random attention calls, and what shows what an executor reads and writes beside its own."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from hypothesis import strategies as st

from veda_compile.kernels.call import AttentionCall, empty_output
from veda_compile.kernels.executors import (
    Executor,
    Traits,
)
from veda_compile.kernels.layout import Context, Extra, Layout, Video
from veda_compile.kernels.plan import Plan, count_tiles, factorisations, least_padding_shape
from veda_compile.kernels.static_modes import Modes, StaticMode

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


GUARD = 1024


@dataclass(frozen=True)
class Bounds:
    """How large random calls get, and which traits they may have. tiles: of one head.

    extra: tokens of an extra or a context segment.
    """

    sides: tuple[int, int, int]
    segments: int
    extra: int
    tiles: int
    traits: tuple[Traits, ...]


def bounds_of(executor: Executor) -> Bounds:
    """What the executor's own `verify` lets it run."""
    # the interpreter multiplies the bit patterns of bfloat16 numbers
    half = torch.float16 if executor.name == "triton" else torch.bfloat16
    traits = tuple(
        found
        for dtype in (torch.float32, half)
        for head_dim in (5, 16, 64, 96)
        for size in (8, 12, 64, 128)
        if executor.verify(found := Traits("cpu", dtype, head_dim, size)).ok
    )
    assert traits, f"{executor.name} can run nothing here"
    if executor.name == "triton":
        return Bounds((3, 6, 9), 2, 20, 4, traits)
    if executor.name == "reference":
        return Bounds((3, 4, 5), 3, 4, 60, tuple(t for t in traits if t.head_dim <= 16))
    return Bounds((4, 6, 9), 4, 30, 400, traits)


@st.composite
def calls(draw: st.DrawFn, bounds: Bounds) -> AttentionCall:
    """Random calls: layouts, plans, GQA, padding, strides, flags. What pads holds NaN."""
    videos = st.builds(Video, *[st.integers(1, side) for side in bounds.sides])
    extras, contexts = (st.builds(kind, st.integers(1, bounds.extra)) for kind in (Extra, Context))
    segments = draw(st.lists(videos | extras | contexts, min_size=0, max_size=bounds.segments - 1))
    segments.insert(draw(st.integers(0, len(segments))), draw(videos))
    layout = Layout(tuple(segments))
    traits = draw(st.sampled_from(bounds.traits))
    batch, kv_heads, repeat = draw(st.tuples(*[st.integers(1, 2)] * 3))
    heads = kv_heads * repeat
    few_tiles = [
        shape
        for shape in factorisations(traits.tile_size)
        if sum(count_tiles(video.grid, shape) for _, video in layout.videos) <= bounds.tiles
    ] or [least_padding_shape(layout, traits.tile_size)]
    shapes = draw(st.lists(st.sampled_from(few_tiles), min_size=heads, max_size=heads))
    density = draw(
        st.lists(st.sampled_from([0.01, 0.2, 0.35, 0.5, 0.9, 1.0]), min_size=heads, max_size=heads)
    )
    score = draw(st.sampled_from(["closed_form", "mean", "projection"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q, k, v = (
        draw(stored(batch, h, tokens, traits.head_dim, traits.dtype, generator))
        for h, tokens in (
            (heads, layout.query_length),
            (kv_heads, layout.length),
            (kv_heads, layout.length),
        )
    )
    scale = draw(st.sampled_from([1 / math.sqrt(traits.head_dim), 0.4, 0.0]))
    valid = validity(draw, layout, batch, generator)
    if valid is not None:
        for x in (k, v):
            x.masked_fill_(~valid[:, None, :, None], torch.nan)
    dim = traits.head_dim
    projection = 0.1 * torch.randn(2, heads, 3 * dim, dim, generator=generator)
    rank = draw(st.sampled_from([None, 1, 3]))
    factors = None
    if rank is not None and score != "mean":
        factors = torch.randn(2, heads, dim, rank, generator=generator)
    plan = Plan(
        tuple(shapes),
        tuple(density),
        score,
        projection if score == "projection" else None,
        factors,
        draw(st.none() | modes(heads)),
    )
    keep_all = draw(st.sampled_from([None, None, torch.tensor(False), torch.tensor(True)]))
    return AttentionCall(q, k, v, layout, plan, scale, valid, keep_all)


def modes(heads: int) -> st.SearchStrategy[Modes]:
    """A static mode, or none, for each head."""
    share = st.integers(0, 9).map(lambda tenth: tenth / 10)
    reach = st.integers(0, 3)
    columns = st.lists(st.tuples(share, share, share), min_size=1, max_size=3).map(tuple)
    one = st.one_of(
        st.none(),
        st.builds(StaticMode, st.sampled_from(["full", "skip"])),
        st.builds(StaticMode, st.just("diagonal"), st.tuples(reach, st.just(0))),
        st.builds(StaticMode, st.just("multi_diagonal"), st.tuples(reach, reach)),
        st.builds(StaticMode, st.just("stripe"), columns=columns),
    )
    return st.lists(one, min_size=heads, max_size=heads).map(tuple)


@st.composite
def stored(
    draw: st.DrawFn,
    batch: int,
    heads: int,
    tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> torch.Tensor:
    """(batch, heads, tokens, head_dim) as a slice of a larger NaN-filled buffer."""
    values = torch.randn(batch, heads, tokens, head_dim, generator=generator)
    token_major = draw(st.booleans())
    if token_major:
        values = values.transpose(1, 2)
    step = draw(st.sampled_from([1, 1, 2]))
    sizes = values.shape
    buffer = torch.full(
        (sizes[0] + 2, sizes[1] + 2, sizes[2] + 2, sizes[3] * step + 6), torch.nan, dtype=dtype
    )
    view = buffer[1:-1, 1:-1, 1:-1, 3 : 3 + sizes[3] * step : step]
    view.copy_(values)
    return view.transpose(1, 2) if token_major else view


def validity(
    draw: st.DrawFn, layout: Layout, batch: int, generator: torch.Generator
) -> torch.Tensor | None:
    """Random keys, whole frames or everything of one batch element masked out; or nothing."""
    kind = draw(st.sampled_from(["none", "none", "scattered", "segment", "element"]))
    if kind == "none":
        return None
    valid = torch.rand(batch, layout.length, generator=generator) > 0.3
    if kind == "segment":
        offset, video = draw(st.sampled_from(layout.videos))
        valid[:, offset : offset + video.length] = False
    if kind == "element":
        valid[0] = False
    return valid


def everything(x: torch.Tensor) -> torch.Tensor:
    """A copy of the whole storage of x as bytes, guard bands included."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).clone()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN and huge integers, so that what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextlib.contextmanager
def guarded_outputs() -> Iterator[list[torch.Tensor]]:
    """Outputs lie between guard bands: yields the flat buffers, filled by the calls made inside."""
    buffers: list[torch.Tensor] = []

    def guarded(q: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, head_dim = q.shape
        buffer = torch.full((q.numel() + 2 * GUARD,), torch.nan, dtype=q.dtype)
        buffers.append(buffer)
        inner = buffer[GUARD:-GUARD].view(batch, tokens, heads, head_dim)
        return inner.transpose(1, 2)

    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            is_kernel = name.startswith("veda_compile.kernels.")
            if is_kernel and vars(module).get("empty_output") is empty_output:
                stack.enter_context(mock.patch.object(module, "empty_output", guarded))
        yield buffers
