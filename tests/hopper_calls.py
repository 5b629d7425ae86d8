"""Calls for the Hopper kernel's own source in numpy, and its results against the reference's."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from gluon_in_numpy import Launcher

from veda_compile.kernels.call import AttentionCall, Selection
from veda_compile.kernels.hopper import attend as module
from veda_compile.kernels.hopper.views import refusal
from veda_compile.kernels.layout import Context, Extra, Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.reference import ReferenceExecutor
from veda_compile.kernels.tiles import tile_table

REFERENCE = ReferenceExecutor()
TOLERANCE = 3e-3
RAGGED = Layout.of(Video(3, 6, 13))
TEXT = Layout.of(Extra(70), Video(3, 6, 13), Extra(130))
MIXED = Layout.of(Context(5), Extra(3), Video(3, 6, 13), Extra(4), Context(150))
WHOLE = Layout.of(Video(4, 8, 8))
CUBE = {64: (4, 4, 4), 128: (4, 4, 8)}
ROW = {64: (1, 4, 16), 128: (1, 8, 16)}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN: what is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def tensor(heads: int, tokens: int, head_dim: int, batch: int, by_head: bool, seed: int):
    """(B, H, N, D) normal float16, in memory of NaN: (B, N, H, D) unless `by_head`."""
    normal = torch.randn(
        batch, heads, tokens, head_dim, generator=torch.Generator().manual_seed(seed)
    )
    if by_head:
        return normal.half()
    buffer = torch.full((batch + 2, tokens + 3, heads + 1, head_dim + 16), torch.nan).half()
    view = buffer[1:-1, 2:-1, :heads, 8:-8].transpose(1, 2)
    return view.copy_(normal)


def make_call(
    layout: Layout, head_dim=64, tile=128, density=(0.5, 0.7), kv_heads=2, batch=1, by_head=False,
    shapes=None,
) -> AttentionCall:  # fmt: skip
    heads = len(density)
    q = tensor(heads, layout.query_length, head_dim, batch, by_head, 0)
    k, v = (tensor(kv_heads, layout.length, head_dim, batch, by_head, seed) for seed in (1, 2))
    plan = Plan(shapes or (CUBE[tile],) * heads, density)
    return AttentionCall(q, k, v, layout, plan, 0.15)


def assert_right(
    call: AttentionCall, selection: Selection, launcher: Launcher, stages=None
) -> None:
    configs = {k: replace(c, stages=stages or c.stages) for k, c in module.CONFIGS.items()}
    assert refusal(call) is None
    with (
        mock.patch.object(module, "attend_kernel", launcher),
        mock.patch.object(module, "CONFIGS", configs),
    ):
        out, lse = module.attend(call, selection)
    assert launcher.programs and out.transpose(1, 2).is_contiguous()
    right, right_lse = REFERENCE.attend(call, selection)
    torch.testing.assert_close(out, right, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(lse, right_lse, rtol=1e-5, atol=1e-5)


def padded(call: AttentionCall) -> AttentionCall:
    """The last batch element without some keys here and there, and without whole boxes of keys.

    These are the first box of the video, and some of what follows it. Logits of keys that do not
    count would be NaN, their values would show.
    """
    batch, _, keys, _ = call.k.shape
    valid = torch.rand(batch, keys, generator=torch.Generator().manual_seed(3)) < 0.8
    valid[:-1] = True
    valid[-1, -160:] = False
    table = tile_table(call.layout, call.plan.tile_shapes[0], torch.device("cpu"))
    valid[-1, table.rows[0][table.rows[0] >= 0].long()] = False
    hidden = ~valid[:, None, :, None]
    call.k.masked_fill_(hidden, torch.nan)
    call.v.masked_fill_(hidden, 1e4)
    return replace(call, key_valid=valid)
