"""Options: defaults, normalisation, and one clear error for everything else."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from veda_compile.errors import OptionsError, VedaError
from veda_compile.options import Options, tile_size_for


def test_defaults() -> None:
    assert Options.from_dict() == Options.from_dict({}) == Options()
    options = Options()
    assert options.sidecar == "auto" and options.density is None
    assert options.tile_size is None and options.grid is None and options.mode is None
    assert (options.score, options.executor, options.min_tokens) == ("auto", "auto", "auto")
    assert (options.dense_layers, options.strict, options.inner) == ((), False, "inductor")
    assert options.config_patches() == {}


def test_values_are_normalised_to_hashable_plain_data() -> None:
    options = Options.from_dict(
        {
            "sidecar": Path("model.veda.safetensors"),
            "density": np.float32(0.5),
            "tile_size": np.int64(64),
            "dense_layers": ["blocks.0.attn1", np.int32(3)],
            "grid": [np.int64(5), 16, 24],
            "min_tokens": np.int64(1000),
            "strict": True,
        }
    )
    plain = {type(value) for value in dataclasses.asdict(options).values()}
    assert plain <= {str, float, int, tuple, bool, type(None)}
    assert options.sidecar == "model.veda.safetensors"
    assert options.density == 0.5
    assert options.dense_layers == ("blocks.0.attn1", 3)
    assert [type(side) for side in options.grid or ()] == [int, int, int]
    same = dataclasses.replace(options)
    assert same == options and hash(same) == hash(options) and same is not options


def test_options_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().density = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("density", [1, 1.0, 0.001, Fraction(1, 2), np.float64(0.25)])
def test_densities_that_are_fine(density: Any) -> None:
    assert Options.from_dict({"density": density}).density == float(density)


BAD = [
    ("sidecar", 3, "3"),
    ("sidecar", b"a.veda.safetensors", "b'a.veda.safetensors'"),
    ("sidecar", "", "''"),
    ("density", 0, "0"),
    ("density", 0.0, "0.0"),
    ("density", -0.2, "-0.2"),
    ("density", 1.5, "1.5"),
    ("density", 20, "20"),
    ("density", 10**400, "1000"),
    ("density", float("nan"), "nan"),
    ("density", float("inf"), "inf"),
    ("density", True, "True"),
    ("density", "0.2", "'0.2'"),
    ("density", [0.2], "[0.2]"),
    ("density", torch.tensor(0.2), "a Tensor of shape ()"),
    ("density", lambda: 0.2, "lambda"),
    ("tile_size", 100, "100"),
    ("tile_size", 128.0, "128.0"),
    ("tile_size", True, "True"),
    ("tile_size", "128", "'128'"),
    ("score", "best", "'best'"),
    ("score", "projection", "'projection'"),
    ("score", None, "None"),
    ("score", ["mean"], "['mean']"),
    ("executor", "cuda", "'cuda'"),
    ("executor", torch.nn.ReLU(), "ReLU()"),
    ("dense_layers", "blocks.0.attn1", "'blocks.0.attn1'"),
    ("dense_layers", {"blocks.0.attn1"}, "{'blocks.0.attn1'}"),
    ("dense_layers", None, "None"),
    ("dense_layers", 3, "3"),
    ("dense_layers", [0, -1], "-1"),
    ("dense_layers", [0, ""], "dense_layers[1]"),
    ("dense_layers", [True], "True"),
    ("dense_layers", [torch.ones(2, 3)], "a Tensor of shape (2, 3)"),
    ("min_tokens", -1, "-1"),
    ("min_tokens", 1.5, "1.5"),
    ("min_tokens", True, "True"),
    ("min_tokens", "none", "'none'"),
    ("min_tokens", None, "None"),
    ("grid", (5, 16), "(5, 16)"),
    ("grid", (5, 16, 0), "(5, 16, 0)"),
    ("grid", (5, 16, 24.0), "(5, 16, 24.0)"),
    ("grid", (True, 16, 24), "(True, 16, 24)"),
    ("grid", "5x16x24", "'5x16x24'"),
    ("grid", 1920, "1920"),
    ("grid", torch.tensor([5, 16, 24]), "a Tensor of shape (3,)"),
    ("grid", np.array([5, 16, 24]), "array"),
    ("strict", 1, "1"),
    ("strict", None, "None"),
    ("strict", "yes", "'yes'"),
    ("mode", "fast", "'fast'"),
    ("mode", 3, "3"),
    ("inner", "nvfuser", "'nvfuser'"),
    ("inner", None, "None"),
]


@pytest.mark.parametrize(
    ("name", "value", "named"), BAD, ids=[f"{name}-{named[:20]}" for name, _, named in BAD]
)
def test_bad_values_give_one_error_that_names_them(name: str, value: Any, named: str) -> None:
    with pytest.raises(OptionsError) as caught:
        Options.from_dict({name: value})
    message = str(caught.value)
    assert f"option {name}" in message
    assert named in message
    assert "must be" in message
    assert "\n" not in message
    assert isinstance(caught.value, VedaError) and isinstance(caught.value, ValueError)


def test_unknown_keys_are_refused_with_the_known_ones() -> None:
    with pytest.raises(OptionsError, match=r"'densty' \(did you mean 'density'\?\).*tile_size"):
        Options.from_dict({"densty": 0.2})
    with pytest.raises(OptionsError, match=r"unknown option 3; known options: sidecar"):
        Options.from_dict({3: 0.2})  # type: ignore[dict-item]
    with pytest.raises(OptionsError, match=r"'max_autotune'"):
        Options.from_dict({"max_autotune": True})


@pytest.mark.parametrize("options", [[("density", 0.2)], "density", 0.2, torch.zeros(2)])
def test_options_must_be_a_mapping(options: Any) -> None:
    with pytest.raises(OptionsError, match="must be a dict"):
        Options.from_dict(options)


def test_mode_gives_the_settings_torch_compile_would_use() -> None:
    modes = torch._inductor.list_mode_options()
    for mode, settings in modes.items():
        options = Options.from_dict({"mode": mode})
        assert options.config_patches() == settings
        assert Options.from_dict(None, mode) == options == Options.from_dict({"mode": mode}, mode)
    with pytest.raises(OptionsError, match=r"option mode is 'fast'.*max-autotune-no-cudagraphs"):
        Options.from_dict(None, "fast")


def test_config_patches_are_a_copy() -> None:
    options = Options.from_dict(None, "max-autotune")
    options.config_patches().clear()
    assert options.config_patches()["max_autotune"] is True


def test_two_different_modes_are_refused() -> None:
    with pytest.raises(OptionsError, match=r"'default'.*'max-autotune'.*one of the two"):
        Options.from_dict({"mode": "max-autotune"}, "default")


def test_a_mode_without_inductor_is_refused() -> None:
    with pytest.raises(OptionsError, match=r"mode is 'max-autotune' and inner is 'eager'"):
        Options.from_dict({"inner": "eager"}, "max-autotune")
    assert Options.from_dict({"inner": "eager"}, "default").inner == "eager"


def test_a_misspelt_choice_is_suggested() -> None:
    with pytest.raises(OptionsError, match="did you mean 'triton'"):
        Options.from_dict({"executor": "trition"})


@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (16_383, 64), (16_384, 128), (75_600, 128)])
def test_tile_size_for(tokens: int, size: int) -> None:
    assert tile_size_for(tokens) == size
