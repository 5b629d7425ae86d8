"""Static modes: the key tiles they keep, and how tensors carry them."""

from __future__ import annotations

import pytest
import torch
from mode_samples import DIAGONAL, FULL, MODES, SKIP, kept_by
from naive_attention import boxes_of_tokens, naive_static

from veda_compile import Context, Extra, Layout, Plan, Video
from veda_compile.kernels.budget import kept_density
from veda_compile.kernels.plan import TileShape
from veda_compile.kernels.static_modes import (
    KINDS,
    StaticMode,
    decode_modes,
    encode_modes,
    mode_density,
    static_lists,
)

EVERY_MODE = pytest.mark.parametrize("mode", MODES, ids=lambda m: f"{m.kind}{m.reach}")
LAYOUTS = {
    "ragged": Layout.of(Video(5, 9, 13)),
    "one tile": Layout.of(Extra(2), Video(1, 2, 3)),
    "two videos": Layout.of(Extra(3), Video(4, 10, 7), Context(5), Video(3, 6, 11), Extra(1)),
}


@EVERY_MODE
@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 2, 16), (4, 1, 8)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_lists_are_the_rule(layout: Layout, shape: TileShape, mode: StaticMode) -> None:
    boxes = sorted({box for box in boxes_of_tokens(layout, shape) if box is not None})
    number = {box: i for i, box in enumerate(boxes)}
    segments = [[b for b in boxes if b[0] == s] for s in sorted({b[0] for b in boxes})]
    wanted = [
        [number[key] for keys in segments for key in naive_static(mode, box, own, keys)]
        for own in segments
        for box in own
    ]
    assert kept_by(layout, shape, mode) == wanted
    pairs = sum(map(len, wanted))
    assert mode_density(layout, shape, mode) == pairs / len(boxes) ** 2
    found = static_lists(layout, shape, mode)
    assert found.map().sum() == pairs and found.map()[0].nonzero()[:, 0].tolist() == wanted[0]
    assert static_lists(layout, shape, mode) is found  # made once


def test_lists_on_a_grid_one_can_see() -> None:
    """Tiles 0 to 11 in two frames of two rows of three."""
    layout, shape = Layout.of(Video(4, 8, 12)), (2, 4, 4)
    assert kept_by(layout, shape, StaticMode("diagonal", (1, 0)))[:3] == [
        [0, 1],
        [0, 1, 2],
        [1, 2, 3],
    ]
    assert kept_by(layout, shape, StaticMode("multi_diagonal", (1, 0)))[4] == [4, 10]
    assert kept_by(layout, shape, StaticMode("multi_diagonal", (1, 1)))[6] == [0, 1, 6, 7]
    assert kept_by(layout, shape, StaticMode("multi_diagonal", (0, 1)))[6] == [6, 7]
    stripe = StaticMode("stripe", columns=((0.5, 0.0, 2 / 3),))
    assert kept_by(layout, shape, stripe)[:2] == [[0, 8], [1, 8]]
    assert kept_by(layout, shape, stripe)[8] == [8]


def test_positions_are_the_simple_fractions_they_stand_for() -> None:
    """In float32 0.7 is a little less than 7/10."""
    layout = Layout.of(Video(1, 1, 320))
    for tile in range(10):
        mode = StaticMode("stripe", columns=((0.0, 0.0, tile / 10),))
        assert kept_by(layout, (1, 1, 32), mode)[0] == sorted({0, tile})


def test_a_second_segment_is_seen_from_the_proportional_place() -> None:
    layout, shape = Layout.of(Video(1, 1, 64), Video(1, 1, 128)), (1, 1, 16)
    kept = kept_by(layout, shape, StaticMode("diagonal"))
    assert kept[:4] == [[0, 5], [1, 7], [2, 9], [3, 11]]  # tiles 4 to 11 are the second segment
    assert kept[4:8] == [[0, 4], [0, 5], [1, 6], [1, 7]]


def test_full_is_density_one_and_densities_compare() -> None:
    layout, shape = LAYOUTS["ragged"], (2, 4, 4)
    assert mode_density(layout, shape, FULL) == kept_density(layout, shape, 1.0) == 1.0
    assert mode_density(layout, shape, SKIP) == 0.0
    wider = [mode_density(layout, shape, StaticMode("diagonal", (r, 0))) for r in range(4)]
    assert wider == sorted(set(wider))


def test_modes_come_back_from_tensors() -> None:
    modes = (None, *MODES, StaticMode("stripe", columns=((0.1, 0.2, 0.7),)))
    table, columns = encode_modes(modes)
    assert table is not None and (table.dtype, table.shape) == (torch.int32, (9, 3))
    assert columns is not None and (columns.dtype, columns.shape) == (torch.float32, (9, 2, 3))
    assert table[0].tolist() == [0, 0, 0] and bool((columns[0] == -1).all())
    assert table[1].tolist() == [KINDS.index("full") + 1, 0, 0]
    assert decode_modes(table, columns) == modes
    assert decode_modes(*encode_modes(modes, 5)) == modes
    assert encode_modes((None, DIAGONAL))[1] is None
    assert encode_modes(None) == (None, None) and decode_modes(None, None) is None
    assert Plan(((1, 8, 8),) * 2, (0.2, 0.2), modes=(None, None)).modes is None
