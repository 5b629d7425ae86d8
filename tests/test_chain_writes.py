"""Written-out attention whose parts are changed in place half-way stays dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compiling import run
from odd_attention import Odd, left, merged, odd
from torch import Tensor
from toys import TOKENS, latents

pytestmark = pytest.mark.usefixtures("fresh_compiler")

EVERY_SECOND = torch.arange(TOKENS) % 2
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def weights_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.transpose(-1, -2)).softmax(-1)
    p.mul_(EVERY_SECOND)
    return p @ v


def weights_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.transpose(-1, -2)).softmax(-1)
    p[..., ::2] = 0.0
    return p @ v


def logits_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    scores.masked_fill_(EVERY_SECOND.bool(), -torch.inf)
    return scores.softmax(-1) @ v


def keys_after_their_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    k.mul_(2.0)
    return scores.softmax(-1) @ v + k


def queries_after_their_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.clone()
    scores = q @ k.transpose(-1, -2)
    q.zero_()
    return scores.softmax(-1) @ v + q


def mask_after_its_use(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.zeros(TOKENS, dtype=torch.bool)
    scores = (q @ k.transpose(-1, -2)).masked_fill(hidden, -torch.inf)
    hidden.fill_(True)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    "attend",
    [
        weights_after, weights_through_a_view, logits_after, keys_after_their_product,
        queries_after_their_product, mask_after_its_use,
    ],
)  # fmt: skip
def test_stays_dense_and_right(attend: Attend) -> None:
    model = odd(lambda self, x: merged(attend(*self.qkv(self.tokens(x)))))
    (site,) = left(model, latents())
    assert not site.rewritten


def in_place_all_along(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    scores *= 0.25
    scores -= scores.amax(-1, keepdim=True)
    return scores.softmax(-1) @ v


def changed_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.clone(), k.clone()
    q.mul_(0.5)
    k.mul_(0.5)
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


@pytest.mark.parametrize("attend", [in_place_all_along, changed_before])
def test_writes_that_are_steps_or_come_before_do_not_matter(attend: Attend) -> None:
    def forward(self: Odd, x: Tensor) -> Tensor:
        return merged(attend(*self.qkv(self.tokens(x))))

    model = odd(forward)
    got, sites = run(model, latents(), density=1.0)
    assert [(site.rewritten, site.explanation) for site in sites] == [(True, None)]
    torch.testing.assert_close(got, model(latents()), rtol=1e-5, atol=1e-5)
