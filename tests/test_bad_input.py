"""Bad input through torch.compile: one clear error each, and nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distinct_sidecars import distinct_plans, refused, save_sidecar
from sidecar_samples import file_parts, write_parts
from small_transformers import QUICK, Grid, distance, run, wan, wan_inputs
from torch.nn.functional import scaled_dot_product_attention

import veda_compile
from veda_compile.errors import OptionsError, SidecarError, VedaError

pytestmark = pytest.mark.usefixtures("fresh_compiler")

GRID: Grid = (4, 8, 12)
LAYERS = [f"blocks.{i}.attn1" for i in range(2)]


class Packed(torch.nn.Module):
    """A video that comes in as one sequence, without positions: only the option tells its grid."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(32, 32).requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        heads = self.project(tokens).unflatten(2, (2, 16)).transpose(1, 2)
        return scaled_dot_product_attention(heads, heads, heads)


class OneLayer(Packed):
    """The least that shows a video: one attention over the T, H and W of a latent."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return super().forward(latent.flatten(2).transpose(1, 2))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests run in an empty folder, with empty home and temporary ones: all must stay empty."""
    folders = [tmp_path / name for name in ("cwd", "home", "tmp")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.chdir(folders[0])
    monkeypatch.setenv("HOME", str(folders[1]))
    monkeypatch.setenv("TMPDIR", str(folders[2]))
    yield
    assert [os.listdir(folder) for folder in folders] == [[], [], []]


def compile_one(**options: Any) -> torch.Tensor:
    call = torch.compile(OneLayer(), backend="veda", options={**QUICK, **options})
    out: torch.Tensor = call(torch.randn(1, 32, *GRID))
    return out


BAD_OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown-key": ({"densty": 0.2}, ("densty", "did you mean 'density'")),
    "density-text": ({"density": "0.2"}, ("density", "'0.2'", "above 0 and at most 1")),
    "density-zero": ({"density": 0.0}, ("density", "0.0")),
    "density-nan": ({"density": float("nan")}, ("density", "nan")),
    "density-tensor": ({"density": torch.ones(3)}, ("density", "Tensor of shape (3,)")),
    "tile-size": ({"tile_size": 96}, ("tile_size", "96", "64, 128")),
    "min-tokens": ({"min_tokens": -1}, ("min_tokens", "-1")),
    "grid-of-two": ({"grid": (8, 12)}, ("grid", "(8, 12)", "(T, H, W)")),
    "executor": ({"executor": "gpu"}, ("executor", "'gpu'", "reference, cpu, triton")),
    "score": ({"score": "best"}, ("score", "'best'")),
    "strict": ({"strict": 1}, ("strict", "True or False")),
    "inner": ({"inner": "inductr"}, ("inner", "did you mean 'inductor'")),
    "mode": ({"mode": "fast"}, ("mode", "'fast'", "max-autotune")),
    "mode-and-inner": ({"mode": "max-autotune", "inner": "eager"}, ("mode", "inner")),
    "dense-layers": ({"dense_layers": "blocks.0"}, ("dense_layers", "blocks.0", "tuple")),
    "sidecar-type": ({"sidecar": 3}, ("sidecar", "3", "path")),
}


@pytest.mark.parametrize(("options", "named"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(options: dict[str, Any], named: tuple[str, ...]) -> None:
    with refused(OptionsError, *named):
        compile_one(**options)
    assert veda_compile.report().sites == []


def test_a_grid_that_contradicts_the_graph_is_not_used() -> None:
    """Reported; under strict refused. The numbers are those of dense attention, bit for bit."""
    torch.manual_seed(0)
    latent = torch.randn(1, 32, *GRID)
    options = {**QUICK, "density": 0.3, "grid": (4, 12, 8)}
    out = torch.compile(OneLayer(), backend="veda", options=options)(latent)
    assert torch.equal(out, OneLayer()(latent))
    (site,) = veda_compile.report().to_dict()["graphs"][0]["sites"]
    assert site["reason"] == "GRID_CONTRADICTED"
    assert "4x8x12" in site["explanation"] and "4x12x8" in site["explanation"]
    torch.compiler.reset()
    with refused(veda_compile.StrictError, "4x12x8"):
        compile_one(grid=(4, 12, 8), strict=True)


def test_a_grid_that_does_not_multiply_out() -> None:
    tokens = torch.randn(1, 384, 32)
    options = {**QUICK, "density": 0.3, "grid": (4, 8, 11)}
    out = torch.compile(Packed(), backend="veda", options=options)(tokens)
    assert torch.equal(out, Packed()(tokens))
    (site,) = veda_compile.report().to_dict()["graphs"][0]["sites"]
    assert (site["verdict"], site["reason"]) == ("left", "NO_GRID")
    assert "384 tokens" in site["explanation"]
    torch.compiler.reset()
    with refused(veda_compile.StrictError, "384 tokens", "grid=(T, H, W)"):
        strict = {**options, "strict": True}
        torch.compile(Packed(), backend="veda", options=strict)(tokens)


def test_a_given_grid_is_not_applied_to_another_length() -> None:
    """A second length under the same option: nothing is computed on a grid that does not fit."""
    options = {**QUICK, "density": 0.3, "grid": GRID}
    call = torch.compile(Packed(), backend="veda", options=options, dynamic=False)
    first, second = (torch.randn(1, n, 32) for n in (384, 320))
    assert distance(call(first), Packed()(first)) > 1e-3
    assert torch.equal(call(second), Packed()(second))


def test_a_given_grid_and_a_dynamic_length() -> None:
    options = {**QUICK, "density": 0.3, "grid": GRID}
    call = torch.compile(Packed(), backend="veda", options=options, dynamic=True)
    first, second = (torch.randn(1, n, 32) for n in (384, 320))
    assert distance(call(first), Packed()(first)) > 1e-3
    with refused(VedaError, "384", "320"):
        call(second)


def edit(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]) -> Any:
    def apply(path: Path) -> None:
        document, tensors = file_parts(path)
        change(document, tensors)
        write_parts(path, document, tensors)

    return apply


def fill(tensor: torch.Tensor, value: float) -> None:
    tensor.view(-1)[0] = value


def shorten(tensors: dict[str, torch.Tensor], part: str) -> None:
    name = next(name for name in tensors if part in name)
    tensors[name] = tensors[name][:, :1].clone()


BAD_SIDECARS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing": (lambda path: path.unlink(), ("No such file",)),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), ("bytes",)),
    "empty": (lambda path: path.write_bytes(b""), ("no safetensors file",)),
    "version": (edit(lambda d, _: d.update(version=99)), ("99", "2")),
    "nan": (
        edit(lambda d, t: fill(next(t[n] for n in t if "density" in n), float("nan"))),
        ("nan", "above 0 and at most 1"),
    ),
    "shapes": (edit(lambda d, t: shorten(t, "density")), ("shape (1, 1)", "(1, 2)")),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return wan(layers=2)


@pytest.fixture
def path(model: Any, tmp_path: Path) -> Path:
    where = tmp_path / "wan.veda.safetensors"
    save_sidecar(where, model, LAYERS, distinct_plans(2), [GRID])
    return where


@pytest.mark.parametrize("damage", BAD_SIDECARS)
def test_bad_sidecars(path: Path, damage: str) -> None:
    change, named = BAD_SIDECARS[damage]
    change(path)
    with refused(SidecarError, str(path), *named):
        compile_one(sidecar=str(path))
    assert veda_compile.report().sites == []


def test_a_sidecar_of_another_model(path: Path) -> None:
    """Head counts and widths tell as soon as a graph is compiled."""
    with refused(
        SidecarError, str(path), "WanTransformer3DModel", "2 heads of 16", "use a sidecar"
    ):
        compile_one(sidecar=str(path))


def test_a_sidecar_of_another_model_of_this_class(path: Path) -> None:
    larger = wan(layers=1, heads=4)
    options = {**QUICK, "sidecar": str(path)}
    call = torch.compile(larger, backend="veda", options=options)
    with refused(SidecarError, str(path), "2 heads of 24", "4 heads of 24"):
        run(call, wan_inputs(GRID))
