"""Details of the GPU benchmark on CPU: memory, rounding, other tiles, rivals."""

from functools import partial
from unittest import mock

import pytest
import torch

from benchmarks.gpu import attention, comparisons, details, rivals
from benchmarks.gpu.accuracy import rounding_errors
from benchmarks.gpu.memory import Peak, above_dense, peak_of
from benchmarks.gpu.plan_trials import mixed_shapes
from benchmarks.gpu.rivals import Prepared, Rival
from benchmarks.gpu.sizes import SMOKE_SIZES, call_of, video_tensors
from benchmarks.gpu.stage import SkippedError
from benchmarks.gpu.tables import tables
from veda_compile.kernels.reference import ReferenceExecutor
from veda_compile.kernels.selection import select_tiles

SIZE = SMOKE_SIZES[0]
SDPA = {"sdpa": lambda: torch.nn.functional.scaled_dot_product_attention}


@pytest.fixture
def no_flex():
    """Dense attention by SDPA alone: FlexAttention takes a while to compile."""
    with mock.patch.object(attention, "baselines", lambda device: SDPA):
        yield


def jobs_of(stage, setting) -> dict[str, object]:
    return {job.case.removeprefix(f"{SIZE.name}, "): job for job in stage.jobs(setting)}


def test_memory_is_what_a_second_call_needs_above_what_was_there():
    """The first call caches 5 bytes; each needs 100 more at its worst moment."""
    state = {"now": 1000, "peak": 0, "cached": 0}

    def call():
        state["cached"] = state["cached"] or 5
        state["now"] = 1000 + state["cached"]
        state["peak"] = max(state["peak"], state["now"] + 100)

    with (
        mock.patch("torch.cuda.synchronize"),
        mock.patch("torch.cuda.memory_allocated", lambda: state["now"]),
        mock.patch("torch.cuda.max_memory_allocated", lambda: state["peak"]),
        mock.patch("torch.cuda.reset_peak_memory_stats", partial(state.update, peak=0)),
    ):
        sparse = peak_of(call)
    assert sparse == Peak(peak=105, kept=5)
    assert above_dense(sparse, Peak(100, 0), 1000) == pytest.approx(0.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_dense_attention_on_the_kept_tokens(dtype):
    call = call_of(SIZE, video_tensors(SIZE, dtype, "cpu", 0), 0.3)
    selection = select_tiles(call)
    out, _ = ReferenceExecutor().attend(call, selection)
    sdpa = {"sdpa": torch.nn.functional.scaled_dot_product_attention}
    found = rounding_errors(call, selection, out, sdpa)
    limit = 1e-6 if dtype == torch.float32 else 4e-3
    assert 0.0 < found["ours"] < limit and 0.0 < found["sdpa"] < limit
    dense = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v)
    assert rounding_errors(call, selection, dense, sdpa)["ours"] > 0.02  # of other keys

    def refuses(*tensors):
        raise RuntimeError("not so short")

    assert set(rounding_errors(call, selection, out, {"short": refuses})) == {"ours"}


def test_the_details_are_measured(setting, no_flex):
    jobs = jobs_of(details, setting)
    record = jobs["density 0.1: rounding"].run()
    assert record["rounding_baseline"] == "sdpa"
    ratio = record["rounding"]["ours"] / record["rounding"]["sdpa"]
    assert record["rounding_ratio"] == pytest.approx(ratio, abs=1e-4)
    with pytest.raises(SkippedError, match="GPU"):
        jobs["density 0.1: memory"].run()
    mixed = jobs["density 0.05: eight tile shapes"].run()
    assert mixed["shapes"] == SIZE.heads and mixed["errors"]["exact"] < 1e-5
    setting.results.add("details", "a", "ok", record)
    setting.results.add("details", "b", "ok", mixed)
    titles = [table.title for table in tables("details", setting.results.records)]
    assert len(titles) == 2 and titles[1].startswith("Rounding")


@pytest.mark.parametrize("tile_size", [64, 128])
def test_mixed_shapes_are_eight_of_one_size(tile_size):
    shapes = mixed_shapes(40, tile_size)
    assert len(set(shapes)) == 8
    assert {a * b * c for a, b, c in shapes} == {tile_size}


def test_rivals_meet_our_kernel_on_the_same_lists(setting, no_flex):
    asked = []

    def prepare(call, selection):
        asked.append((call, selection))
        out, _ = ReferenceExecutor().attend(call, selection)
        return Prepared(lambda: out, lambda x: x, 0.5)

    fine = Rival("fine", "torch", 64, prepare)
    lacking = Rival("lacking", "torch", None, mock.Mock(side_effect=ImportError("no cutlass")))
    meeting = comparisons.Comparison(setting, SIZE, 0.1)
    with mock.patch.object(Rival, "require"):
        record = meeting.rival(fine)
        with pytest.raises(SkippedError, match="no cutlass"):
            meeting.rival(lacking)
    ((call, selection),) = asked
    assert call.plan.tile_size == 64 and torch.equal(selection.counts, select_tiles(call).counts)
    assert record["ours_faster"] == pytest.approx(
        record["kernel"]["median"] / record["ours"]["median"], rel=0.02, abs=0.01
    )
    setting.results.add("rivals", "a", "ok", record)
    (table,) = tables("rivals", setting.results.records)
    assert table.rows[0][3] == "fine"


def test_flashinfer_is_not_asked_for_more_than_it_can_plan():
    call = call_of(SIZE, video_tensors(SIZE, torch.float32, "cpu", 0), 0.3)
    with (
        mock.patch.dict("sys.modules", flashinfer=mock.Mock()),
        mock.patch.object(rivals, "_FLASHINFER_ROWS", 10),
        pytest.raises(SkippedError, match="rows of tiles"),
    ):
        rivals.RIVALS["flashinfer"].prepare(call, select_tiles(call))
