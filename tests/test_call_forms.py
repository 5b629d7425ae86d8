"""Attention behind modules, contexts and spellings: rewritten, and equal to the model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiling import compiled, run
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from toys import GRID, TOKENS, Attend, latents, toy

import veda_compile

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class MultiHead(nn.Module):
    """nn.MultiheadAttention as a block of `Video`. options: of the module; call: of its call."""

    def __init__(self, call: dict[str, Any], first: bool = True, **options: Any) -> None:
        super().__init__()
        self.norm, self.call, self.first = nn.LayerNorm(32), call, first
        self.attention = nn.MultiheadAttention(32, 2, batch_first=first, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x) if self.first else self.norm(x).transpose(0, 1)
        out: Tensor = self.attention(x, x, x, **self.call)[0]
        return out if self.first else out.transpose(0, 1)


class Shifted(MultiHead):
    """Queries and keys with positions added, values without."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        positions = torch.arange(TOKENS)[:, None] / TOKENS
        return self.attention(x + positions, x + positions, x, need_weights=False)[0]


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def video_of(make: Callable[[], nn.Module], layers: int = 2) -> Any:
    model = toy()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model.blocks = nn.ModuleList(make() for _ in range(layers))
        for name, parameter in model.blocks.named_parameters():
            if "in_proj" in name:  # sharp attention: an error must not hide
                parameter.data.mul_(3.0).add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def padding() -> Tensor:
    hidden = torch.zeros(2, TOKENS, dtype=torch.bool)
    hidden[0, 60:], hidden[1, 50:] = True, True
    return hidden


QUIET = {"need_weights": False}


@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiHead(QUIET),
        lambda: MultiHead({}),
        lambda: MultiHead(QUIET, first=False),
        lambda: MultiHead(QUIET, bias=False),
        lambda: MultiHead({**QUIET, "key_padding_mask": padding()}),
        lambda: MultiHead({"key_padding_mask": padding()}),
        lambda: MultiHead(QUIET, kdim=32, vdim=32),
        lambda: Shifted({}),
        lambda: Encoder(norm_first=True),
        lambda: Encoder(activation="gelu"),
        lambda: Encoder(norm_first=True, bias=False),
    ],
    ids=[
        "plain", "weights unused", "sequence first", "no bias", "padding",
        "padding, weights unused", "separate", "positions", "pre-norm", "post-norm gelu",
        "layer without biases",
    ],
)  # fmt: skip
def test_modules_of_torch_are_taken_apart(make: Callable[[], nn.Module]) -> None:
    model, x = video_of(make), latents(batch=2)
    dense = model(x)
    for inner in ("eager", "aot_eager"):
        out, sites = run(model, x, inner=inner)
        assert [site.grid for site in sites if site.rewritten] == [GRID] * 2, sites
        torch.testing.assert_close(out, dense, atol=2e-5, rtol=0.0)
    sparse, _ = run(model, x, density=0.3)
    assert (sparse - dense).abs().max() > 1e-3


class Weighing(MultiHead):
    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.attention(x, x, x)
        return out * weights.amax(-1, keepdim=True)


@pytest.mark.parametrize(
    ("make", "reason", "words"),
    [
        (lambda: Weighing({}), "OUTPUT_USED", "extra output"),
        (lambda: MultiHead(QUIET, add_bias_kv=True), "PLAIN_SOFTMAX", "bias_k"),
        (lambda: MultiHead(QUIET, add_zero_attn=True), "PLAIN_SOFTMAX", "add_zero_attn"),
        (lambda: MultiHead({**QUIET, "attn_mask": torch.ones(TOKENS, TOKENS).triu(1).bool()}),
         "MASK_NOT_A_KEY_LENGTH", "outside the graph"),
    ],
)  # fmt: skip
def test_modules_that_do_more_stay(make: Callable[[], nn.Module], reason: str, words: str) -> None:
    model, x = video_of(make), latents(batch=2)
    out, sites = run(model, x)
    assert [site.reason for site in sites] == [reason] * 2
    assert all(words in str(site.explanation) for site in sites)
    torch.testing.assert_close(out, model(x), atol=1e-5, rtol=0.0)


def test_dropout_of_a_module_in_training_stays() -> None:
    model = video_of(lambda: MultiHead(QUIET, dropout=0.1)).train()
    _, sites = run(model, latents())
    assert [site.reason for site in sites] == ["DROPOUT"] * 2


def test_gradients_of_a_modules_own_weights_count() -> None:
    model = video_of(lambda: MultiHead(QUIET)).requires_grad_(True)
    compiled(model)(latents()).sum().backward()
    assert [site.reason for site in veda_compile.report().sites] == ["REQUIRES_GRAD"] * 2


def one_backend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def several_backends(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=False)


def stable(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.einsum("...id,...jd->...ij", q * 0.5, k * 0.5).float()
    exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
    return ((exponentials / exponentials.sum(-1, keepdim=True)).to(v.dtype)) @ v


def divided_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.mT * q.shape[-1] ** -0.5
    exponentials = torch.exp(logits - logits.max(dim=-1, keepdim=True).values)
    return (exponentials @ v) / torch.sum(exponentials, -1, keepdim=True)


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads in the batch for the products, apart for the softmax."""
    batch, heads, tokens, _ = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    logits = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, tokens, tokens)
    weights = (logits / q.shape[-1] ** 0.5).softmax(-1).view(batch * heads, tokens, tokens)
    return torch.bmm(weights, v).unflatten(0, (batch, heads))


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ torch.softmax(k @ q.mT * 0.3, dim=-2)).mT


def repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :1].repeat_interleave(2, dim=1) for x in (k, v))
    return torch.softmax(q @ k.mT * 0.3, dim=-1, dtype=torch.float32) @ v


def expanded_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :1, None].expand(-1, 1, 2, -1, -1).flatten(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def padded_head_dim(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The default scale is that of the padded head_dim."""
    q, k, v = (F.pad(x, (0, 16)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[..., :16]


def recast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()).to(q.dtype)


def by_aten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention(q, k, v, scale=0.3)


FORMS: dict[str, Attend] = {
    form.__name__: form
    for form in (
        one_backend, several_backends, stable, divided_last, folded, keys_first, repeated_heads,
        expanded_heads, padded_head_dim, recast, by_aten,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_rewritten_and_equal(name: str) -> None:
    model, x = toy(FORMS[name]), latents(batch=2)
    dense = model(x)
    out, sites = run(model, x)
    assert [site.grid for site in sites if site.rewritten] == [GRID] * 2, sites
    tolerance = 2e-2 if name == "recast" else 2e-5
    torch.testing.assert_close(out, dense, atol=tolerance, rtol=0.0)
    sparse, _ = run(model, x, density=0.3, inner="aot_eager")
    assert (sparse - dense).abs().max() > 1e-3


def test_the_choice_of_backends_is_as_before_the_call() -> None:
    before = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    run(toy(one_backend), latents())
    after = torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()
    assert before == after == (True, True)


def test_clamped_logits_stay_and_say_so() -> None:
    model = toy(lambda q, k, v: torch.softmax((q @ k.mT).clamp(-3, 3), -1) @ v)
    x = latents()
    out, sites = run(model, x)
    assert [site.reason for site in sites] == ["PLAIN_SOFTMAX"] * 2
    assert "clamp" in str(sites[0].explanation)
    assert torch.equal(out, model(x))
