"""Attention that never reaches the backend is listed, with a cause and what to do about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel
from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel
from small_transformers import QUICK, Grid, hunyuan_inputs, run, wan, wan_inputs

import veda_compile

GRID: Grid = (3, 4, 4)
SELF = [f"blocks.{place}.attn1" for place in range(3)]
ALL = sorted(SELF + [f"blocks.{place}.attn2" for place in range(3)])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    veda_compile.reset_report()
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def missed() -> dict[str | None, dict[str, Any]]:
    report = veda_compile.report().to_dict()
    assert report["totals"]["missed"] == len(report["missed"])
    return {entry["layer"]: entry for entry in report["missed"]}


def compile_whole(model: Any) -> Any:
    return torch.compile(model, backend="veda", options=QUICK)


def compile_blocks(model: Any) -> Any:
    model.compile_repeated_blocks(backend="veda", options=QUICK)
    return model


@pytest.mark.parametrize("compile_model", [compile_whole, compile_blocks])
def test_nothing_is_missed_where_all_is_compiled(compile_model: Callable[[Any], Any]) -> None:
    for model in (wan(), wan(seed=1)):  # the second one meets graphs that are compiled already
        call = compile_model(model)
        run(call, wan_inputs(GRID))
        run(call, wan_inputs(GRID))
    assert missed() == {}


def test_layers_served_by_one_graph_are_named() -> None:
    run(compile_blocks(wan()), wan_inputs(GRID))
    (site, _) = veda_compile.report().sites
    assert sorted({site.layer, *site.layers} - {"attn1"}) == SELF


def test_a_compiled_function_that_calls_the_model() -> None:
    model = wan()

    def step(**inputs: Any) -> Any:
        return model(**inputs)

    with torch.no_grad():
        torch.compile(step, backend="veda", options=QUICK)(**wan_inputs(GRID))
    report = veda_compile.report()
    assert report.graphs[0].model == "WanTransformer3DModel"
    assert missed() == {}


def test_blocks_that_are_not_compiled() -> None:
    model = wan()
    for block in model.blocks[:2]:
        block.compile(backend="veda", options=QUICK)
    run(model, wan_inputs(GRID))
    found = missed()
    assert sorted(map(str, found)) == ["blocks.2.attn1", "blocks.2.attn2"]
    entry = found["blocks.2.attn1"]
    assert entry["model"] == "WanTransformer3DModel"
    assert "WanTransformerBlock (blocks.2)" in entry["cause"]
    assert "backend='veda'" in entry["remedy"]
    text = str(veda_compile.report())
    assert "blocks.2.attn1..2 x2" in text and "never seen by the backend" in text


def test_block_classes_that_diffusers_does_not_compile() -> None:
    model = HunyuanVideoTransformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=32, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1,
        guidance_embeds=False, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(8, 12, 12), image_condition_type="token_replace",
    ).eval()  # fmt: skip
    inputs = hunyuan_inputs(GRID)
    inputs["hidden_states"] = torch.ones(1, 9, 3, 8, 8)
    run(compile_blocks(model), inputs)
    found = missed()
    assert sorted(map(str, found)) == [
        "single_transformer_blocks.0.attn",
        "transformer_blocks.0.attn",
    ]
    assert "HunyuanVideoTokenReplaceTransformerBlock" in found["transformer_blocks.0.attn"]["cause"]


def mochi() -> tuple[Any, dict[str, Any]]:
    model = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=24, num_layers=2,
        pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=8,
        max_sequence_length=12,
    ).eval()  # fmt: skip
    return model, {
        "hidden_states": torch.ones(1, 4, 3, 8, 8),
        "encoder_hidden_states": torch.ones(1, 12, 16),
        "timestep": torch.tensor([1]),
        "encoder_attention_mask": torch.ones(1, 12).bool(),
        "return_dict": False,
    }


def test_attention_behind_a_graph_break_and_its_remedy() -> None:
    model, inputs = mochi()
    run(compile_whole(model), inputs)
    found = missed()
    names = ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    assert sorted(map(str, found)) == names
    assert "Dynamic shape operator" in found[names[0]]["cause"]
    remedy = found[names[0]]["remedy"]
    assert "capture_dynamic_output_shape_ops = True" in remedy
    assert "capture_scalar_outputs = True" in remedy

    torch.compiler.reset()
    veda_compile.reset_report()
    with torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
    ):
        run(compile_whole(model), inputs)
    assert missed() == {}
    assert {site.layer for site in veda_compile.report().sites} >= set(names)


def test_excluded_from_compilation() -> None:
    model = wan()
    attention = model.blocks[1].attn1
    attention.forward = torch.compiler.disable(attention.forward)
    run(compile_whole(model), wan_inputs(GRID))
    entry = missed()["blocks.1.attn1"]
    assert "torch.compiler.disable" in entry["cause"]
    assert set(missed()) == {"blocks.1.attn1"}


def test_an_attention_backend_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wan()
    model.blocks[0].compile(backend="veda", options=QUICK)
    run(model, wan_inputs(GRID))
    registry = attention_dispatch._AttentionBackendRegistry
    sage = attention_dispatch.AttentionBackendName.SAGE
    monkeypatch.setattr(registry, "_active_backend", sage)
    entry = missed()["blocks.1.attn1"]
    assert "'sage'" in entry["cause"] and "set_attention_backend('native')" in entry["remedy"]


def test_the_recompile_limit() -> None:
    model = wan()
    for block in model.blocks:
        block.compile(backend="veda", options=QUICK, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for width in (4, 5):
            run(model, wan_inputs((2, 4, width)))
        assert missed() == {}
        run(model, wan_inputs((2, 4, 6)))
    found = missed()
    assert sorted(map(str, found)) == ALL
    assert "recompile limit" in found["blocks.0.attn1"]["cause"]
    assert "dynamic=True" in found["blocks.0.attn1"]["remedy"]


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile"])
def test_a_stance_that_keeps_compiled_code_from_running(stance: str) -> None:
    torch.compiler.set_stance(stance)
    run(compile_whole(wan()), wan_inputs(GRID))
    (entry,) = veda_compile.report().to_dict()["missed"]
    assert entry["layer"] is None and stance in entry["cause"] and "set_stance" in entry["remedy"]
    torch.compiler.set_stance("default")
    assert missed() == {}


def test_a_model_that_never_came_can_be_asked_about() -> None:
    model = wan()
    assert missed() == {}
    assert "No graph reached the backend" in str(veda_compile.report())
    report = veda_compile.report(torch.compile(model, backend="veda", options=QUICK))
    assert sorted(str(entry.layer) for entry in report.missed) == ALL
    assert "compile it with backend='veda'" in report.missed[0].remedy


def test_misses_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = wan()
    model.blocks[0].compile(backend="veda", options=QUICK)
    with caplog.at_level(logging.WARNING, logger="veda_compile"):
        for _ in range(5):
            run(model, wan_inputs(GRID))
    lines = [r.getMessage() for r in caplog.records if "never reached" in r.getMessage()]
    assert len(lines) == 1
    assert "blocks.1..2.attn1..2 x4" in lines[0] and "Remedy" in lines[0]


def test_no_hooks_and_no_global_settings() -> None:
    model = wan()
    before = torch._dynamo.config.get_config_copy()
    run(compile_blocks(model), wan_inputs(GRID))
    veda_compile.report()
    assert torch._dynamo.config.get_config_copy() == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
