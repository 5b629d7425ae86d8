import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veda_compile.kernels.layout import Extra, Layout, Video
from veda_compile.kernels.plan import factorisations
from veda_compile.kernels.tiles import tile_table

CPU = torch.device("cpu")


def test_a_ragged_grid_between_extra_tokens():
    table = tile_table(Layout.of(Extra(2), Video(1, 3, 3), Extra(1)), (1, 2, 2), CPU)
    assert table.rows.tolist() == [
        [2, 3, 5, 6],
        [4, 7, -1, -1],
        [8, 9, -1, -1],
        [10, -1, -1, -1],
    ]
    assert table.sizes.tolist() == [4, 2, 2, 1]
    assert table.tile_of_token.tolist() == [-1, -1, 0, 0, 1, 0, 0, 1, 2, 2, 3, -1]
    assert table.starts == (0, 4)
    assert table.extra.tolist() == [0, 1, 11]


def test_tiles_are_numbered_over_all_segments():
    table = tile_table(Layout.of(Video(1, 1, 3), Extra(1), Video(2, 1, 1)), (1, 1, 2), CPU)
    assert table.starts == (0, 2, 4)
    assert table.tiles == 4
    assert table.rows.tolist() == [[0, 1], [2, -1], [4, -1], [5, -1]]


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 3), (1, 4, 2)])
def test_a_tile_larger_than_the_grid(grid):
    table = tile_table(Layout.of(Video(*grid)), (4, 4, 4), CPU)
    tokens = math.prod(grid)
    assert table.sizes.tolist() == [tokens]
    assert table.rows[0].tolist() == list(range(tokens)) + [-1] * (64 - tokens)
    assert table.extra.numel() == 0


def test_tables_are_cached_and_int32():
    layout = Layout.of(Video(3, 4, 5), Extra(2))
    table = tile_table(layout, (2, 2, 2), CPU)
    assert tile_table(Layout.of(Video(3, 4, 5), Extra(2)), (2, 2, 2), CPU) is table
    for tensor in (table.rows, table.sizes, table.tile_of_token, table.extra):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        table = tile_table(Layout.of(Video(3, 4, 6), Extra(2)), (2, 2, 2), CPU)
    for tensor in (table.rows, table.sizes, table.tile_of_token, table.extra):
        assert tensor.device == CPU


videos = st.builds(Video, *[st.integers(1, 7)] * 3)
segments = st.lists(videos | st.builds(Extra, st.integers(1, 5)), min_size=1, max_size=4).filter(
    lambda found: any(isinstance(segment, Video) for segment in found)
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(segments, st.sampled_from([(1, 1, 1), (2, 3, 4), *factorisations(12)]))
def test_every_grid_token_is_in_the_tile_of_its_box(segments, shape):
    layout = Layout(tuple(segments))
    table = tile_table(layout, shape, CPU)
    boxes: dict[tuple[int, ...], list[int]] = {}  # tokens by (segment, box), found one by one
    extra, token = [], 0
    for number, segment in enumerate(segments):
        if isinstance(segment, Extra):
            extra += range(token, token + segment.length)
            token += segment.length
            continue
        for place in itertools.product(*map(range, segment.grid)):
            box = (number, *(at // side for at, side in zip(place, shape, strict=True)))
            boxes.setdefault(box, []).append(token)
            token += 1
    expected = [boxes[box] for box in sorted(boxes)]
    assert [[t for t in row if t >= 0] for row in table.rows.tolist()] == expected
    assert table.sizes.tolist() == list(map(len, expected))
    assert table.extra.tolist() == extra
    for tile, tokens in enumerate(expected):
        assert table.tile_of_token[tokens].unique().tolist() == [tile]
        assert (table.rows[tile, len(tokens) :] == -1).all()
