"""Every executor against the reference on random layouts, and the reference against a naive one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from naive_attention import boxes_of_tokens, naive_attention
from random_calls import GUARD, TOLERANCE, bounds_of, calls, everything, guarded_outputs, poisoned
from running_executors import EXECUTORS_HERE
from same_lists import assert_lists, unlisted

from veda_compile.kernels.call import AttentionCall, Selection
from veda_compile.kernels.errors import ExecutorError
from veda_compile.kernels.executors import (
    EXECUTOR_NAMES,
    Executor,
    Traits,
    choose_executor,
    execute,
    get_executor,
)
from veda_compile.kernels.layout import Extra, Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.reference import ReferenceExecutor
from veda_compile.kernels.selection import select_tiles
from veda_compile.kernels.tiles import tile_table

EXAMPLES = {"reference": 70, "cpu": 118, "triton": 12}
"""Random calls per executor. Triton's interpreter takes seconds for what others do in moments."""


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
    assert_lists(call, found, select_tiles(call), apart=0.01)


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
@pytest.mark.parametrize("name", EXECUTORS_HERE)
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
        run(executor, call, unlisted(select_tiles(call), call))

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


@pytest.mark.parametrize("name", EXECUTORS_HERE)
def test_density_one_is_dense_attention(name: str) -> None:
    call = plain_call(heads=4, density=1.0)
    out, lse, _ = execute(name, call)
    right = torch.nn.functional.scaled_dot_product_attention(
        call.q, call.k, call.v, scale=call.scale, enable_gqa=True
    )
    torch.testing.assert_close(out, right, rtol=0, atol=2e-5)
    logits = call.q @ call.k.repeat_interleave(2, 1).transpose(2, 3) * call.scale
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", EXECUTORS_HERE)
def test_extra_queries_are_exact_at_any_density(name: str) -> None:
    call = plain_call(density=0.01)
    out, _, _ = execute(name, call)
    right = torch.nn.functional.scaled_dot_product_attention(
        call.q, call.k, call.v, scale=call.scale
    )
    extra = tile_table(call.layout, (1, 4, 16), call.q.device).extra.long()
    torch.testing.assert_close(out[:, :, extra], right[:, :, extra], rtol=0, atol=2e-5)
    assert (out - right).abs().max() > 0.05


@pytest.mark.parametrize("name", EXECUTORS_HERE)
def test_autocast_does_not_reach_the_executor(name: str) -> None:
    call = plain_call()
    right, right_lse, chosen = execute(name, call)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse, selection = execute(name, call)
    assert torch.equal(out, right) and torch.equal(lse, right_lse)
    assert torch.equal(selection.counts, chosen.counts)


@pytest.mark.parametrize("name", EXECUTORS_HERE)
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


@pytest.mark.parametrize("name", EXECUTORS_HERE)
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
