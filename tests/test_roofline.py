"""The estimate of a call's time and memory: it rests on what the executor really launches."""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu.roofline import estimate, table
from benchmarks.gpu.sizes import SIZES, SMOKE_SIZES, Size
from veda_compile.kernels.call import AttentionCall
from veda_compile.kernels.plan import Plan, least_padding_shape
from veda_compile.kernels.triton import select
from veda_compile.kernels.triton.configs import WORKSPACE_BYTES
from veda_compile.kernels.triton.executor import TritonExecutor

LARGEST = Size("245,760 tokens", (60, 64, 64), 32)
KERNELS = ("pool", "project", "score", "choose", "score_and_choose")


def launched(size: Size, tile_size: int, monkeypatch) -> tuple[int, int]:
    """Launches and bytes of workspace of the executor, on a device without memory."""
    shape = least_padding_shape(size.layout, tile_size)
    tensors = (
        torch.empty(
            size.batch, size.heads, size.tokens, size.head_dim, dtype=torch.bfloat16, device="meta"
        )
        for _ in range(3)
    )
    call = AttentionCall(*tensors, size.layout, Plan.uniform(size.heads, shape, 0.1), 1.0)
    kernels = mock.Mock()
    for name in KERNELS:
        monkeypatch.setattr(select, name, getattr(kernels, name))
    TritonExecutor().select(call)
    workspaces = {
        id(x): x.nbytes
        for _, arguments, _ in kernels.mock_calls
        for x in arguments
        if isinstance(x, torch.Tensor) and x.dtype == torch.float32
    }
    return len(kernels.mock_calls), sum(workspaces.values())


@pytest.mark.parametrize("tile_size", [64, 128])
@pytest.mark.parametrize("size", [*SMOKE_SIZES, *SIZES], ids=lambda size: size.name)
def test_launches_and_workspace_are_the_executors(monkeypatch, size, tile_size):
    found = estimate(size, 0.1, tile_size).steps
    assert (found.launches, found.workspace_bytes) == launched(size, tile_size, monkeypatch)
    assert found.workspace_bytes <= WORKSPACE_BYTES


def test_scores_are_made_some_rows_at_a_time_where_not_even_one_head_fits():
    found = estimate(Size("a million tokens", (64, 128, 128), 1), 0.1, 128)
    assert 32 <= found.steps.rows < found.steps.tiles
    assert found.steps.workspace_bytes <= WORKSPACE_BYTES


@pytest.mark.parametrize(("density", "share"), [(0.1, 0.1), (0.05, 0.2)])
@pytest.mark.parametrize("size", [size for size in SIZES if size.tokens >= 32_760], ids=str)
def test_what_is_promised_is_possible(size, density, share):
    found = estimate(size, density)
    assert found.share <= share
    assert found.memory <= found.allowed


def test_the_table_has_a_row_for_each_case():
    lines = table()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 2 * (len(SIZES) + 1)
