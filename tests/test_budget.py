import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from veda_compile.kernels.budget import kept_density, tiles_to_keep
from veda_compile.kernels.layout import Extra, Layout, Video
from veda_compile.kernels.plan import count_tiles, factorisations, ideal_tiles


def kept(layout, shape, density):
    return tiles_to_keep(layout, shape, density).tolist()


@pytest.mark.parametrize(
    ("video", "shape", "density", "expected"),
    [
        (Video(4, 4, 4), (2, 2, 2), 0.25, [2] * 8),
        # 2.4 each: the extra tile comes where 0.4 (r + 1) passes an integer
        (Video(4, 4, 4), (2, 2, 2), 0.3, [2, 2, 3, 2, 3, 2, 2, 3]),
        # 27 tokens are 4 ideal tiles but 8 ragged ones: 0.5 * 4 * 4 / 8 = 1
        (Video(3, 3, 3), (2, 2, 2), 0.5, [1] * 8),
        # 5 ideal tiles under both shapes: 0.4 * 25 = 10 pairs, whatever the padding
        (Video(5, 8, 8), (1, 8, 8), 0.4, [2] * 5),
        (Video(5, 8, 8), (4, 4, 4), 0.4, [1, 1, 1, 2, 1, 1, 1, 2]),
        # at least one, at most all
        (Video(4, 4, 4), (2, 2, 2), 1e-12, [1] * 8),
        (Video(1, 1, 1), (4, 4, 4), 0.1, [1]),
        (Video(3, 3, 3), (2, 2, 2), 1.0, [8] * 8),
        (Video(3, 3, 3), (2, 2, 2), 0.999, [1] + [2] * 7),  # 1.998 each; not yet everything
        # neither 0.1 * 30 nor thirds lose a tile to rounding
        (Video(30, 2, 4), (1, 2, 4), 0.1, [3] * 30),
        (Video(3, 2, 4), (1, 2, 4), 4 / 9, [1, 1, 2]),
        (Video(10, 2, 4), (1, 2, 4), 0.29, [2] + [3] * 9),
    ],
)
def test_numbers_worked_out_by_hand(video, shape, density, expected):
    assert kept(Layout.of(video), shape, density) == [[k] for k in expected]


def test_every_segment_has_a_budget_of_its_own():
    layout = Layout.of(Video(1, 8, 8), Extra(9), Video(4, 8, 8))
    # 1 and 4 tiles; half of 1 x 1, 1 x 4, 4 x 1 and 4 x 4 pairs
    assert kept(layout, (1, 8, 8), 0.5) == [[1, 2]] + [[1, 2]] * 4


def test_extra_tokens_cost_no_budget():
    video = Video(4, 4, 4)
    with_extra = tiles_to_keep(Layout.of(Extra(100), video), (2, 2, 2), 0.3)
    assert torch.equal(with_extra, tiles_to_keep(Layout.of(video), (2, 2, 2), 0.3))


def test_kept_density_is_the_share_of_pairs():
    assert kept_density(Layout.of(Video(4, 4, 4)), (2, 2, 2), 0.3) == 19 / 64
    assert kept_density(Layout.of(Video(3, 3, 3)), (2, 2, 2), 1.0) == 1.0


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        found = tiles_to_keep(Layout.of(Video(4, 5, 6)), (2, 2, 2), 0.37)
    assert found.device.type == "cpu"


sides = st.integers(1, 12)
some_layouts = st.lists(st.builds(Video, sides, sides, sides), min_size=1, max_size=3)
densities = st.sampled_from([0.05, 0.1, 0.25, 1 / 3, 0.29, 0.7, 0.95]) | st.floats(0.001, 0.999)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(some_layouts, st.sampled_from([8, 12, 64]), st.data())
def test_every_shape_buys_the_same_work(videos, size, data):
    shape = data.draw(st.sampled_from(factorisations(size)))
    density = data.draw(densities)
    found = tiles_to_keep(Layout(tuple(videos)), shape, density)
    exact = Fraction(density).limit_denominator(10**9)
    counts = [count_tiles(video.grid, shape) for video in videos]
    assert found.shape == (sum(counts), len(videos))
    assert found.dtype == torch.int32
    for rows, q_video, q_tiles in zip(found.split(counts), videos, counts, strict=True):
        for column, k_video, k_tiles in zip(rows.T, videos, counts, strict=True):
            pairs = exact * ideal_tiles(q_video, size) * ideal_tiles(k_video, size)
            assert 1 <= column.min() <= column.max() <= k_tiles
            if pairs < q_tiles:
                assert column.tolist() == [1] * q_tiles  # only the at-least-one rule
            else:
                assert int(column.sum()) == math.floor(pairs)
                assert_spread_evenly(column)


def assert_spread_evenly(column):
    """Any two runs of equally many neighbours hold the same number of tiles, give or take one."""
    sums = torch.cat([torch.zeros(1, dtype=torch.int64), column.cumsum(0)])
    for length in range(1, len(column) + 1):
        windows = sums[length:] - sums[:-length]
        assert windows.max() - windows.min() <= 1


@settings(deadline=None, derandomize=True, max_examples=30)
@given(some_layouts, densities, densities)
def test_more_density_keeps_more(videos, one, other):
    layout = Layout(tuple(videos))
    low, high = sorted((one, other))
    assert kept_density(layout, (2, 2, 2), low) <= kept_density(layout, (2, 2, 2), high)
