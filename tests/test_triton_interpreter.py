"""The Triton kernels in Triton's interpreter, against the reference executor."""

import math

import numpy as np
import pytest
import torch
from torch import float16, float32

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton_calls import (  # noqa: E402, F401
    MIXED_LAYOUT,
    MIXED_PLAN,
    REFERENCE,
    TRITON,
    check_select,
    in_nan,
    make_call,
    poisoned_memory,
    some_valid,
)

from veda_compile.kernels.call import AttentionCall, Selection  # noqa: E402
from veda_compile.kernels.executors import Traits  # noqa: E402
from veda_compile.kernels.layout import Extra, Layout, Video  # noqa: E402
from veda_compile.kernels.op import sparse_attention_v2  # noqa: E402
from veda_compile.kernels.plan import Plan  # noqa: E402
from veda_compile.kernels.triton import attend  # noqa: E402
from veda_compile.kernels.triton.configs import AttendConfig  # noqa: E402

# exp2 and the order of sums; half types also round the weights (bfloat16: truncated when cast)
TOLERANCE = {float32: 4e-6, float16: 3e-3, torch.bfloat16: 2.4e-2}
NOTHING = torch.iinfo(torch.int32).max


@pytest.fixture(autouse=True)
def bfloat16_products(monkeypatch):
    """The interpreter keeps bfloat16 as 16-bit integers and would multiply those."""
    original = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, d, *options):
        return original(self, widened(a), widened(b), d, *options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def whole_tiles(monkeypatch):
    """One program per tile and one step per key tile: the interpreter's time goes with both."""

    def config(head_dim, tile_size, dtype, generation, wide):
        return AttendConfig(tile_size, tile_size, 4, 1)

    monkeypatch.setattr(attend, "attend_config", config)


def check_attend(call, selection):
    out, lse = TRITON.attend(call, selection)
    wanted_out, wanted_lse = REFERENCE.attend(call, selection)
    tolerance = TOLERANCE[call.q.dtype]
    torch.testing.assert_close(out, wanted_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-5, rtol=1e-5)
    assert out.transpose(1, 2).is_contiguous()
    return out, lse


SHAPES = {64: (2, 4, 8), 128: (4, 4, 8)}


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", [float32, float16, torch.bfloat16], ids=str)
def test_attend(dtype, head_dim, size):
    layout = Layout.of(Video(2, 6, 9), Extra(5))
    call = make_call(layout, Plan((SHAPES[size],) * 2, (0.5, 1.0)), head_dim, dtype)
    check_attend(call, REFERENCE.select(call))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attend_as_launched_on_hopper(monkeypatch, head_dim):
    monkeypatch.setattr(attend, "gpu_generation", lambda device: 9)
    plan = Plan.uniform(2, (4, 4, 8), 0.5)
    call = make_call(Layout.of(Video(5, 6, 9), Extra(5)), plan, head_dim, float16)
    check_attend(call, REFERENCE.select(call))


@pytest.mark.usefixtures("whole_tiles")
@pytest.mark.parametrize("padded", [False, True])
def test_attend_with_everything_at_once(padded):
    valid = some_valid(2, MIXED_LAYOUT) if padded else None
    plan = Plan(MIXED_PLAN.tile_shapes[:2], (0.3, 0.5))
    call = make_call(MIXED_LAYOUT, plan, batch=2, kv_heads=1, key_valid=valid)
    check_attend(call, REFERENCE.select(call))


@pytest.mark.usefixtures("whole_tiles")
def test_nan_is_kept_and_shows():
    layout = Layout.of(Video(2, 4, 32))
    call = make_call(layout, Plan.uniform(1, (2, 4, 8), 0.25))
    call.k[0, 0, 9] = math.nan  # in tile 1
    selection = check_select(call)
    assert selection.indices[0, 0, 1, 0] == 1
    out, lse = TRITON.attend(call, selection)
    keeping = (selection.indices == 1).any(-1)[0, 0]
    tile = torch.arange(layout.length) % 32 // 8
    assert torch.equal(out[0, 0].isnan().all(-1), keeping[tile])
    assert torch.equal(lse[0, 0].isnan(), keeping[tile])


@pytest.mark.usefixtures("whole_tiles")
def test_unlisted_entries_are_not_read():
    layout = Layout.of(Video(4, 4, 20), Extra(2))
    call = make_call(layout, Plan.uniform(2, (2, 4, 8), 0.5))
    counts = torch.tensor([[[0, 1, 6, 2, 0, 3], [6, 0, 1, 1, 5, 0]]], dtype=torch.int32)
    indices = torch.arange(6, dtype=torch.int32).repeat(1, 2, 6, 1)
    indices[torch.arange(6) >= counts[..., None]] = NOTHING
    check_attend(call, Selection(indices, counts))


def test_rows_without_any_key():
    layout = Layout.of(Video(2, 4, 16), Extra(2))
    valid = torch.ones(1, layout.length, dtype=torch.bool)
    valid[:, 128:] = False
    call = make_call(layout, Plan.uniform(1, (2, 4, 8), 0.5), key_valid=valid)
    counts = torch.tensor([[[0, 1]]], dtype=torch.int32)
    out, lse = check_attend(call, Selection(torch.ones(1, 1, 2, 1, dtype=torch.int32), counts))
    empty = torch.arange(128) % 16 < 8
    assert (out[0, 0, :128][empty] == 0).all()
    assert (lse[0, 0, :128] == -math.inf).equal(empty)


@pytest.mark.usefixtures("whole_tiles")
def test_lists_may_be_strided():
    layout = Layout.of(Video(2, 4, 24))
    call = make_call(layout, Plan.uniform(2, (2, 4, 8), 0.6))
    selection = REFERENCE.select(call)
    indices = torch.stack([selection.indices] * 2, dim=-1)[..., 0]
    counts = torch.stack([selection.counts] * 2, dim=2)[:, :, 0]
    check_attend(call, Selection(indices, counts))


@pytest.mark.usefixtures("whole_tiles")
@pytest.mark.parametrize("scale", [-0.2, 1e-9, 0.5])
def test_unusual_scales(scale):
    call = make_call(Layout.of(Video(2, 4, 16), Extra(1)), MIXED_PLAN, kv_heads=4, scale=scale)
    check_attend(call, REFERENCE.select(call))


@pytest.mark.usefixtures("whole_tiles")
def test_channels_need_not_be_adjacent():
    layout = Layout.of(Video(2, 4, 16))
    q, k, v = (in_nan(1, 2, 128, 64, dtype=float32, channel_step=2) for _ in range(3))
    call = AttentionCall(q, k, v, layout, Plan.uniform(2, (2, 4, 8), 0.5), 0.125)
    check_attend(call, check_select(call))


def test_addresses_beyond_32_bits(monkeypatch):
    # the interpreter would copy the buffer, gigabytes of untouched pages, onto itself
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    torch.use_deterministic_algorithms(False)  # and poison would touch them
    far = 2**31 // 63 + 16
    tokens = 64
    buffer = torch.empty(far * tokens, dtype=float16)
    layout = Layout.of(Video(1, 8, 8))
    q, k, v = (
        buffer.as_strided((1, 1, tokens, 64), (1, 1, far, 1), offset) for offset in (0, 64, 128)
    )
    torch.manual_seed(0)
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape))
    assert (tokens - 1) * q.stride(2) >= 2**31
    call = AttentionCall(q, k, v, layout, Plan.uniform(1, (1, 8, 8), 1.0), 0.125)
    check_attend(call, check_select(call))


@pytest.mark.usefixtures("whole_tiles")
def test_through_the_op():
    layout = Layout.of(Video(2, 4, 20), Extra(3))
    plan = Plan.uniform(2, (2, 4, 8), 0.5)
    call = make_call(layout, plan, kv_heads=2)
    arguments = (
        *(call.q, call.k, call.v, None, layout.encode(), None),
        torch.tensor(plan.tile_shapes, dtype=torch.int32),
        torch.tensor(plan.density, dtype=torch.float64),
        *(None, plan.score, None),
    )
    out, lse = sparse_attention_v2(*arguments, "triton")
    wanted_out, wanted_lse = sparse_attention_v2(*arguments, "reference")
    torch.testing.assert_close(out, wanted_out, atol=4e-6, rtol=4e-6)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("traits", "value"),
    [
        (Traits("xpu", float16, 128, 128), "xpu"),
        (Traits("cuda", torch.float64, 128, 128), "float64"),
        (Traits("cuda", float16, 80, 128), "80"),
        (Traits("cuda", float16, 128, 96), "96"),
    ],
)
def test_verify_names_what_it_cannot_run(traits, value):
    answer = TRITON.verify(traits)
    assert not answer.ok
    assert value in answer.reason


def test_verify_accepts_a_cpu_only_when_interpreting(monkeypatch):
    assert TRITON.verify(Traits("cuda", float16, 96, 128)).ok
    assert TRITON.verify(Traits("cpu", float16, 96, 128)).ok
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert not TRITON.verify(Traits("cpu", float16, 96, 128)).ok
    assert TRITON.verify(Traits("cuda", float16, 96, 128)).ok
