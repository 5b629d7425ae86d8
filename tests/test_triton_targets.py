"""The Triton kernels of distillation targets: in the interpreter, and compiled ahead of time.

Compiled and interpreted kernels cannot share a process: `compile_all` runs in one of its own.
"""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import bfloat16, float16, float32

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from test_targets import (  # noqa: E402
    MIXED,
    assert_targets,
    make_call,
    naive_targets,
    some_valid,
)
from triton.runtime import interpreter  # noqa: E402

from veda_compile.kernels import targets as plain  # noqa: E402
from veda_compile.kernels.call import AttentionCall  # noqa: E402
from veda_compile.kernels.errors import ExecutorError, LayoutError, PlanError  # noqa: E402
from veda_compile.kernels.layout import Extra, Layout, Video  # noqa: E402
from veda_compile.kernels.plan import Plan  # noqa: E402
from veda_compile.kernels.triton import targets  # noqa: E402
from veda_compile.kernels.triton.configs import (  # noqa: E402
    HEAD_DIMS,
    TILE_SIZES,
    AttendConfig,
)

SHAPES = {64: (2, 4, 8), 128: (4, 4, 8)}
_SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN: what is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
    """One program a query tile and one step a key tile: the interpreter's time goes with both."""
    monkeypatch.setattr(targets, "_config", lambda d, size, dtype: AttendConfig(size, size, 4, 1))


def check(call, shape=None, sample=None):
    """Right for every query tile, by float64 and by the torch version."""
    shape = shape or call.plan.tile_shapes[0]
    wanted, _ = naive_targets(call, shape)
    sample = torch.arange(wanted.mass.shape[2]) if sample is None else sample
    found = targets.tile_targets(call, sample, shape=shape)
    assert_targets(found, wanted, sample, 1e-5)
    same = plain.tile_targets(call, sample, shape=shape)
    for name in ("mass", "highest", "extra"):
        value, right = getattr(found, name), getattr(same, name)
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-9, msg=name)
    return found


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", [float32, float16, bfloat16], ids=lambda d: str(d)[6:])
def test_as_launched(dtype, head_dim, size):
    layout = Layout.of(Video(2, 4, 9), Extra(5))
    check(make_call(layout, Plan.uniform(1, SHAPES[size], 0.5), head_dim=head_dim, dtype=dtype))


@pytest.mark.usefixtures("whole_tiles")
@pytest.mark.parametrize("padded", [False, True])
def test_everything_at_once(padded):
    valid = some_valid(2, MIXED) if padded else None
    shapes = ((2, 4, 8), (1, 8, 8), (2, 4, 8), (4, 4, 4))
    call = make_call(MIXED, Plan(shapes, (0.5,) * 4), batch=2, kv_heads=2, valid=valid)
    found = check(call, (2, 4, 8), torch.tensor([4, 0, 4]))
    assert found.mass.shape[1] == 2  # heads 0 and 2, of two KV heads
    if padded:  # the last batch element lost the keys of the first video
        assert (found.mass[1, ..., :4] == 0).all() and (found.highest[1, ..., :4] == 0).all()
    check(call, (4, 4, 4), torch.tensor([1], dtype=torch.int32))


@pytest.mark.usefixtures("whole_tiles")
def test_known_sums_spare_the_first_pass(monkeypatch):
    call = make_call(MIXED, Plan.uniform(2, (2, 4, 8), 0.5))
    wanted, _ = naive_targets(call, (2, 4, 8))
    lse = plain.row_lse(call).transpose(1, 2).contiguous().transpose(1, 2)  # any strides
    monkeypatch.setattr(targets, "lse_kernel", None)
    sample = torch.tensor([7, 2])
    assert_targets(targets.tile_targets(call, sample, lse), wanted, sample, 1e-5)


@pytest.mark.usefixtures("whole_tiles")
@pytest.mark.parametrize("layout", [Layout.of(Extra(9), Video(3, 5, 7)), Layout.of(Video(1, 1, 1))])
def test_extra_tokens_first_or_none(layout):
    check(make_call(layout, Plan.uniform(2, (1, 8, 16), 0.5)))


@pytest.mark.usefixtures("whole_tiles")
def test_no_valid_key_at_all():
    layout = Layout.of(Video(2, 5, 9), Extra(2))
    valid = torch.ones(2, layout.length, dtype=torch.bool)
    valid[0] = False
    found = check(make_call(layout, Plan.uniform(1, (2, 4, 8), 0.5), batch=2, valid=valid))
    assert not (found.mass[0].any() or found.highest[0].any() or found.extra[0].any())


@pytest.mark.usefixtures("whole_tiles")
def test_nan_shows_where_it_counts():
    call = make_call(Layout.of(Video(2, 5, 9)), Plan.uniform(1, (2, 4, 8), 0.5))
    call.q[0, 0, 0] = math.nan  # of tile 0
    found = targets.tile_targets(call, torch.arange(4))
    for values in (found.mass[0, 0], found.highest[0, 0]):
        assert values[0].isnan().all() and values[1:].isfinite().all()
    lse = plain.row_lse(call)
    call.k[0, 0, 8] = math.nan  # of tile 1
    found = targets.tile_targets(call, torch.arange(4))
    assert found.mass.isnan().all() and found.highest.isnan().all()
    found = targets.tile_targets(call, torch.tensor([3]), lse)
    for values in (found.mass[0, 0, 0], found.highest[0, 0, 0]):
        assert values.isnan().tolist() == [False, True, False, False]


@pytest.mark.usefixtures("whole_tiles")
def test_strides_and_scale_are_the_calls():
    layout, plan = Layout.of(Video(2, 5, 9), Extra(3)), Plan.uniform(2, (2, 4, 8), 0.5)
    q, k = (torch.full((1, 101, 3, 140), math.nan)[:, 4:97, 1:, 5:133:2] for _ in range(2))
    torch.manual_seed(0)
    q, k = (x.copy_(torch.randn(x.shape)).transpose(1, 2) for x in (q, k))
    check(AttentionCall(q, k, k, layout, plan, -0.3))


def test_what_it_refuses(monkeypatch):
    call = make_call(Layout.of(Video(2, 5, 9)), Plan.uniform(1, (2, 4, 8), 0.5))
    with pytest.raises(LayoutError, match="0 to 4"):
        targets.tile_targets(call, torch.tensor([0, 4]))
    with pytest.raises(PlanError, match="lse"):
        targets.tile_targets(call, torch.tensor([0]), torch.zeros(1, 1, 89))
    with pytest.raises(PlanError, match="no head"):
        targets.tile_targets(call, torch.tensor([0]), shape=(4, 4, 4))
    narrow = make_call(Layout.of(Video(2, 5, 9)), Plan.uniform(1, (2, 4, 8), 0.5), head_dim=80)
    with pytest.raises(ExecutorError, match="80"):
        targets.tile_targets(narrow, torch.tensor([0]))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ExecutorError, match="cpu"):
        targets.tile_targets(call, torch.tensor([0]))


def compile_all(path):
    """Compile what `tile_targets` launches, for each GPU generation, and write it down as JSON."""
    import aot_compile

    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        name = next(key for key, kernel in kernels.items() if kernel is self)
        launches.append((name, dict(zip(self.arg_names, args, strict=False)) | kwargs))

    kernels = {"lse": targets.lse_kernel, "reduce": targets.reduce_kernel}
    with (
        mock.patch.object(triton.runtime.jit.JITFunction, "run", record),
        mock.patch.object(targets, "choose_executor"),  # which refuses meta tensors
    ):
        layout = Layout.of(Video(21, 45, 80), Extra(512))
        for head_dim in HEAD_DIMS:
            for size in TILE_SIZES:
                for dtype in (bfloat16, float32):
                    q, k = (
                        torch.empty(1, layout.length, heads, head_dim, dtype=dtype, device="meta")
                        for heads in (16, 4)
                    )
                    q, k = q.transpose(1, 2), k.transpose(1, 2)
                    plan = Plan.uniform(16, SHAPES[size], 0.1)
                    call = AttentionCall(q, k, k, layout, plan, head_dim**-0.5)
                    targets.tile_targets(call, torch.arange(100))
    with mock.patch.object(aot_compile, "_KERNELS", kernels):
        jobs = [aot_compile._job(*each, capability) for each in launches for capability in
                _SHARED_MEMORY]  # fmt: skip
        with ProcessPoolExecutor(2) as workers:  # forked: they see the patch
            done = list(workers.map(aot_compile.compile_job, dict.fromkeys(jobs)))
    Path(path).write_text(json.dumps([asdict(result) for result in done]))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aot")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    result, tests = folder / "result.json", Path(__file__).parent
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import test_triton_targets; test_triton_targets.compile_all(sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tests), str(result)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(result.read_text())


def test_both_kernels_compile_for_every_generation_without_spills(compiled):
    found = {
        (item["kernel"], item["capability"], item["dtype"], *(
            item["constants"][name] for name in ("HEAD_DIM", "TILE")
        ))
        for item in compiled
    }  # fmt: skip
    assert len(found) == len(compiled) == 2 * 3 * 2 * len(HEAD_DIMS) * len(TILE_SIZES)
    assert [item for item in compiled if item["stack"] > 0] == []
    assert [item for item in compiled if item["shared"] > _SHARED_MEMORY[item["capability"]]] == []
