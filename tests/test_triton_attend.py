"""The portable forward kernel's own decisions: what is masked, and how wide its offsets are."""

from __future__ import annotations

import pytest
import torch
from torch import float16, float32

triton = pytest.importorskip("triton")

from triton_calls import REFERENCE, TRITON, make_call, poisoned_memory  # noqa: E402, F401

from veda_compile.kernels.call import Selection  # noqa: E402
from veda_compile.kernels.layout import Extra, Layout, Video  # noqa: E402
from veda_compile.kernels.plan import Plan  # noqa: E402
from veda_compile.kernels.triton import attend  # noqa: E402
from veda_compile.kernels.triton.configs import attend_config  # noqa: E402

SHAPE = (2, 4, 8)


def test_tiles_with_and_without_missing_keys_in_one_list() -> None:
    """Whole tiles are not masked, ragged ones and text between them are."""
    layout = Layout.of(Extra(3), Video(3, 5, 17))
    call = make_call(layout, Plan.uniform(2, SHAPE, 1.0))
    everything = REFERENCE.select(call)
    assert {1, 2, 64} <= {int(n) for n in _rows_of_tiles(call)}
    out, lse = TRITON.attend(call, everything)
    right, right_lse = REFERENCE.attend(call, everything)
    torch.testing.assert_close(out, right, atol=4e-6, rtol=4e-6)
    torch.testing.assert_close(lse, right_lse, atol=1e-5, rtol=1e-5)


def _rows_of_tiles(call) -> list[int]:
    from veda_compile.kernels.tiles import tile_table

    return [int(n) for n in tile_table(call.layout, SHAPE, call.q.device).sizes]


@pytest.mark.parametrize("dtype", [float32, float16], ids=str)
def test_wide_offsets_give_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    call = make_call(Layout.of(Video(2, 6, 9), Extra(5)), Plan.uniform(2, SHAPE, 0.5), 64, dtype)
    selection = REFERENCE.select(call)
    narrow = TRITON.attend(call, selection)
    monkeypatch.setattr(attend, "_is_wide", lambda x: True)
    wide = TRITON.attend(call, selection)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_a_scale_of_zero_weighs_all_kept_keys_alike() -> None:
    layout = Layout.of(Video(3, 5, 9))
    call = make_call(layout, Plan.uniform(2, SHAPE, 1.0), scale=1e-30)
    object.__setattr__(call, "scale", 0.0)
    everything: Selection = REFERENCE.select(call)
    out, _ = TRITON.attend(call, everything)
    mean = call.v.mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, mean, atol=1e-5, rtol=1e-5)


def test_wide_offsets_leave_registers_for_fewer_keys_a_step() -> None:
    narrow, wide = (attend_config(128, 128, float16, 9, each) for each in (False, True))
    assert wide.block_n < narrow.block_n
