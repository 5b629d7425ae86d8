"""Static modes that cannot be are refused, naming the value and what it must be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from veda_compile import Plan, PlanError
from veda_compile.kernels.static_modes import (
    StaticMode,
    decode_modes,
)

FULL = StaticMode("full")

INVALID = {
    "kind": (lambda: StaticMode("window"), "'window': must be one of full, skip, diagonal"),
    "reach-negative": (lambda: StaticMode("diagonal", (-1, 0)), "(-1, 0): must be two ints"),
    "reach-float": (lambda: StaticMode("diagonal", (1.5, 0)), "(1.5, 0): must be two ints"),
    "reach-bool": (lambda: StaticMode("diagonal", (True, 0)), "(True, 0)"),
    "reach-three": (lambda: StaticMode("diagonal", (1, 0, 0)), "(1, 0, 0)"),
    "reach-unread": (lambda: StaticMode("diagonal", (1, 2)), "number 1 must be 0"),
    "reach-of-full": (lambda: StaticMode("full", (1, 0)), "number 0 must be 0"),
    "reach-of-stripe": (lambda: StaticMode("stripe", (1, 0), ((0, 0, 0),)), "number 0 must be 0"),
    "no-columns": (lambda: StaticMode("stripe"), "0 columns with mode 'stripe': must be 1 to 64"),
    "65-columns": (lambda: StaticMode("stripe", columns=((0.0, 0.0, 0.0),) * 65), "65 columns"),
    "columns-of-skip": (lambda: StaticMode("skip", columns=((0, 0, 0),)), "must be none"),
    "column-two": (lambda: StaticMode("stripe", columns=((0.0, 0.5),)), "(0.0, 0.5): must be"),
    "column-one": (lambda: StaticMode("stripe", columns=((0.0, 0.0, 1.0),)), "below 1"),
    "column-near-one": (lambda: StaticMode("stripe", columns=((0, 0, 1 - 1e-12),)), "below 1"),
    "column-negative": (lambda: StaticMode("stripe", columns=((0.0, -0.1, 0.0),)), "at least 0"),
    "column-nan": (lambda: StaticMode("stripe", columns=((math.nan, 0.0, 0.0),)), "nan"),
    "column-huge": (lambda: StaticMode("stripe", columns=((1e300, 0.0, 0.0),)), "1e+300"),
    "columns-list": (lambda: StaticMode("stripe", columns=[(0, 0, 0)]), "must be a tuple"),
    "modes-few": (lambda: Plan(((1, 8, 8),) * 2, (0.2,) * 2, modes=(FULL,)), "each of 2 heads"),
    "modes-text": (lambda: Plan(((1, 8, 8),), (0.2,), modes=("full",)), "must be a StaticMode"),
    "modes-dtype": (lambda: decode_modes(torch.zeros(2, 3), None), "torch.float32 of shape (2, 3)"),
    "modes-shape": (lambda: decode_modes(torch.zeros(3, dtype=torch.int32), None), "shape (3,)"),
    "columns-alone": (lambda: decode_modes(None, torch.zeros(1, 1, 3)), "columns without modes"),
    "columns-heads": (lambda: decode_modes(codes(3, 0, 0), torch.zeros(2, 1, 3)), "(1, C, 3)"),
    "columns-dtype": (lambda: decode_modes(codes(3, 0, 0), codes(0)), "must be torch.float32"),
    "kind-6": (lambda: decode_modes(codes(6, 0, 0), None), "mode 6: must be from 0 to 5"),
    "kind-negative": (lambda: decode_modes(codes(-1, 0, 0), None), "mode -1"),
    "scored-reach": (lambda: decode_modes(codes(0, 1, 0), None), "of a scored head"),
    "scored-column": (lambda: decode_modes(codes(0, 0, 0), torch.zeros(1, 1, 3)), "scored head"),
    "stripe-without": (lambda: decode_modes(codes(5, 0, 0), None), "0 columns"),
    "column-half-used": (
        lambda: decode_modes(codes(5, 0, 0), torch.tensor([[[0.5, -1.0, 0.5]]])),
        "(0.5, -1.0, 0.5)",
    ),
}


def codes(*numbers: int) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.int32)


@pytest.mark.parametrize(("make", "named"), INVALID.values(), ids=INVALID)
def test_what_cannot_be_is_refused(make: Any, named: str) -> None:
    with pytest.raises(PlanError) as caught:
        make()
    assert named in str(caught.value) and "\n" not in str(caught.value)
