"""One attention call over a small video, written in whatever way a test likes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from compiling import run
from torch import Tensor, nn
from toys import GRID, TOKENS

from veda_compile.report import SiteRecord

sdpa = F.scaled_dot_product_attention
T, H, W = GRID


def heads(x: Tensor) -> Tensor:
    """(B, N, 32) -> (B, 2, N, 16)."""
    return x.unflatten(-1, (2, 16)).transpose(-3, -2)


def merged(x: Tensor) -> Tensor:
    """The inverse of `heads`."""
    return x.transpose(-3, -2).flatten(-2)


class Odd(nn.Module):
    """A video's tokens and what `attend` makes of them; `others` are further inputs."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.embed, self.other = nn.Linear(4, 32), nn.Linear(4, 32)
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 32) for _ in range(3))
        self.learned = nn.Parameter(torch.randn(1, TOKENS, 32))

    def tokens(self, x: Tensor) -> Tensor:
        """(B, 4, ...) latent -> (B, N, 32) in raster order."""
        return self.embed(x.flatten(2).transpose(1, 2))  # type: ignore[no-any-return]

    def qkv(self, x: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> list[Tensor]:
        """Projections of (B, N, 32) tokens with heads apart; k and v of their own tokens."""
        k = x if k is None else k
        v = k if v is None else v
        return [heads(layer(y)) for layer, y in ((self.to_q, x), (self.to_k, k), (self.to_v, v))]

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.attend(self, x, *others)


def odd(attend: Callable[..., Tensor]) -> Odd:
    """A frozen `Odd` with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Odd(attend).eval().requires_grad_(False)


def left(model: nn.Module, *args: Tensor) -> list[SiteRecord]:
    """The sites of a model, of which none may be rewritten and nothing may change."""
    out, sites = run(model, *args, density=0.3)
    assert sites and [site for site in sites if site.rewritten] == []
    with torch.no_grad():
        assert torch.equal(out, model(*args))
    return sites


def name_of(attend: Callable[..., Tensor]) -> str:
    """For the names of parametrized tests."""
    return attend.__name__
