"""Which layers a graph holds is told by their modules, their parameters, or their callers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from explained_models import Attention
from small_transformers import QUICK, Grid
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import veda_compile

GRID: Grid = (3, 4, 4)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    veda_compile.reset_report()
    yield
    torch.compiler.reset()


def missed() -> dict[str | None, dict[str, Any]]:
    return {entry["layer"]: entry for entry in veda_compile.report().to_dict()["missed"]}


class Block(nn.Module):
    """Projections around an attention that is given."""

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.attend = attend

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_qkv(tokens)[:, None].chunk(3, -1)
        return tokens + self.out(self.attend(q, k, v)[:, 0])


class Stack(nn.Module):
    """Blocks in a row."""

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(attend) for _ in range(3))

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        tokens = latent.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


LATENT = torch.ones(1, 16, 3, 4, 4)


def linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.relu(q) @ (torch.relu(k).transpose(-1, -2) @ v)


@torch.library.custom_op("veda_test::attention_of_another", mutates_args=())
def another(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, k, v)


@another.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(v)


@torch.no_grad()
def run_blocks(attend: Callable[..., torch.Tensor]) -> None:
    model = Stack(attend)
    for block in model.blocks:
        block.compile(backend="veda", options=QUICK)
    model(LATENT)
    model(LATENT)
    MODELS.append(model)


MODELS: list[nn.Module] = []
"""Keeps models alive: causes are read off them."""


def test_linear_attention_is_not_missed() -> None:
    run_blocks(linear)
    assert missed() == {}


def test_an_unknown_operation_in_the_place_of_attention() -> None:
    run_blocks(another)
    found = missed()
    assert sorted(map(str, found)) == ["blocks.0", "blocks.1", "blocks.2"]
    assert "veda_test::attention_of_another" in found["blocks.2"]["cause"]
    assert "register_attention_op" in found["blocks.2"]["remedy"]


@torch.no_grad()
def test_attention_alone_compiled() -> None:
    options = {**QUICK, "grid": GRID}
    attend = torch.compile(lambda q, k, v: scaled_dot_product_attention(q, k, v),
                           backend="veda", options=options)  # fmt: skip
    Stack(attend)(LATENT)
    assert missed() == {}


@torch.no_grad()
def test_replaced_parameters_do_not_hide_a_layer() -> None:
    """Offloading gives a block other parameters for the time of its call."""
    model = Stack(lambda q, k, v: scaled_dot_product_attention(q, k, v))
    for block in model.blocks:
        block.compile(backend="veda", options=QUICK)
        kept = dict(block.to_qkv.named_parameters())

        def enter(module: nn.Module, _: Any) -> None:
            for name, value in list(module.to_qkv.named_parameters()):
                setattr(module.to_qkv, name, nn.Parameter(value.clone(), requires_grad=False))

        def leave(module: nn.Module, *_: Any, kept: dict[str, Any] = kept) -> None:
            for name, value in kept.items():
                setattr(module.to_qkv, name, value)

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    model(LATENT)
    assert missed() == {}


def test_a_small_model_is_told_by_structure() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention(), nn.MultiheadAttention(16, 1)
            self.third = nn.Linear(16, 16)

    report = veda_compile.report(Model())
    assert [entry.layer for entry in report.missed] == ["first", "second"]


class TextEncoder(nn.Module):
    """A model of its own: libraries load such by name."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    @classmethod
    def from_pretrained(cls) -> TextEncoder:
        return cls()


class Transformer(TextEncoder):
    """Another one, all of whose blocks but one are compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.late = Attention()

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        tokens = latent.flatten(2).transpose(1, 2)
        return self.late(self.attn(tokens))


class Pipeline(nn.Module):
    """Holds both."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.transformer = TextEncoder(), Transformer()

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.transformer(latent)
        return out


@torch.no_grad()
def test_models_beside_the_compiled_one_are_not_missed() -> None:
    pipeline = Pipeline()
    pipeline.transformer.attn.compile(backend="veda", options=QUICK)
    pipeline(LATENT)
    assert set(missed()) == {"late"}
    assert missed()["late"]["model"] == "Transformer"
    MODELS.append(pipeline)


@torch.no_grad()
def test_a_model_inside_a_compiled_module() -> None:
    pipeline = Pipeline()
    torch.compile(pipeline, backend="veda", options=QUICK)(LATENT)
    assert missed() == {}
    (graph,) = veda_compile.report().graphs
    assert graph.model == "Pipeline" and len(graph.sites) == 2
