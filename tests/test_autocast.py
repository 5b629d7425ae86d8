"""Mixed precision: the rewritten attention computes in the dtype the dense one does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import veda_compile

GRID = (3, 4, 6)


class MixedBlock(nn.Module):
    """Norms in float32 leave q and k wider than v, as rotary code often does."""

    def __init__(self, written_out: bool) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.Linear(32, 96)
        self.written_out = written_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = (y.unflatten(2, (2, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        q, k = F.normalize(q.float(), dim=-1) * 4, F.normalize(k.float(), dim=-1) * 4
        if self.written_out:
            weights = (q @ k.transpose(-1, -2) * 0.25).softmax(-1)
            return weights.to(v.dtype) @ v
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("written_out", [False, True])
def test_autocast_keeps_dtype_and_values(written_out: bool) -> None:
    torch.manual_seed(0)
    model = MixedBlock(written_out).eval()
    x = torch.randn(1, 4, GRID[0], 2 * GRID[1], 2 * GRID[2])
    options = {
        "density": 1.0,
        "min_tokens": 0,
        "sidecar": None,
        "executor": "reference",
        "inner": "eager",
    }
    veda_compile.reset_report()
    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dense = model(x)
        sparse = torch.compile(model, backend="veda", options=options)(x)
    assert veda_compile.report().to_dict()["totals"]["rewritten"] == 1
    assert sparse.dtype == dense.dtype
    torch.testing.assert_close(sparse, dense, atol=2e-2, rtol=0)


def test_values_of_another_width_stay_dense() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv3d(4, 32, (1, 2, 2), (1, 2, 2))
            self.v = nn.Linear(32, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patch(x).flatten(2).transpose(1, 2)
            q = x.unflatten(2, (2, 16)).transpose(1, 2)
            return F.scaled_dot_product_attention(
                q, q, self.v(x).unflatten(2, (2, 32)).transpose(1, 2)
            )

    model = Wide().eval()
    x = torch.randn(1, 4, GRID[0], 2 * GRID[1], 2 * GRID[2])
    veda_compile.reset_report()
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(
            model, backend="veda", options={"min_tokens": 0, "sidecar": None, "inner": "eager"}
        )(x)
        torch.testing.assert_close(out, model(x), atol=0, rtol=0)
    (site,) = veda_compile.report().sites
    assert site.reason == "PLAIN_SOFTMAX"
    assert "head_dim" in str(site.explanation)
