"""`attach`: which grid a call of a model tells, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_transformers import Grid
from torch import nn

import veda_compile
from veda_compile.errors import OptionsError
from veda_compile.told import told_grids


def test_models_inside_one_another_and_errors_on_the_way() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, fail: bool) -> list[Any]:
            return [told_grids(), self.inner(fail), told_grids()]

    class Inner(nn.Module):
        def forward(self, fail: bool) -> Any:
            if fail:
                raise RuntimeError
            return told_grids()

    outer = Outer()
    veda_compile.attach(outer, (1, 2, 3))
    veda_compile.attach(outer.inner, lambda fail: [(4, 5, 6), (7, 8, 9)])
    expected = [((1, 2, 3),), ((4, 5, 6), (7, 8, 9)), ((1, 2, 3),)]
    assert outer(False) == expected
    with pytest.raises(RuntimeError):
        outer(True)
    assert told_grids() is None
    assert outer(False) == expected


class Configured(nn.Module):
    """Reads the grid that it was told, as a compiled block would."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = type("Config", (), config)()

    def forward(
        self, hidden_states: torch.Tensor, num_frames: Any = None, height: Any = None,
        width: Any = None,
    ) -> Any:  # fmt: skip
        return told_grids()


@pytest.mark.parametrize(("config", "call", "expected"), [
    ({"patch_size": (1, 2, 2), "in_channels": 16}, {"shape": (1, 16, 5, 12, 20)}, (5, 6, 10)),
    ({"patch_size": 2, "in_channels": 16}, {"shape": (1, 5, 16, 12, 20)}, (5, 6, 10)),
    ({"patch_size": 2, "patch_size_t": 2, "in_channels": 16}, {"shape": (1, 6, 16, 12, 20)},
     (3, 6, 10)),
    ({"patch_size": (1, 2, 2), "in_channels": 3}, {"shape": (1, 5, 12, 20, 3)}, (5, 6, 10)),
    ({"patch_size": 2, "in_channels": 33, "out_channels": 16}, {"shape": (1, 16, 5, 12, 20)},
     (5, 6, 10)),
    ({"patch_size": 1, "patch_size_t": 1},
     {"shape": (1, 300, 8), "num_frames": 5, "height": 6, "width": 10}, (5, 6, 10)),
    ({"patch_size": 1}, {"shape": (1, 299, 8), "num_frames": 5, "height": 6, "width": 10}, None),
    ({"patch_size": 1}, {"shape": (1, 300, 8)}, None),
    # 16 channels, or 16 columns
    ({"patch_size": 1, "in_channels": 16}, {"shape": (1, 16, 5, 12, 16)}, None),
    ({"patch_size": 1, "in_channels": 4}, {"shape": (1, 16, 5, 12, 20)}, None),
])  # fmt: skip
def test_the_grid_by_the_model_and_its_arguments(
    config: dict[str, Any], call: dict[str, Any], expected: Grid | None
) -> None:
    model = Configured(**config)
    veda_compile.attach(model)
    latent = torch.zeros(call.pop("shape"))
    assert model(latent, **call) == model(hidden_states=latent, **call)
    assert model(latent, **call) == (None if expected is None else (expected,))


@pytest.mark.parametrize("grid", ["automatic", (1, 2), (1, 2, 0), (1, 2, 3.0), [], [(1, 2, 3), 4]])
def test_what_is_no_grid(grid: Any) -> None:
    with pytest.raises(OptionsError):
        veda_compile.attach(nn.Identity(), grid)
    model = nn.Identity()
    if not isinstance(grid, str):
        veda_compile.attach(model, lambda *_: grid)
        with pytest.raises(OptionsError):
            model(torch.ones(1))


def test_models_that_cannot_tell_their_grid() -> None:
    with pytest.raises(OptionsError, match="Identity"):
        veda_compile.attach(nn.Identity())
