"""The demo's picture of plans shows what attention really kept, on clips distillation never saw."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer

from veda_compile import Sidecar, sparse_attention
from veda_compile.kernels.layout import Layout, Video
from veda_compile.kernels.plan import Plan
from veda_compile.kernels.static_modes import StaticMode
from veda_compile.options import Options
from veda_compile.report import SiteRecord

pytest.importorskip("matplotlib")
pytest.importorskip("diffusers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
GRID = (3, 9, 13)
LAYOUT = Layout.of(Video(*GRID))
PLAN = Plan(
    ((1, 8, 8), (4, 4, 4), (1, 4, 16)),
    (0.4, 0.5, 0.5),
    modes=(None, None, StaticMode("multi_diagonal", (1, 0))),
)


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    for name in [n for n in sys.modules if n.startswith(("_demo_", "reference_model"))]:
        del sys.modules[name]


def call(heads: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, heads, LAYOUT.length, 16).unbind()
    return 2 * q, 2 * k, v


@pytest.mark.parametrize("head", range(3))
@pytest.mark.parametrize("token", [0, 200, LAYOUT.length - 1])
def test_kept_tokens_are_those_that_attention_reads(head: int, token: int) -> None:
    from _demo_plans import HeadPlan, kept_tokens

    q, k, v = call()
    kept, own = kept_tokens((q, k, v), LAYOUT, HeadPlan(0, head, PLAN, 0.0), token)
    assert kept.shape == own.shape == GRID
    assert own.flatten()[token] and kept[own].all() and not kept.all()
    out = sparse_attention(q, k, v, layout=LAYOUT, plan=PLAN)[0, head]
    mask = kept.flatten()[None]
    by_hand = F.scaled_dot_product_attention(q[0, head], k[0, head], v[0, head], attn_mask=mask)
    rows = own.flatten()
    torch.testing.assert_close(out[rows], by_hand[rows], rtol=1e-4, atol=1e-5)


def test_plans_are_named_and_counted_as_they_run(tmp_path: Path) -> None:
    from _demo_plans import head_plans, write_plans

    from veda_compile.sidecar import GridPlan, LayerCard, ModelCard

    path = tmp_path / "toy.veda.safetensors"
    assert PLAN.modes is not None
    Sidecar(
        ModelCard("Toy", (LayerCard("a", 3, 16), LayerCard("b", 3, 16))),
        (GridPlan(GRID, (PLAN.tile_shapes,) * 2, (PLAN.density,) * 2, (PLAN.modes,) * 2),),
        "closed_form",
        64,
    ).save(path)
    options = Options.from_dict({"sidecar": str(path)})
    sites: list[Any] = [
        SiteRecord(layer="a", rewritten=True, grid=GRID),
        SiteRecord(layer="b", rewritten=False, grid=None),
    ]
    first, second = head_plans([call(), call()], sites, options)
    assert [head.name for head in first] == ["scored", "scored", "multi-diagonal 1, 0"]
    assert [head.shape for head in first] == ["1x8x8", "4x4x4", "1x4x16"]
    assert second == []
    q, k, v = call()
    _, selection = sparse_attention(q, k, v, layout=LAYOUT, plan=PLAN, return_selection=True)
    for head in first:
        tiles = int((selection.counts[0, head.head] > 0).sum())
        really = float(selection.counts[0, head.head].sum()) / tiles**2
        assert head.density == pytest.approx(really, abs=1 / tiles)
    drawn = write_plans([call(), call()], sites, options, tmp_path / "pictures" / "plans.png")
    assert drawn.stat().st_size > 10_000


def test_the_demo_draws_what_distillation_did_not_see() -> None:
    import _demo_sampling
    import distill_reference
    import quickstart
    from reference_model.dataset import NUM_CLASSES

    drawn, seen = set(_demo_sampling.CLASSES), set(distill_reference.CLASSES)
    assert not drawn & seen and drawn | seen == set(range(NUM_CLASSES))
    assert distill_reference.FIRST_SEED + 4000 <= quickstart.FIRST_SEED


def test_the_distillation_example_writes_what_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None
) -> None:
    import distill_reference
    from reference_model.sampling import sample
    from typer.testing import CliRunner

    seen: list[tuple[int, int]] = []

    def quick(model: Any, kinds: list[int], *, steps: int, seed: int, guidance: float) -> Any:
        seen.append((kinds[0], seed))
        return sample(model, kinds, (8, 32, 32), 2, seed, guidance=guidance)

    monkeypatch.setattr(distill_reference, "load_reference_model", lambda device: reference_like())
    monkeypatch.setattr(distill_reference, "sample", quick)
    app = typer.Typer()
    app.command()(distill_reference.main)
    out = tmp_path / "small.veda.safetensors"
    words = ["--density", "0.5", "--policy", "static", "--generations", "2", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert f"wrote {out}" in done.output and "in 2 generations" in done.output
    made = Sidecar.load(out).provenance
    assert (made["density"], made["policy"], made["runs"]) == (0.5, "static", 2)
    assert [kind for kind, _ in seen] == list(distill_reference.CLASSES[:2])
    assert all(seed < 5000 for _, seed in seen)


def reference_like() -> Any:
    """A small model with random weights that takes what the reference model takes."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=3,
        out_channels=3, text_dim=32, freq_dim=16, ffn_dim=32, num_layers=1, cross_attn_norm=True,
        rope_max_seq_len=16,
    ).eval()  # fmt: skip
