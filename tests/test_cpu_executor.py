"""The CPU executor: compiled kernels and the plain-torch path against the reference."""

from __future__ import annotations

import logging
import math
import os
import platform
import subprocess
import sys
from functools import partial

import pytest
import torch
from same_lists import assert_lists, unlisted

from veda_compile.kernels import cpu, cpu_build, cpu_native, cpu_select
from veda_compile.kernels.call import AttentionCall, Selection
from veda_compile.kernels.cpu import CpuExecutor
from veda_compile.kernels.cpu_gather import gather_attend
from veda_compile.kernels.cpu_native import native_attend
from veda_compile.kernels.cpu_select import native_select, native_statistics
from veda_compile.kernels.executors import Traits, choose_executor
from veda_compile.kernels.layout import Context, Extra, Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.reference import ReferenceExecutor
from veda_compile.kernels.selection import kept_map, select_tiles
from veda_compile.kernels.statistics import tile_statistics
from veda_compile.kernels.tiles import tile_table

LAYOUT = Layout.of(Extra(5), Video(3, 5, 7), Context(3), Video(2, 6, 6), Extra(9), Context(2))
PLAN = Plan(((1, 4, 4), (2, 2, 4), (4, 2, 2), (16, 1, 1)), (0.2, 0.35, 1.0, 0.1))
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
PATHS = pytest.mark.parametrize("attend", [native_attend, gather_attend], ids=["native", "gather"])
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d)[6:])


def rows(
    heads: int, head_dim: int, dtype: torch.dtype, tokens: int, seed: int, strides: str = "plain"
) -> torch.Tensor:
    """(2, heads, tokens, head_dim) random values, stored in one of several orders."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, heads, tokens, head_dim, generator=generator).to(dtype)
    if strides == "token_major":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "every_other_column":
        wide = torch.full((2, heads, tokens, 2 * head_dim), torch.nan, dtype=dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def a_call(
    dtype: torch.dtype = torch.float32,
    head_dim: int = 32,
    strides: str = "plain",
    layout: Layout = LAYOUT,
    plan: Plan = PLAN,
    padded: bool = False,
) -> AttentionCall:
    """Four query heads on two KV heads. padded: NaN in the keys that are not valid."""
    n = layout.length
    q = rows(plan.heads, head_dim, dtype, layout.query_length, 0, strides)
    k, v = (rows(plan.heads // 2, head_dim, dtype, n, seed, strides) for seed in (1, 2))
    valid = None
    if padded:
        valid = torch.rand(2, n, generator=torch.Generator().manual_seed(3)) > 0.3
        valid[1, :60] = False  # whole tiles without a valid key
        for x in (k, v):
            x[~valid[:, None, :].expand(x.shape[:3])] = torch.nan
    return AttentionCall(q, k, v, layout, plan, 1 / math.sqrt(head_dim), valid)


def assert_right(call: AttentionCall, attend, selection: Selection | None = None) -> None:
    selection = select_tiles(call) if selection is None else selection
    out, lse = attend(call, selection)
    right, right_lse = ReferenceExecutor().attend(call, selection)
    assert out.dtype == call.q.dtype and out.stride() == right.stride()
    assert lse.dtype == torch.float32
    tolerance = TOLERANCE[call.q.dtype]
    torch.testing.assert_close(out.float(), right.float(), rtol=tolerance, atol=tolerance)
    # torch's dense kernel takes its log-sum-exp from fast half-precision exponentials
    exact = call.q.dtype == torch.float32 or attend is native_attend
    torch.testing.assert_close(lse, right_lse, rtol=0, atol=2e-5 if exact else 1e-3)


@PATHS
@DTYPES
@pytest.mark.parametrize("head_dim", [64, 20, 7])
@pytest.mark.parametrize("padded", [False, True], ids=["all_valid", "padded"])
def test_attends_as_the_reference(attend, dtype, head_dim, padded):
    assert_right(a_call(dtype, head_dim, padded=padded), attend)


@PATHS
@DTYPES
@pytest.mark.parametrize("strides", ["token_major", "every_other_column"])
def test_reads_any_strides(attend, dtype, strides):
    assert_right(a_call(dtype, strides=strides), attend)


@PATHS
def test_long_lists_take_several_steps(attend):
    # 1,456 keys for extra queries: many chunks, and a last one that is not full
    layout = Layout.of(Video(9, 11, 14), Extra(70))
    assert_right(a_call(layout=layout, plan=Plan.uniform(2, (3, 4, 5), 0.4)), attend)


@PATHS
def test_large_logits_neither_overflow_nor_lose_the_maximum(attend):
    call = a_call()
    large = AttentionCall(call.q * 30, call.k, call.v, call.layout, call.plan, call.scale)
    out, _ = attend(large, select_tiles(large))
    right, _ = ReferenceExecutor().attend(large, select_tiles(large))
    torch.testing.assert_close(out, right, rtol=1e-3, atol=1e-3)


@PATHS
@DTYPES
def test_a_tile_that_keeps_nothing_gives_zero(attend, dtype):
    layout = Layout.of(Video(4, 4, 8))
    call = a_call(dtype, layout=layout, plan=Plan.uniform(2, (2, 4, 4), 0.5))
    selection = select_tiles(call)
    counts = selection.counts.clone()
    counts[0, 1, 2] = 0
    out, lse = attend(call, Selection(selection.indices, counts))
    tokens = tile_table(layout, (2, 4, 4), torch.device("cpu")).rows[2].long()
    assert torch.all(out[0, 1, tokens] == 0)
    assert torch.all(lse[0, 1, tokens] == -torch.inf)
    assert_right(call, attend, Selection(selection.indices, counts))


@PATHS
def test_no_valid_key_at_all(attend):
    call = a_call(padded=True)
    assert call.key_valid is not None
    call.key_valid[0] = False
    assert_right(call, attend)


@PATHS
def test_rows_that_keep_everything_need_no_list(attend):
    call = a_call()
    selection = unlisted(select_tiles(call), call)
    assert selection.indices.shape[-1] < selection.counts.max()
    assert (selection.indices == 2**31 - 1).any(-1)[:, :2].any(), "no list is shorter than others"
    assert_right(call, attend, selection)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nothing_is_written_but_the_results(dtype, monkeypatch):
    call = a_call(dtype, head_dim=20)
    guard = 512
    stores: list[torch.Tensor] = []

    def guarded(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        size = math.prod(shape)
        store = torch.full((size + 2 * guard,), 7.0, dtype=dtype)
        stores.append(store)
        return store[guard : guard + size].view(shape)

    def guarded_output(q: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, head_dim = q.shape
        return guarded(batch, tokens, heads, head_dim, dtype=q.dtype).transpose(1, 2)

    monkeypatch.setattr(cpu_native, "empty_output", guarded_output)
    before = [x.clone() for x in (call.q, call.k, call.v)]
    assert_right(call, native_attend)
    assert stores
    for store in stores:
        assert torch.all(store[:guard] == 7.0) and torch.all(store[-guard:] == 7.0)
    for x, old in zip((call.q, call.k, call.v), before, strict=True):
        assert torch.equal(x, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_in_a_valid_key_shows_wherever_it_is_attended_to(dtype, name):
    call, token = a_call(dtype, head_dim=16), 40
    selection = select_tiles(call)
    getattr(call, name)[0, 0, token] = torch.nan
    out, _ = native_attend(call, selection)
    table = tile_table(call.layout, call.plan.tile_shapes[0], call.q.device)
    keeps = kept_map(selection, [0], table.tiles)[0, 0, :, table.tile_of_token[token]]
    tile = table.tile_of_query.long()
    attends = (tile < 0) | keeps[tile.clamp(min=0)]
    assert attends.any() and not attends.all()
    assert torch.equal(out[0, 0].isnan(), attends[:, None].expand_as(out[0, 0]))


@DTYPES
@pytest.mark.parametrize("padded", [False, True], ids=["all_valid", "padded"])
@pytest.mark.parametrize("score", ["closed_form", "mean", "projection"])
def test_selects_as_the_reference(dtype, padded, score):
    projection = None
    if score == "projection":
        projection = 0.1 * torch.randn(2, 4, 96, 32, generator=torch.Generator().manual_seed(5))
    plan = Plan(PLAN.tile_shapes, PLAN.density, score, projection)
    call = a_call(dtype, plan=plan, padded=padded)
    found, right = native_select(call), select_tiles(call)
    assert torch.equal(found.counts, right.counts)
    assert_lists(call, found, right)


def test_equal_scores_go_to_the_lower_tile_number():
    layout = Layout.of(Video(4, 8, 8))
    zeros = torch.zeros(1, 2, layout.length, 8)
    call = AttentionCall(zeros, zeros, zeros, layout, Plan.uniform(2, (2, 2, 2), 0.2), 1.0)
    found, right = native_select(call), select_tiles(call)
    assert torch.equal(kept_map(found, [0, 1], 32), kept_map(right, [0, 1], 32))


@DTYPES
@pytest.mark.parametrize("strides", ["plain", "every_other_column"])
def test_statistics(dtype, strides):
    call = a_call(dtype, strides=strides, padded=True)
    table = tile_table(call.layout, (2, 2, 4), call.q.device)
    found = native_statistics(call.k, [1, 0], table.rows, call.key_valid, extremes=True)
    right = tile_statistics(call.k[:, [1, 0]], table.rows, call.key_valid, extremes=True)
    for name in ("count", "mean", "second", "variance", "highest", "lowest"):
        torch.testing.assert_close(getattr(found, name), getattr(right, name), msg=name)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
def test_avx2(monkeypatch):
    load = partial(cpu_build.load_library, "x86-64-v3")
    monkeypatch.setattr(cpu_native, "load_library", load)
    monkeypatch.setattr(cpu_select, "load_library", load)
    for dtype in TOLERANCE:
        call = a_call(dtype, head_dim=20, padded=True)
        assert_right(call, native_attend)
        assert torch.equal(native_select(call).counts, select_tiles(call).counts)


def test_verify():
    executor = CpuExecutor()
    assert executor.verify(Traits("cpu", torch.bfloat16, 7, 60)).ok
    assert "cuda" in executor.verify(Traits("cuda", torch.float32, 64, 64)).reason
    assert "float64" in executor.verify(Traits("cpu", torch.float64, 64, 64)).reason
    assert choose_executor("auto", Traits("cpu", torch.float32, 64, 64)).name == "cpu"


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    caches = (cpu_build.load_library, cpu.has_native_kernels)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_without_a_compiler_it_works_and_says_so_once(no_compiler, caplog):
    call, executor = a_call(), CpuExecutor()
    with caplog.at_level(logging.WARNING):
        assert_right(call, executor.attend, executor.select(call))
        executor.attend(call, executor.select(call))
    (record,) = caplog.records
    assert "no-such-compiler" in record.message and "g++" in record.message


def test_a_compiler_that_fails_is_reported(monkeypatch, tmp_path):
    broken = tmp_path / "broken-cxx"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(cpu_build.BuildError, match="out of order"):
        cpu_build.load_library.__wrapped__()


def test_works_in_threads_and_after_a_fork():
    code = """
import os, sys, threading, torch
sys.path.insert(0, sys.argv[1])
from test_cpu_executor import a_call
from veda_compile.kernels.cpu import CpuExecutor
call, executor = a_call(), CpuExecutor()
right, _ = executor.attend(call, executor.select(call))
found = []
def work():
    found.append(executor.attend(call, executor.select(call))[0])
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 4 and all(torch.equal(out, right) for out in found)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as torch's data loader does in its workers
    out, _ = executor.attend(call, executor.select(call))
    os._exit(0 if torch.equal(out, right) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-c", code, os.path.dirname(__file__)]
    subprocess.run(command, check=True, timeout=120)
