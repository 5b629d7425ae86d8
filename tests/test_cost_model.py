"""Sparse or dense by predicted times: what the model promises, what the backend makes of it."""

from __future__ import annotations

import itertools
import runpy
from dataclasses import replace
from unittest import mock

import pytest
import torch
from toys import latents, toy

import veda_compile
from benchmarks import cost_fit
from benchmarks.cost_fit import Timed, costs, fitted
from veda_compile.kernels import cost_model
from veda_compile.kernels.cost_model import Work, forecast, from_table, work_of
from veda_compile.kernels.cost_tables import PLAIN_CPU, TABLES, CostTable
from veda_compile.kernels.layout import Extra, Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.static_modes import StaticMode
from veda_compile.options import DEFAULT_DENSITY, tile_size_for
from veda_compile.report import SiteRecord
from veda_compile.sidecar import LayerCard, Sidecar

LONG = (8, 16, 16)
SIMPLE = CostTable((1.0, 0.0, 1.0), (10.0, 1.0, 3.0, 2.0, 0.0, 1.0), 1.2, True, 0, "made up")


def work(tokens: int, kept: float = DEFAULT_DENSITY, heads: int = 12, head_dim: int = 128) -> Work:
    tiles = -(-tokens // tile_size_for(tokens))
    return Work(heads, head_dim, tokens, tokens, tokens, tiles, kept)


@pytest.mark.parametrize("name", sorted(TABLES))
@pytest.mark.parametrize("kept", [0.05, 0.2, 0.5])
def test_gains_grow_with_the_length(name: str, kept: float) -> None:
    lengths = [64 * 2**i for i in range(14)]
    found = [from_table(TABLES[name], work(tokens, kept)) for tokens in lengths]
    gains = [expected.gain for expected in found]
    # one step is where tiles become larger, and their pairs fewer
    assert all(after >= before * 0.999 for before, after in itertools.pairwise(gains))
    worth = [expected.worth for expected in found]
    assert worth == sorted(worth) and not worth[0] and worth[-1]


@pytest.mark.parametrize("name", sorted(TABLES))
def test_gains_shrink_with_the_density(name: str) -> None:
    found = [from_table(TABLES[name], work(16_384, kept)) for kept in (0.05, 0.1, 0.3, 0.6, 1.0)]
    gains = [expected.gain for expected in found]
    assert gains == sorted(gains, reverse=True)
    assert found[0].worth


@pytest.mark.parametrize("name", sorted(TABLES))
@pytest.mark.parametrize("tokens", [512, 2048, 16_384, 75_600])
def test_the_largest_share_worth_keeping(name: str, tokens: int) -> None:
    most = from_table(TABLES[name], work(tokens)).most_kept
    if most > 0.0:
        assert from_table(TABLES[name], work(tokens, most * 0.999)).worth
    if most < 1.0:
        assert not from_table(TABLES[name], work(tokens, most + 0.001)).worth


def test_what_is_not_measured_keeps_to_8192_tokens() -> None:
    for heads, head_dim in ((1, 64), (24, 128), (80, 96)):
        sizes = {"heads": heads, "head_dim": head_dim}
        for tokens, worth in ((8192, True), (8191, False), (75_600, True)):
            found = forecast(work(tokens, **sizes), "cuda", torch.bfloat16, "triton")
            assert found is not None and found.worth is worth and not found.measured
        short = forecast(work(4096, 0.01, **sizes), "cuda", torch.bfloat16, "triton")
        full = forecast(work(75_600, 1.0, **sizes), "cuda", torch.bfloat16, "triton")
        assert short is not None and full is not None and not short.worth and not full.worth


def test_text_beside_the_video_and_padding_count() -> None:
    layout = Layout.of(Video(8, 16, 16), Extra(512))
    plan = Plan.uniform(2, (4, 4, 4), 0.25)
    found = work_of(plan, layout, 3, 64)
    assert found == Work(6, 64, 2560, 2560, 2048, 32.0, 0.25)
    video, text = 2048, 512
    assert found.kept_pairs == 6 * (0.25 * video**2 + video * text + text * 2560)
    padded = work_of(Plan.uniform(2, (5, 5, 5), 0.25), layout, 3, 64)
    assert padded.tiles > -(-video // 125)
    modes = (None, StaticMode("full"))
    mixed = work_of(replace(plan, modes=modes), layout, 3, 64)
    assert mixed.kept == pytest.approx((0.25 + 1.0) / 2)


def test_other_executors_are_not_foretold() -> None:
    call = work(16_384)
    assert forecast(call, "cpu", torch.float32, "reference") is None
    assert forecast(call, "cpu", torch.float32, "triton") is None
    assert forecast(call, "cuda", torch.float32, "reference") is None
    assert forecast(call, "cpu", torch.float64, "cpu") is None


def test_a_table_of_the_gpu_at_hand_wins_over_the_guess() -> None:
    with (
        mock.patch.dict(TABLES, {"cuda 9 bfloat16": SIMPLE}),
        mock.patch("torch.cuda.is_available", lambda: True),
        mock.patch("torch.cuda.get_device_capability", lambda: (9, 0)),
    ):
        found = forecast(work(1024), "cuda", torch.bfloat16, "triton")
        other = forecast(work(1024), "cuda", torch.float16, "triton")
    assert found is not None and found.measured and found.worth
    assert other is not None and not other.measured


def test_without_a_compiler_sparse_takes_longer() -> None:
    table = TABLES["cpu float32"]
    native = from_table(table, work(16_384))
    with mock.patch.object(cost_model, "has_native_kernels", lambda: False):
        plain = forecast(work(16_384), "cpu", torch.float32, "cpu")
    assert plain is not None
    assert plain.sparse == pytest.approx(PLAIN_CPU * native.sparse)
    assert plain.most_kept < native.most_kept or native.most_kept == 1.0


@pytest.mark.parametrize("name", sorted(name for name in TABLES if name.startswith("cpu")))
def test_more_threads_ask_for_longer_videos(name: str) -> None:
    lengths = [64 * n for n in range(1, 300)]

    def least(threads: int) -> int:
        with mock.patch("torch.get_num_threads", lambda: threads):
            dtype = getattr(torch, name.split()[1])
            found = ((n, forecast(work(n), "cpu", dtype, "cpu")) for n in lengths)
            return next(n for n, expected in found if expected is not None and expected.worth)

    assert least(1) < least(8) < least(64)


def test_costs_are_found_again_and_none_is_negative() -> None:
    calls = [work(64 * n, 0.05 * n, n % 3 + 1, 32 * (n % 4 + 1)) for n in range(1, 19)]
    measured = []
    for call in calls:
        found = from_table(SIMPLE, call)
        measured.append(Timed("", call, found.dense, found.sparse, found.gain))
    table = fitted(measured, "here")
    assert table.dense == pytest.approx(SIMPLE.dense, rel=1e-3, abs=1e-6)
    assert table.sparse == pytest.approx(SIMPLE.sparse, rel=1e-3, abs=1e-3)
    assert table.factor == 1.15 and table.measured and table.about == "here"
    assert all(cost >= 0.0 for cost in costs([(1.0, 1.0), (1.0, 2.0), (1.0, 4.0)], [3.0, 2.0, 1.0]))
    slower = [replace(found, gain=found.gain / 1.4) for found in measured]
    assert fitted(slower, "").factor == pytest.approx(1.4, abs=0.01)


def test_written_tables_are_read_again(tmp_path) -> None:
    file = tmp_path / "cost_tables.py"
    file.write_text(cost_fit._FILE.read_text())
    with mock.patch.object(cost_fit, "_FILE", file):
        cost_fit.write_tables({"cuda 9 bfloat16": SIMPLE})
    found = runpy.run_path(str(file))
    assert found["TABLES"] == {**TABLES, "cuda 9 bfloat16": SIMPLE}
    assert found["PLAIN_CPU"] == PLAIN_CPU


def run(grid: tuple[int, int, int] = LONG, **options: object) -> list[SiteRecord]:
    chosen = {"sidecar": None, "inner": "eager", **options}
    with torch.no_grad():
        torch.compile(toy(), backend="veda", options=chosen)(latents(grid))
    return veda_compile.report().sites


@pytest.mark.usefixtures("fresh_compiler")
class TestBackend:
    def test_a_sparse_site_tells_its_gain(self) -> None:
        sites = run()
        assert all(site.rewritten and site.measured for site in sites)
        (gain,) = {site.predicted_gain for site in sites}
        assert gain is not None and gain > 1.0
        text = str(veda_compile.report())
        assert f"{gain:.1f}x" in text and "as predicted" in text and "~" not in text
        assert veda_compile.report().to_dict()["graphs"][0]["sites"][0]["predicted_gain"] == gain

    def test_too_high_a_density_stays_dense_and_says_what_would_do(self) -> None:
        sites = run(density=1.0)
        assert {site.reason for site in sites} == {"DENSITY_TOO_HIGH"}
        assert "2048 video tokens" in str(sites[0].explanation)
        assert sites[0].harmless and sites[0].predicted_gain is not None
        told = str(sites[0].remedy)
        most = float(told.split("'density': ")[1].split("}")[0])
        assert 0.05 <= most < 1.0
        torch._dynamo.reset()
        veda_compile.reset_report()
        assert all(site.rewritten for site in run(density=most))

    def test_few_tokens_stay_dense(self) -> None:
        sites = run((3, 6, 8))
        assert {site.reason for site in sites} == {"TOO_FEW_TOKENS"}
        assert "144 video tokens" in str(sites[0].explanation)

    def test_the_user_decides_by_tokens(self) -> None:
        sites = run(density=1.0, min_tokens=0)
        assert all(site.rewritten and site.predicted_gain is None for site in sites)
        sites = run((8, 16, 8), min_tokens=1025)
        assert sites[-1].reason == "TOO_FEW_TOKENS"
        assert "1024 video tokens, break-even 1025" in str(sites[-1].explanation)

    def test_an_executor_without_costs_goes_by_tokens(self) -> None:
        sites = run(executor="reference", density=1.0)
        assert all(site.rewritten and site.predicted_gain is None for site in sites)

    def test_a_guess_is_marked(self) -> None:
        guess = TABLES["cuda"]._replace(least_tokens=0)
        with mock.patch.dict(TABLES, {"cpu float32": guess}):
            run((16, 16, 32))
        text = str(veda_compile.report())
        assert "~" in text and "it is a guess" in text

    def test_layers_are_decided_one_by_one(self, tmp_path) -> None:
        layers = [LayerCard(f"blocks.{i}", 2, 16) for i in range(2)]
        sidecar = Sidecar.uniform("Video", layers, LONG, (4, 4, 4), 0.1)
        (plan,) = sidecar.plans
        plan = replace(plan, density=((0.1, 0.1), (1.0, 1.0)))
        path = tmp_path / "uneven.veda.safetensors"
        replace(sidecar, plans=(plan,)).save(path)
        sites = run(sidecar=str(path))
        assert [site.rewritten for site in sites] == [True, False]
        assert sites[1].reason == "DENSITY_TOO_HIGH"
