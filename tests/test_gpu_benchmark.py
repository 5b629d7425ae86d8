"""The GPU benchmark on CPU: what it reports is right, and nothing that breaks loses the rest."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import typer

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import attention, break_even, check, tune
from benchmarks.gpu.exact import kept_pairs, lists_apart, sampled_error
from benchmarks.gpu.flex import FlexLists, block_map, tile_order
from benchmarks.gpu.kernel_times import steps
from benchmarks.gpu.sizes import SMOKE_SIZES, call_of, video_tensors
from benchmarks.gpu.stage import SkippedError, WrongResultError
from benchmarks.gpu.tables import tables
from benchmarks.gpu.timing import Stopwatch
from veda_compile.kernels.call import AttentionCall, Selection
from veda_compile.kernels.errors import ExecutorError
from veda_compile.kernels.reference import ReferenceExecutor
from veda_compile.kernels.selection import select_tiles
from veda_compile.kernels.tiles import tile_table

ROOT = Path(__file__).resolve().parent.parent
SIZE = SMOKE_SIZES[0]


@pytest.fixture(scope="module")
def call():
    return call_of(SIZE, video_tensors(SIZE, torch.float32, "cpu", 0), 0.3)


def seen_pairs(call: AttentionCall, selection: Selection) -> torch.Tensor:
    """(B, H, Nq, Nk) bool, from the tile of every token, by loops."""
    heads, tokens = call.q.shape[1], call.layout.length
    seen = torch.zeros(1, heads, tokens, tokens, dtype=torch.bool)
    for head in range(heads):
        tile = tile_table(call.layout, call.plan.tile_shapes[head], call.q.device).tile_of_token
        for query in range(tokens):
            row = int(tile[query])
            if row < 0:
                seen[0, head, query] = True
                continue
            kept = selection.indices[0, head, row, : selection.counts[0, head, row]]
            seen[0, head, query] = torch.isin(tile, kept) | (tile < 0)
    return seen


def test_the_whole_command(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--smoke"]
    command += ["--only", "check", "--out", tmp_path, "--commit", "abc1234"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    trials = len(list(check.smoke_trials()))
    assert told["stages"] == {"check": {"ok": trials}}
    (file,) = tmp_path.glob("*abc1234.json")
    assert told["results"] == str(file)
    records = json.loads(file.read_text())["records"]
    assert len(records) == trials
    for record in records:
        assert record["machine"]["commit"] == "abc1234" and record["date"]
        assert record["requested"] == "auto"
    assert "Kernels against the reference" in done.stdout


def test_break_even_compares_with_the_best_dense_attention(setting):
    for job in break_even.jobs(setting):
        record = setting.results.add("break_even", job.case, "ok", job.run())
        times = {name: timing["median"] for name, timing in record["times"].items()}
        assert record["speedup"] == pytest.approx(times[record["best"]] / times["sparse"], rel=0.01)
        assert record["errors"]["exact"] < 1e-5
    (table,) = tables("break_even", setting.results.records)
    assert len(table.rows) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"only": ["al"], "device": "cpu", "smoke": True}, "check, attention"),
        ({"device": "cpu", "smoke": False}, "--smoke"),
        ({"device": "cuda"}, "no CUDA device"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, says, tmp_path):
    with (
        mock.patch("torch.cuda.is_available", lambda: False),
        pytest.raises(typer.BadParameter, match=says),
    ):
        program.main(**{"only": None, "minutes": 1.0, "out": tmp_path} | arguments)
    assert not list(tmp_path.iterdir())


def test_a_layer_is_checked_and_timed(setting):
    layer = attention.Layer(setting, SIZE)
    sdpa = {"sdpa": lambda: torch.nn.functional.scaled_dot_product_attention}
    with mock.patch.object(attention, "baselines", lambda device: sdpa):
        dense = setting.results.add("attention", "dense", "ok", layer.dense())
        assert dense["best"] == "sdpa" and dense["baselines"]["sdpa"]["error"] < 1e-5
        for density in (0.3, 1.0):
            record = setting.results.add("attention", f"{density}", "ok", layer.sparse(density))
            assert record["errors"]["exact"] < 1e-5
            assert record["speedup_layer"] == pytest.approx(
                record["dense_layer"]["median"] / record["layer"]["median"], rel=0.01
            )
    assert record["kept"] == 1.0 and record["difference_to_dense"] < 1e-5
    titles = [table.title for table in tables("attention", list(setting.results.of("attention")))]
    assert titles == ["Dense attention", "Sparse attention against the best dense one"]


def test_a_failed_check_rules_its_kernels_out(setting):
    config = check.config_name(SIZE.head_dim, 64, torch.float32)
    setting.results.add("check", f"ragged, {config}", "failed", {"error": "wrong"})
    with pytest.raises(SkippedError, match="ragged"):
        attention.Layer(setting, SIZE).sparse(0.3)


class Broken(ReferenceExecutor):
    """Right but for one row of the output, or one list."""

    def __init__(self, part: str) -> None:
        self.part = part

    def attend(self, call, selection):
        out, lse = super().attend(call, selection)
        if self.part == "out":
            out[0, -1, -1] += 0.5
        elif self.part == "nan":
            out[0, 0, 0] = torch.nan
        return out, lse

    def select(self, call):
        found = super().select(call)
        if self.part == "counts":
            found.counts[0, 0, 0] += 1
        elif self.part == "lists":
            found.indices.copy_(found.indices.flip(-1))
        return found


@pytest.mark.parametrize("part", ["out", "nan", "counts", "lists", ""])
def test_check_finds_what_is_wrong(setting, part):
    (trial,) = (trial for trial in check.smoke_trials() if trial.name == "GQA")
    with mock.patch.object(check, "choose_executor", lambda *_: Broken(part)):
        if part:
            with pytest.raises(WrongResultError):
                check.check(setting, trial)
        else:
            assert check.check(setting, trial)["error"] == 0.0


def test_the_full_check_covers_every_choice_of_kernels():
    configs = {trial.config for trial in check.trials()}
    for head_dim, size, dtype in itertools.product(
        (64, 96, 128), (64, 128), ("float32", "bfloat16")
    ):
        assert f"head_dim {head_dim}, tile {size}, {dtype}" in configs
    assert len({(trial.name, trial.config) for trial in check.trials()}) == len(
        list(check.trials())
    )


@pytest.mark.parametrize("name", ["GQA", "unequal and empty rows"])
def test_check_runs_the_triton_kernels(setting, name):
    (trial,) = (trial for trial in check.smoke_trials() if trial.name == name)
    found = check.check(replace(setting, executor="triton"), trial)
    assert 0.0 < found["error"] < 4e-3


@pytest.mark.parametrize("name", ["GQA", "stored by head"])
def test_what_a_partial_executor_refuses_is_skipped(setting, name):
    (trial,) = (trial for trial in check.smoke_trials() if trial.name == name)
    with pytest.raises(SkippedError, match="'hopper' cannot run here: device cpu"):
        check.check(replace(setting, executor="hopper"), trial)
    with pytest.raises(ExecutorError, match="'triton' cannot run here"):
        check.check(replace(setting, executor="triton"), replace(trial, head_dim=32))


def test_two_executors_are_timed_on_the_same_lists(setting):
    layer = attention.Layer(setting, SIZE)
    with pytest.raises(SkippedError, match="'hopper' cannot run here"):
        layer.beside("hopper", "triton", 0.3)
    record = layer.beside("cpu", "reference", 0.3)
    assert record["speedup"] == pytest.approx(
        record["reference"]["median"] / record["cpu"]["median"], rel=0.01
    )
    assert max(record["errors"].values()) < 1e-5


def test_tuning_launches_what_it_says(setting):
    shipped, other = list(tune.jobs(replace(setting, executor="triton")))
    first, second = shipped.run(), other.run()
    assert first["shipped"] and not second["shipped"]
    assert second["config"]["block_n"] == 32 != first["config"]["block_n"]
    with pytest.raises(SkippedError, match="triton executor"):
        next(tune.jobs(setting)).run()


def test_sampled_rows_are_exact(call):
    selection = select_tiles(call)
    out, _ = ReferenceExecutor().attend(call, selection)
    assert sampled_error(call, selection, out) < 1e-5
    assert lists_apart(call, selection) == 0.0
    dense = torch.nn.functional.scaled_dot_product_attention(call.q, call.k, call.v)
    assert sampled_error(call, None, dense) < 1e-5
    with pytest.raises(WrongResultError, match="off by"):
        sampled_error(call, selection, dense)
    with pytest.raises(WrongResultError):
        sampled_error(call, selection, torch.full_like(out, torch.nan))


def test_kept_pairs_are_counted_one_by_one(call):
    selection = select_tiles(call)
    assert kept_pairs(call, selection) == int(seen_pairs(call, selection).sum())


def test_flex_gets_the_same_pairs(call):
    selection = select_tiles(call)
    order = tile_order(call)
    assert torch.equal(order.restore(order.sort(call.q)), call.q)
    lists = FlexLists(order, call.plan.tile_size, {})
    mask = lists.mask(block_map(call, selection, order))
    size = call.plan.tile_size
    tiles = mask.to_dense().bool().repeat_interleave(size, 2).repeat_interleave(size, 3)
    pairs = tiles & order.real
    places = order.places
    assert torch.equal(pairs[:, :, places][:, :, :, places], seen_pairs(call, selection))
    whole = order.sizes == size
    listed = torch.arange(len(whole)) < mask.full_kv_num_blocks[..., None]
    assert whole[mask.full_kv_indices[listed].long()].all()  # there no padding is masked


def test_alternatives_take_turns():
    turns = []
    found = Stopwatch("cpu").measure([partial(turns.append, x) for x in "ab"], 0.0, least=4)
    assert turns == list("ab") * 5  # the first round is thrown away
    for timing in found:
        assert timing.runs == 4
        assert timing.min <= timing.p25 <= timing.median <= timing.p75


def test_events_time_the_device_and_the_clock_times_the_host():
    order = []

    class Event:
        def __init__(self, enable_timing):
            self.record = lambda: order.append("event")
            self.synchronize = lambda: None

        def elapsed_time(self, other):
            return 3.0

    watch = Stopwatch("cpu")
    watch._cuda = True
    watch._flush = mock.Mock(zero_=lambda: order.append("flush"))
    with mock.patch("torch.cuda.Event", Event):
        (timing,) = watch.measure([lambda: order.append("run")], 0.0, least=2)
    assert (timing.median, timing.runs) == (3.0, 2) and timing.host < 3.0
    assert order == (["flush"] * 8 + ["event", "run", "event"]) * 3


def test_kernels_are_counted_to_their_step():
    kernels = {"attend_kernel": 5.0, "choose_kernel": 1.0, "pool_kernel": 0.5, "gemm": 0.25}
    assert steps(kernels) == {"statistics and scores": 0.75, "selection": 1.0, "attend": 5.0}
