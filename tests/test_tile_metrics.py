"""Attention mass, retained mass and Tile Recall against their definitions."""

from __future__ import annotations

import pytest
import torch

from veda_compile.kernels.layout import Context, Extra, Layout, Video
from veda_compile.kernels.tiles import tile_table
from veda_compile.tile_metrics import TileMetricError, retained_mass, tile_mass, tile_recall


def test_mass_is_the_sum_of_probabilities_over_tile_pairs() -> None:
    layout, shape = Layout.of(Extra(3), Video(3, 5, 4), Context(2)), (2, 2, 2)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 63, 8, generator=generator)
    k = torch.randn(2, 2, 65, 8, generator=generator)
    valid = torch.ones(2, 65, dtype=torch.bool)
    valid[1, 40:50] = False
    mass = tile_mass(q, k, layout=layout, tile_shape=shape, scale=0.5, key_valid=valid)
    logits = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.5
    shares = logits.masked_fill(~valid[:, None, None], -torch.inf).softmax(-1)
    table = tile_table(layout, shape, q.device)
    assert mass.shape == (2, 4, table.tiles, table.tiles)
    for i in range(table.tiles):
        for j in range(table.tiles):
            part = shares[:, :, table.tile_of_query == i][..., table.tile_of_token == j]
            torch.testing.assert_close(mass[:, :, i, j], part.sum((-2, -1)))


def test_retained_mass_and_recall_of_a_map_worked_out_by_hand() -> None:
    mass = torch.tensor([[[4.0, 3.0, 2.0, 1.0], [0.0, 1.0, 2.0, 7.0]]])
    keep = torch.tensor([[[True, False, True, False], [False, False, True, True]]])
    assert float(retained_mass(mass, keep)) == pytest.approx(15 / 20)
    assert float(tile_recall(mass, keep)) == pytest.approx((1 / 2 + 1) / 2)
    nothing_in_one = keep & torch.tensor([True, False])[:, None]
    assert float(tile_recall(mass, nothing_in_one)) == pytest.approx(1 / 2)


def test_what_does_not_go_together_is_refused() -> None:
    mass = torch.ones(2, 3, 3)
    for keep in (torch.ones(3, 3, dtype=torch.bool), torch.ones(2, 3, 3)):
        with pytest.raises(TileMetricError):
            retained_mass(mass, keep)
    with pytest.raises(TileMetricError, match="no row"):
        tile_recall(mass, torch.zeros(2, 3, 3, dtype=torch.bool))
