"""Every remedy that a report names works: applied as it is worded, it makes the call sparse."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from broken_models import Broken, nothing, other_tensors
from broken_models import latent as patched
from test_packed_verdicts import Packed, packed, positions, sequence
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from toys import GRID, TOKENS, Attention, Video, latents, toy
from trials import Trial, changed, check, frozen

import veda_compile
from benchmarks.zoo import entry
from benchmarks.zoo.measure import Setup
from benchmarks.zoo.measure import run as run_entry
from veda_compile.kernels import cpu
from veda_compile.kernels.executors import YES, Answer, Traits
from veda_compile.passes.reasons import Reason
from veda_compile.sidecar import LayerCard, Sidecar

pytestmark = pytest.mark.usefixtures("fresh_compiler")

sdpa = F.scaled_dot_product_attention


PACKED = Trial(packed, lambda: (sequence(),))
TOY = Trial(toy, lambda: (latents(),))


def tell(*_: Any, **__: Any) -> tuple[int, int, int]:
    return GRID


@pytest.mark.parametrize(
    "cure",
    [
        changed(PACKED, options={"grid": GRID}),
        changed(PACKED, prepare=lambda fn: veda_compile.attach(fn, grid=tell)),
    ],
    ids=["option", "attach"],
)
def test_no_grid(cure: Trial) -> None:
    check("NO_GRID", "give options=dict(grid=(T, H, W)) in tokens, or call veda_compile.attach",
          PACKED, cure)  # fmt: skip


class Scrambled(Video):
    """Tokens in the order that the data give, or in their own."""

    sort = True

    def tokens(self, x: Tensor) -> Tensor:
        x = super().tokens(x)
        return x[:, x[0].sum(-1).argsort()] if self.sort else x


def test_operations_that_were_not_followed() -> None:
    class Plain(Scrambled):
        sort = False

    trial = changed(TOY, model=lambda: frozen(Scrambled(sdpa)))
    check("NO_PROVENANCE", "write them with plain torch operations",
          trial, changed(trial, model=lambda: frozen(Plain(sdpa))))  # fmt: skip


class Whole(Broken):
    """The same projections and attention in one graph."""

    def forward(self, x: Tensor) -> Tensor:
        return sdpa(*self.project(x))


@pytest.mark.parametrize(
    ("phrase", "model"),
    [
        ("keep projections and attention in one graph", lambda: frozen(Whole(nothing))),
        ("let neither eager code", lambda: frozen(Broken(nothing))),
    ],
)
def test_eager_code_between_projections_and_attention(phrase: str, model: Any) -> None:
    trial = Trial(lambda: frozen(Broken(other_tensors)), lambda: (patched(),))
    check("NO_PROVENANCE", phrase, trial, changed(trial, model=model))


class Pieces(nn.Module):
    """A block whose keys come half from one argument, half from another with the same tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(sdpa)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return self.attention(x, torch.cat([x[:, :half], y[:, half:]], 1))


class OfPieces(Video):
    def __init__(self) -> None:
        super().__init__(sdpa)
        self.blocks = nn.ModuleList([Pieces()])

    def step(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x, x * 0.5)


def test_tokens_that_differ_in_the_block_alone() -> None:
    trial = changed(TOY, model=lambda: frozen(OfPieces()), blocks="blocks")
    check("TOKENS_DIFFER", "compile the whole model instead of its blocks",
          trial, changed(trial, blocks=None))  # fmt: skip


@pytest.mark.parametrize("name", ["sana wm", "sana wm frames"])
def test_camera_attention_block_by_block(name: str) -> None:
    """Rays turn queries by one matrix, keys and values by another, all inputs of the block."""
    known = entry(name)
    left = run_entry(known, Setup(GRID, 2, regional=True), density=1.0).sites
    (site,) = [site for site in left if site.reason == "TOKENS_DIFFER"]
    assert "compile the whole model instead of its blocks" in str(site.remedy)
    whole = run_entry(known, Setup(GRID, 2), density=1.0)
    assert whole.layouts == list(known.layouts(GRID))


@pytest.mark.parametrize("options", [{}, {"grid": GRID}], ids=["left out", "corrected"])
def test_an_option_that_is_contradicted(options: dict[str, Any]) -> None:
    trial = changed(TOY, options={"grid": (4, 3, 6)})
    check("GRID_CONTRADICTED", "leave out option `grid`, or correct it",
          trial, changed(trial, options=options))  # fmt: skip


class Steered(Packed):
    """Positions beside a latent."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        return super().forward(x.flatten(2).transpose(1, 2), positions)


def test_positions_of_another_grid() -> None:
    torch.manual_seed(0)
    trial = Trial(lambda: frozen(Steered()), lambda: (latents(), positions(4, 3, 6)))
    check("GRID_CONTRADICTED", "positions (rotary tables, coordinates) of a 3x4x6 grid",
          trial, changed(trial, args=lambda: (latents(), positions(*GRID))))  # fmt: skip


def test_packed_tokens_out_of_order() -> None:
    mixed = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    trial = changed(PACKED, args=lambda: (sequence(), positions(*GRID)[mixed]))
    check("TOKEN_ORDER", "hand the tokens over in raster order",
          trial, changed(trial, args=lambda: (sequence(), positions(*GRID))))  # fmt: skip


class Columns(Video):
    """Tokens frame by frame, column by column."""

    def tokens(self, x: Tensor) -> Tensor:
        return super().tokens(x.mT)


@pytest.mark.parametrize("cure", [{"dynamic": False}, {"model": toy}], ids=["fixed", "raster"])
def test_another_order_under_symbolic_sizes(cure: dict[str, Any]) -> None:
    trial = changed(TOY, model=lambda: frozen(Columns(sdpa)), dynamic=True)
    check("TOKEN_ORDER", "compile with dynamic=False, or hand the tokens over in raster order",
          trial, changed(trial, **cure))  # fmt: skip


def flipped_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (torch.cat([x[:, :1], x[:, 1:].flip(2)], 1) for x in (q, k, v))
    return sdpa(q, k, v)


def test_another_order_in_every_head() -> None:
    check("TOKEN_ORDER", "the same in every head", changed(TOY, model=lambda: toy(flipped_head)),
          TOY)  # fmt: skip


def masked(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, attn_mask=mask)


SHOWN = torch.arange(TOKENS) < TOKENS - 5


@pytest.mark.parametrize("mask", [SHOWN[None, None, None], None], ids=["boolean", "none"])
def test_a_mask_that_is_added(mask: Tensor | None) -> None:
    added = torch.where(SHOWN, 0.0, -1e9)[None, None, None].expand(1, 1, TOKENS, TOKENS)
    cure = toy if mask is None else lambda: toy(partial(masked, mask))
    check("MASK_NOT_A_KEY_LENGTH", "as a boolean mask of shape (B, 1, 1, keys)",
          changed(TOY, model=lambda: toy(partial(masked, added))),
          changed(TOY, model=cure))  # fmt: skip


def blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    near = create_block_mask(lambda b, h, i, j: i - j < 90, None, None, TOKENS, TOKENS, q.device)
    return flex_attention(q, k, v, block_mask=near)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "cure", [flex_attention, partial(masked, SHOWN[None, None, None])], ids=["none", "sdpa"]
)
def test_a_block_mask(cure: Any) -> None:
    check("BLOCK_MASK", "give flex_attention no block_mask",
          changed(TOY, model=lambda: toy(blocked)),
          changed(TOY, model=lambda: toy(cure)))  # fmt: skip


class Dropping(Video):
    def __init__(self) -> None:
        super().__init__(self.attend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, dropout_p=0.25 if self.training else 0.0)


def test_dropout() -> None:
    trial = changed(TOY, model=lambda: Dropping().requires_grad_(False))
    check("DROPOUT", "call model.eval()", trial, changed(trial, prepare=lambda fn: fn.eval()))


def test_a_dtype_the_executor_does_not_take() -> None:
    trial = changed(TOY, model=lambda: toy().double(), args=lambda: (latents().double(),))
    half = changed(TOY, model=lambda: toy().bfloat16(), args=lambda: (latents().bfloat16(),))
    check("DTYPE", "run the model in bfloat16 or float16", trial, half)


def test_a_head_dim_the_executor_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_64(_: object, traits: Traits) -> Answer:
        return YES if traits.head_dim == 64 else Answer(False, f"head_dim {traits.head_dim}")

    monkeypatch.setattr(cpu.CpuExecutor, "verify", only_64)
    check("HEAD_DIM", "choose another executor with options={'executor': ...}",
          TOY, changed(TOY, options={"executor": "reference"}))  # fmt: skip


def test_the_user_s_own_choices() -> None:
    few = changed(TOY, options={"min_tokens": "auto"})
    check("TOO_FEW_TOKENS", "options={'min_tokens': 0}", few, TOY)
    long = changed(TOY, args=lambda: (latents((8, 16, 16)),), options={"min_tokens": "auto"})
    low = changed(long, options={"min_tokens": "auto", "density": 0.1})
    check("DENSITY_TOO_HIGH", "keep less", long, low)
    named = changed(TOY, options={"dense_layers": (0,)})
    check("DENSE_LAYER", "take the layer out of option `dense_layers`", named, TOY)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients(mode: Any) -> None:
    trial = changed(TOY, model=lambda: toy().requires_grad_(True), mode=torch.enable_grad)
    check("REQUIRES_GRAD", "run under torch.no_grad() or torch.inference_mode()",
          trial, changed(trial, mode=mode))  # fmt: skip


def sidecar(path: Path, layers: int) -> dict[str, Any]:
    """The option that names a sidecar of the first layers of a toy."""
    cards = [LayerCard(f"blocks.{i}", 2, 16) for i in range(layers)]
    Sidecar.uniform("Video", cards, GRID, (1, 8, 8), 1.0).save(path)
    return {"sidecar": str(path)}


def test_a_sidecar_without_a_plan_for_the_layer(tmp_path: Path) -> None:
    three = changed(TOY, model=partial(toy, layers=3))
    check("NO_PLAN", "make the sidecar anew for this model",
          changed(three, options=sidecar(tmp_path / "2.veda.safetensors", 2)),
          changed(three, options=sidecar(tmp_path / "3.veda.safetensors", 3)))  # fmt: skip


WITH_TEST_ELSEWHERE = {
    Reason.UNPROVEN_SIZES, Reason.LAYER_UNKNOWN, Reason.HEAD_SPLIT_UNPROVEN, Reason.SEGMENTS,
}  # fmt: skip
"""test_whole_models, test_broken_layers, test_sidecar_verdicts and test_segments."""


def test_all_remedies_are_tried() -> None:
    source = Path(__file__).read_text()
    tried = {reason for reason in Reason if f'check("{reason.name}"' in source}
    assert {reason for reason in Reason if reason.remedy} == tried | WITH_TEST_ELSEWHERE
