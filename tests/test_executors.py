"""Every executor against the reference on random layouts, and the reference against a naive one."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_attention import boxes_of_tokens, naive_attention

from veda_compile.kernels.call import AttentionCall, Selection, empty_output
from veda_compile.kernels.errors import ExecutorError
from veda_compile.kernels.executors import (
    EXECUTOR_NAMES,
    Executor,
    Traits,
    choose_executor,
    execute,
    get_executor,
)
from veda_compile.kernels.layout import Context, Extra, Layout, Video
from veda_compile.kernels.plan import Plan, count_tiles, factorisations, least_padding_shape
from veda_compile.kernels.reference import ReferenceExecutor
from veda_compile.kernels.selection import kept_map, select_tiles
from veda_compile.kernels.static_modes import Modes, StaticMode
from veda_compile.kernels.tiles import tile_table

EXAMPLES = {"reference": 70, "cpu": 118, "triton": 12}
"""Random calls per executor. Triton's interpreter takes seconds for what others do in moments."""

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


def assert_same(
    found: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    tolerance = TOLERANCE[dtype]
    out, lse = found
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.double(), right[0].double(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), right[1].double(), rtol=tolerance, atol=tolerance)


def run(executor: Executor, call: AttentionCall, selection: Selection) -> None:
    """Check `attend` against the reference, and that it writes its results and nothing else."""
    inputs = [x for x in (call.q, call.k, call.v, call.key_valid) if x is not None]
    before = [everything(x) for x in inputs]
    with poisoned(), guarded_outputs() as buffers:
        out, lse = executor.attend(call, selection)
    assert out.shape == call.q.shape and lse.shape == call.q.shape[:3]
    assert out.transpose(1, 2).is_contiguous()
    assert buffers, "outputs come from call.empty_output"
    for buffer in buffers:
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()
    for x, old in zip(inputs, before, strict=True):
        assert torch.equal(everything(x), old)
    assert_same((out, lse), ReferenceExecutor().attend(call, selection), call.q.dtype)


def assert_selected(found: Selection, call: AttentionCall) -> None:
    """`found` is what `select_tiles` finds, give or take pairs whose scores round apart."""
    right = select_tiles(call)
    assert torch.equal(found.counts, right.counts)
    ascending = found.indices.long().diff(dim=-1) > 0
    listed = torch.arange(1, found.indices.shape[-1]) < found.counts[..., None]
    assert torch.all(ascending | ~listed)
    different, pairs = 0, 0
    for head, shape in enumerate(call.plan.tile_shapes):
        tiles = tile_table(call.layout, shape, call.q.device).tiles
        different += int((kept_map(found, [head], tiles) ^ kept_map(right, [head], tiles)).sum())
        pairs += tiles * tiles
    assert different <= 0.01 * pairs


def naive_check(call: AttentionCall) -> None:
    """The reference, selection included, against loops in float64."""
    with poisoned():
        selection = select_tiles(call)
        found = ReferenceExecutor().attend(call, selection)
    out, lse, kept = naive_attention(call)
    assert_same(found, (out, lse), call.q.dtype)
    for batch, heads in enumerate(kept):
        for head, lists in enumerate(heads):
            boxes = boxes_of_tokens(call.layout, call.plan.tile_shapes[head])
            number = {box: i for i, box in enumerate(sorted({b for b in boxes if b is not None}))}
            counts = selection.counts[batch, head]
            assert (counts[len(number) :] == 0).all()
            for box, keys in lists.items():
                row = selection.indices[batch, head, number[box]][: counts[number[box]]]
                assert row.tolist() == sorted(number[key] for key in keys)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small calls lose more to threads than they gain, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("name", EXECUTOR_NAMES)
def test_random_calls(name: str) -> None:
    executor = get_executor(name)

    @settings(deadline=None, derandomize=True, max_examples=EXAMPLES[name], database=None)
    @given(calls(bounds_of(executor)))
    def check(call: AttentionCall) -> None:
        if name == "reference":
            naive_check(call)
        else:
            with poisoned():
                selection = executor.select(call)
            assert_selected(selection, call)
        run(executor, call, select_tiles(call))

    check()


def plain_call(
    heads: int = 2, kv_heads: int = 2, density: float = 0.3, dtype: torch.dtype = torch.float32
) -> AttentionCall:
    layout = Layout.of(Extra(3), Video(2, 5, 13), Extra(20))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, layout.length, 64, generator=generator).to(dtype)
        for h in (heads, kv_heads, kv_heads)
    )
    return AttentionCall(q, k, v, layout, Plan.uniform(heads, (1, 4, 16), density), 0.125)


@pytest.mark.parametrize("name", EXECUTOR_NAMES)
def test_density_one_is_dense_attention(name: str) -> None:
    call = plain_call(heads=4, density=1.0)
    out, lse, _ = execute(name, call)
    right = torch.nn.functional.scaled_dot_product_attention(
        call.q, call.k, call.v, scale=call.scale, enable_gqa=True
    )
    torch.testing.assert_close(out, right, rtol=0, atol=2e-5)
    logits = call.q @ call.k.repeat_interleave(2, 1).transpose(2, 3) * call.scale
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", EXECUTOR_NAMES)
def test_extra_queries_are_exact_at_any_density(name: str) -> None:
    call = plain_call(density=0.01)
    out, _, _ = execute(name, call)
    right = torch.nn.functional.scaled_dot_product_attention(
        call.q, call.k, call.v, scale=call.scale
    )
    extra = tile_table(call.layout, (1, 4, 16), call.q.device).extra.long()
    torch.testing.assert_close(out[:, :, extra], right[:, :, extra], rtol=0, atol=2e-5)
    assert (out - right).abs().max() > 0.05


@pytest.mark.parametrize("name", EXECUTOR_NAMES)
def test_autocast_does_not_reach_the_executor(name: str) -> None:
    call = plain_call()
    right, right_lse, chosen = execute(name, call)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse, selection = execute(name, call)
    assert torch.equal(out, right) and torch.equal(lse, right_lse)
    assert torch.equal(selection.counts, chosen.counts)


@pytest.mark.parametrize("name", EXECUTOR_NAMES)
def test_the_default_device_does_not_reach_the_executor(name: str) -> None:
    call = plain_call(density=0.31)
    with torch.device("meta"):
        out, lse, _ = execute(name, call)
    right, right_lse, _ = execute(name, call)
    assert torch.equal(out, right) and torch.equal(lse, right_lse)


def test_executors_are_chosen_by_name_and_device() -> None:
    traits = Traits("cpu", torch.float32, 64, 64)
    assert choose_executor("auto", traits).name == "cpu"
    for name in EXECUTOR_NAMES:
        assert get_executor(name).name == name
    with pytest.raises(ExecutorError, match="'fast': must be one of auto, reference"):
        choose_executor("fast", traits)


@pytest.mark.parametrize("name", EXECUTOR_NAMES)
def test_an_executor_refuses_what_it_cannot_run(name: str) -> None:
    with pytest.raises(ExecutorError, match=f"'{name}' cannot run here: .*float64"):
        choose_executor(name, Traits("cpu", torch.float64, 64, 64))


def test_triton_is_named_where_it_is_missing() -> None:
    hidden = {n: None for n in sys.modules if n == "triton" or n.startswith("triton.")}
    ours = [n for n in sys.modules if n.startswith("veda_compile.kernels.triton")]
    with mock.patch.dict(sys.modules, {**hidden, "triton": None}):
        for name in ours:
            del sys.modules[name]
        with pytest.raises(ExecutorError, match="triton is not installed"):
            get_executor("triton")
