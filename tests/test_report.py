"""The report and the log: what they hold, and that they are true."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_transformers import QUICK, Grid
from torch.nn.functional import scaled_dot_product_attention

import veda_compile
from veda_compile.errors import ExecutorError
from veda_compile.report import GraphRecord, ReportStore, SiteRecord

GRID: Grid = (4, 8, 12)
SITE_KEYS = {
    "layer", "verdict", "reason", "explanation", "remedy", "layout", "evidence", "grid", "grids",
    "layers", "density", "tile_shapes", "executor", "executor_reason", "score", "fingerprint",
    "calibration", "predicted_gain", "measured",
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    veda_compile.reset_report()
    yield
    torch.compiler.reset()


class Attention(torch.nn.Module):
    """Self-attention over the tokens, then attention from them to a text."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside = torch.nn.Linear(32, 32).requires_grad_(False)

    def forward(self, tokens: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        words = self.inside(text).unflatten(2, (2, 16)).transpose(1, 2)
        heads = self.inside(tokens).unflatten(2, (2, 16)).transpose(1, 2)
        heads = scaled_dot_product_attention(heads, heads, heads)
        return scaled_dot_product_attention(heads, words, words)


class Toy(torch.nn.Module):
    """One attention layer over a video."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, latent: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.attn(latent.flatten(2).transpose(1, 2), text)
        return out


def toy_inputs(grid: Grid = GRID) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(1, 32, *grid), torch.ones(1, 7, 32)


def compile_toy(dynamic: bool | None = None, **options: Any) -> Any:
    chosen = {**QUICK, "density": 0.34, **options}
    return torch.compile(Toy(), backend="veda", options=chosen, dynamic=dynamic)


def test_the_dictionary() -> None:
    compile_toy()(*toy_inputs())
    data = veda_compile.report().to_dict()
    assert set(data) == {"graphs", "missed", "totals"}
    left = {"CROSS_ATTENTION": 1}
    assert data["totals"] == {"sites": 2, "rewritten": 1, "left": left, "missed": 0}
    (graph,) = data["graphs"]
    assert set(graph) == {"compile_id", "model", "unknown", "sites"}
    assert (graph["compile_id"], graph["model"], graph["unknown"]) == ("0/0", "Toy", [])
    sparse, dense = graph["sites"]
    assert set(sparse) == set(dense) == SITE_KEYS
    assert sparse == {
        **sparse,
        "layer": "attn",
        "verdict": "rewritten",
        "reason": None,
        "explanation": None,
        "layout": "video 384",
        "grid": GRID,
        "grids": [GRID],
        "tile_shapes": [(4, 4, 4)],
        "executor": "reference",
        "score": "closed_form",
    }
    assert sparse["density"] == pytest.approx(12 / 36)  # 2 of 6 tiles in each of 6 rows
    assert (dense["verdict"], dense["reason"]) == ("left", "CROSS_ATTENTION")
    assert dense["remedy"] is None  # nothing is amiss
    assert dense["explanation"] and dense["density"] is None and dense["executor"] is None
    assert json.loads(json.dumps(data))["totals"] == data["totals"]


def test_printing_fits_terminals_of_any_width() -> None:
    compile_toy()(*toy_inputs())
    for width in (20, 40, 80, 200):
        console = Console(width=width, file=io.StringIO())
        with console.capture() as printed:
            console.print(veda_compile.report().table())
        assert max(len(line) for line in printed.get().splitlines()) <= width
    text = str(veda_compile.report())
    assert "1 of 2 attention calls" in text and "4x8x12" in text and "CROSS_ATTENTION" in text


def test_every_width_and_notebooks_show_the_whole_report() -> None:
    compile_toy(min_tokens=1000)(*toy_inputs())
    report = veda_compile.report()
    for width in (20, 40, 80, 200):
        console = Console(width=width, file=io.StringIO())
        with console.capture() as printed:
            console.print(report)
        assert max(len(line) for line in printed.get().splitlines()) <= width
    assert "-> options={'min_tokens': 0}" in str(report) and repr(report) == str(report)
    html = report._repr_html_()
    assert html.startswith("<pre") and "TOO_FEW_TOKENS" in html and "min_tokens" in html


def test_forty_equal_layers_are_one_row() -> None:
    def site(layer: str, rewritten: bool = True) -> SiteRecord:
        reason = None if rewritten else "CROSS_ATTENTION"
        return SiteRecord(layer, rewritten, reason, grid=(5, 6, 10), executor="cpu")

    names = [f"blocks.{place}" for place in range(40)]
    sites = [site(f"{name}.attn1") for name in names]
    sites += [site(f"{name}.attn2", rewritten=False) for name in names]
    sites += [site("blocks.3.face[attn]")]
    report = veda_compile.Report([GraphRecord("0/0", sites)])
    text = str(report)
    assert "blocks.0..39.attn1 x40" in text and "blocks.0..39.attn2 x40" in text
    assert "blocks.3.face[attn]" in text  # brackets are no markup
    assert len(text.splitlines()) < 12
    assert len(report.to_dict()["graphs"][0]["sites"]) == 81


class Crooked(Toy):
    """Ahead of the attention, an operation whose result nobody could follow."""

    def forward(self, latent: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        tokens = latent.flatten(2).transpose(1, 2)
        out: torch.Tensor = self.attn(torch.fft.fft(tokens).real + tokens * 0, text)
        return out


def test_operations_that_were_not_followed_are_named() -> None:
    torch.compile(Crooked(), backend="veda", options=QUICK)(*toy_inputs())
    (graph,) = veda_compile.report().to_dict()["graphs"]
    assert any("fft" in name for name in graph["unknown"])
    if graph["sites"][0]["verdict"] == "left":
        assert "fft" in str(veda_compile.report())


def test_a_warning_names_the_remedy_once_per_model_and_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainable = Toy().requires_grad_(True)
    call = torch.compile(trainable, backend="veda", options=QUICK, dynamic=False)
    with caplog.at_level(logging.WARNING, logger="veda_compile"):
        for grid in (GRID, (4, 12, 8), (3, 10, 14)):
            call(*toy_inputs(grid))
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("veda_compile")]
    assert "Toy" in line and "attn" in line and "torch.no_grad()" in line
    with caplog.at_level(logging.WARNING, logger="veda_compile"):
        caplog.clear()
        compile_toy(min_tokens=1000)(*toy_inputs())  # faster dense: nothing to warn of
    assert not [r for r in caplog.records if r.name.startswith("veda_compile")]


def test_one_line_in_the_log_per_compile(caplog: pytest.LogCaptureFixture) -> None:
    call = compile_toy()
    with caplog.at_level(logging.INFO, logger="veda_compile"):
        call(*toy_inputs())
        call(*toy_inputs())
        call(*toy_inputs((4, 12, 8)))
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("veda_compile")]
    assert len(lines) == len(veda_compile.report().graphs) == 2
    assert lines[0] == (
        "veda: graph 0/0 of Toy: 1 of 2 attention calls sparse (grid 4x8x12, density 0.333); "
        "1 left dense: CROSS_ATTENTION"
    )


def test_a_reset_report_is_empty_and_models_go_on() -> None:
    call = compile_toy()
    first = call(*toy_inputs())
    kept = veda_compile.report()
    veda_compile.reset_report()
    assert veda_compile.report().to_dict() == {
        "graphs": [],
        "missed": [],
        "totals": {"sites": 0, "rewritten": 0, "left": {}, "missed": 0},
    }
    assert len(kept.sites) == 2
    assert torch.equal(call(*toy_inputs()), first)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_graph_is_recorded_once(dynamic: bool) -> None:
    call = compile_toy(dynamic=dynamic)
    grids = [GRID, (4, 12, 8), (3, 10, 14)]
    for grid in grids:
        call(*toy_inputs(grid))
    graphs = veda_compile.report().graphs
    assert len(graphs) == (1 if dynamic else 3)
    assert len({graph.compile_id for graph in graphs}) == len(graphs)
    assert [len(graph.sites) for graph in graphs] == [2] * len(graphs)
    assert [grid for graph in graphs for grid in graph.sites[0].grids] == grids


def test_the_store_takes_records_from_many_threads() -> None:
    store = ReportStore()

    def work(thread: int) -> None:
        for place in range(40):
            store.add(GraphRecord(f"{thread}/{place % 20}", [SiteRecord("attn", True)]))
            store.report().to_dict()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert len(store.report().graphs) == 8 * 20
    for place in range(2000):
        store.add(GraphRecord(f"many/{place}", []))
    assert len(store.report().graphs) == 1000
    assert store.report().graphs[-1].compile_id == "many/1999"


FRESH = """
import sys, torch
assert "veda" in torch._dynamo.list_backends()
assert "veda_compile" not in sys.modules
def attention(x):
    heads = x.flatten(2).transpose(1, 2)[:, None]
    return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
x = torch.randn(1, 16, 4, 8, 12, generator=torch.Generator().manual_seed(0))
quick = {"min_tokens": 0, "sidecar": None, "inner": "eager"}
found = torch.compile(attention, backend="veda", options={**quick, "density": 0.3,
                      "executor": "reference"})(x)
assert (found - attention(x)).abs().max() > 1e-3
torch.compiler.reset()
try:
    torch.compile(attention, backend="veda", options={**quick, "executor": "triton"})(x)
except Exception as error:
    found = getattr(error, "inner_exception", error)
    print(type(found).__name__, found)
"""


def test_a_process_that_imports_nothing_of_ours(tmp_path: Path) -> None:
    """The entry point is enough; and an executor that cannot run here is an error, not another."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-c", FRESH], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(ExecutorError.__name__), done.stdout
    assert "executor 'triton' cannot run here" in done.stdout and "cpu" in done.stdout
    assert list(tmp_path.iterdir()) == []
