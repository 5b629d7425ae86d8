"""Models without video self-attention: nothing is rewritten, and the result is the same to the bit.

Images, text, audio, encoders of video, and video models that attend in space and time by turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compiling import QUICK
from other_models import WITHOUT, Built
from torch import Tensor, fx
from trap_models import TRAPS

import veda_compile
from veda_compile import backend

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for part in output.values():
            yield from tensors(part)
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from tensors(part)
    elif hasattr(output, "sample") and isinstance(output.sample, Tensor):
        yield output.sample


MODELS = {**WITHOUT, **TRAPS}

INDUCTOR = ("flux", "text to video", "by turns, T = H * W")
"""Compiled by Inductor too, which takes long: an image DiT, and attention over parts of a video."""


def made(name: str) -> Built:
    """The model and its inputs, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = MODELS[name][0]()
    return model.eval().requires_grad_(False), inputs


def outputs(name: str, **how: Any) -> list[Tensor]:
    """What the model returns when it is compiled."""
    torch._dynamo.reset()
    model, inputs = made(name)
    with torch.no_grad():
        return list(tensors(torch.compile(model, **how)(**inputs)))


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_rewritten(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    passed_on: list[str] = []
    inner = backend.compile_inner

    def eager(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        given.append(gm.code)
        return gm.forward

    def compile_inner(gm: fx.GraphModule, inputs: Any, *rest: Any) -> Any:
        passed_on.append(gm.code)
        return inner(gm, inputs, *rest)

    monkeypatch.setattr(backend, "compile_inner", compile_inner)
    plain = outputs(name, backend=eager)
    out = outputs(name, backend="veda", options=QUICK)
    sites = veda_compile.report().sites
    assert [site for site in sites if site.rewritten] == []
    assert {site.reason for site in sites} <= MODELS[name][1]
    assert given and passed_on == given  # the inner compiler gets what it would get without us
    assert plain and len(plain) == len(out)
    for a, b in zip(out, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", INDUCTOR)
def test_the_result_is_that_of_inductor(name: str) -> None:
    plain = outputs(name, backend="inductor")
    out = outputs(name, backend="veda", options={"min_tokens": 0, "sidecar": None})
    assert [site for site in veda_compile.report().sites if site.rewritten] == []
    assert plain and len(plain) == len(out)
    for a, b in zip(out, plain, strict=True):
        assert torch.equal(a, b)
