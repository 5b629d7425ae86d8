"""Calls for the Triton kernels in the interpreter, and their lists against the reference's."""

import math

import pytest
import torch
from same_lists import assert_lists
from torch import float32

from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.layout import Context, Extra, Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.reference import ReferenceExecutor
from veda_compile.kernels.triton.executor import TritonExecutor

REFERENCE, TRITON = ReferenceExecutor(), TritonExecutor()

MIXED_LAYOUT = Layout.of(
    Context(2), Extra(3), Video(3, 4, 9), Extra(70), Video(2, 5, 8), Context(66), Extra(1)
)
MIXED_PLAN = Plan(((2, 4, 8), (1, 8, 8), (2, 4, 8), (4, 4, 4)), (0.3, 0.5, 1.0, 0.2))


def some_valid(batch, layout):
    """Random keys, and none at all in the first 60 tokens of the last batch element."""
    valid = torch.rand(batch, layout.length, generator=torch.Generator().manual_seed(1)) < 0.7
    valid[-1, :60] = False
    return valid


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN, or the largest integer: what is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def in_nan(*shape, dtype, channel_step=1):
    """Random numbers (B, H, N, D) as a strided view into a larger buffer of NaN."""
    batch, heads, tokens, head_dim = shape
    steps = (tokens + 3, heads + 1, head_dim * channel_step + 8)
    buffer = torch.full((batch + 2, *steps), math.nan, dtype=dtype)
    inner = buffer[1:-1, 2:-1, :heads, 4 : 4 + head_dim * channel_step : channel_step]
    view = inner.transpose(1, 2)
    view.copy_(torch.randn(shape))
    return view


def make_call(
    layout,
    plan,
    head_dim=64,
    dtype=float32,
    batch=1,
    kv_heads=1,
    key_valid=None,
    scale=None,
    seed=0,
):
    torch.manual_seed(seed)
    q = in_nan(batch, plan.heads, layout.query_length, head_dim, dtype=dtype)
    k, v = (in_nan(batch, kv_heads, layout.length, head_dim, dtype=dtype) for _ in range(2))
    if key_valid is not None:
        hidden = ~key_valid[:, None, :, None]
        k.masked_fill_(hidden, math.nan)
        v.masked_fill_(hidden, math.nan)
    return AttentionCall(q, k, v, layout, plan, scale or head_dim**-0.5, key_valid)


def check_select(call):
    """The same lists as the reference, and lists any executor can run."""
    selection = TRITON.select(call)
    assert_lists(call, selection, REFERENCE.select(call))
    return selection
