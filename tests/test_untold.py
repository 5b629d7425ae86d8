"""An earlier graph that could not be followed is named as the cause, once in the log and at the
attention call that lacks what it should have told."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from broken_models import Broken, broken, call, latent, nothing
from compiling import compiled
from torch import Tensor

import veda_compile
from veda_compile import handing_on
from veda_compile.passes.origins import outputs_with_tokens

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Together(Broken):
    """Keys and values cross the graph break in one tensor, so that queries seem to stand apart."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        q, both = torch._dynamo.disable(nothing)(q, torch.stack([k, v]))
        return F.scaled_dot_product_attention(q, both[0], both[1])


def together() -> Broken:
    torch.manual_seed(0)
    return Together(nothing).eval().requires_grad_(False)


@pytest.mark.parametrize("make", [broken, together])
@pytest.mark.parametrize("works", [0, 1], ids=["while compiling", "in the first call"])
def test_a_failure_is_named_in_the_log_and_at_the_site(
    make: Any, works: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def fails(*args: Any) -> Any:
        asked.append(args)
        if len(asked) > works:
            raise AttributeError("no such side")
        return outputs_with_tokens(*args)

    model, x = make(), latent()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="veda_compile"):
        patch.setattr(handing_on, "outputs_with_tokens", fails)
        fn = compiled(model)
        for _ in range(3):
            (out,), layouts = call(fn, {"x": x})
            assert not layouts
            with torch.no_grad():
                assert torch.equal(out, model(x))
    (site,) = veda_compile.report().sites
    named = "an earlier graph could not be followed: AttributeError: no such side"
    assert site.reason == "NO_PROVENANCE" and named in str(site.explanation)
    assert "one graph" in str(site.remedy)
    lines = [r.getMessage() for r in caplog.records if r.name == handing_on.__name__]
    graphs = veda_compile.report().graphs
    assert len([line for line in lines if named in line]) == len(graphs)
    assert named in " ".join(str(veda_compile.report()).split())

    torch._dynamo.reset()  # without the failure it is sparse
    assert call(compiled(model), {"x": x})[1]


class Sorted(Broken):
    """Tokens in an order that depends on the data."""

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = super().project(x)
        order = q[0, 0].sum(-1).argsort()
        return q[:, :, order], k[:, :, order], v[:, :, order]


def test_an_operation_that_an_earlier_graph_could_not_follow_is_named() -> None:
    torch.manual_seed(0)
    model = Sorted(nothing).eval().requires_grad_(False)
    assert not call(compiled(model), {"x": latent()})[1]
    (site,) = veda_compile.report().sites
    assert site.reason == "NO_PROVENANCE"
    assert "an earlier graph was not followed: " in (why := str(site.explanation)), why
    assert "getitem" in why, why
    assert "plain torch operations" in str(site.remedy)
