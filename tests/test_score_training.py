"""Trained scores: the loss ignores what top-k ignores, and training finds planted structure."""

from __future__ import annotations

import pytest
import torch

from veda_compile.score_training import Lesson, ScoreTrainer, lost_mass, maximum_kl
from veda_compile.second_order import SpreadMoments


def lesson(seed: int, heads: int = 2, m: int = 12, n: int = 24, dim: int = 8) -> Lesson:
    """Mass follows the tiles' maxima, which the mean alone does not show."""
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, m, 3 * dim, generator=draw)
    k = torch.randn(heads, n, 3 * dim, generator=draw)
    logits = q[..., :dim] @ k[..., dim : 2 * dim].transpose(1, 2)
    mass = torch.softmax(logits, -1)
    keep = torch.full((heads, m), 4)
    return Lesson(q, k, torch.zeros(heads, m, n), mass, mass, keep)


def retained(trainer: ScoreTrainer, given: Lesson) -> float:
    with torch.no_grad():
        top = trainer.scores(given).topk(4, -1).indices
    best = given.mass.topk(4, -1).values.sum(-1)
    return float((given.mass.gather(-1, top).sum(-1) / best).mean())


def test_loss_does_not_change_under_affine_maps_of_rows() -> None:
    given = lesson(0)
    scores = torch.randn(2, 12, 24, generator=torch.Generator().manual_seed(3))
    slope = torch.rand(2, 12, 1, generator=torch.Generator().manual_seed(4)) * 5 + 0.1
    moved = scores * slope + torch.randn(2, 12, 1, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(lost_mass(scores, given), lost_mass(moved, given), atol=1e-5)
    assert not torch.allclose(maximum_kl(scores, given), maximum_kl(moved, given), atol=1e-2)


def test_the_right_order_loses_little_and_the_reverse_much() -> None:
    given = lesson(0)
    right, reverse = lost_mass(given.mass.log(), given), lost_mass(-given.mass.log(), given)
    assert right < 0.2
    assert reverse > 0.8


def test_starts_as_the_closed_form_and_learns() -> None:
    train, test = [lesson(seed) for seed in range(40)], lesson(99)
    trainer = ScoreTrainer(2, 8, 1.0, torch.device("cpu"))
    assert torch.equal(
        trainer.scores(test), test.q[..., :8] @ test.k[..., :8].transpose(1, 2) + test.base
    )
    before = retained(trainer, test)
    first = trainer.step(train[:4])
    for step in range(1500):
        last = trainer.step(train[step % 37 : step % 37 + 4])
    assert last < first
    assert retained(trainer, test) > before + 0.05


def test_tiles_that_cannot_be_chosen_do_not_count() -> None:
    given = lesson(0)
    base = given.base.clone()
    base[..., 5] = -torch.inf
    closed = Lesson(given.q, given.k, base, given.mass, given.highest, given.keep)
    poisoned = given.mass.clone()
    poisoned[..., 5] = 100.0
    other = Lesson(given.q, given.k, base, poisoned, given.highest, given.keep)
    scores = torch.randn(2, 12, 24, generator=torch.Generator().manual_seed(3)) + base
    assert torch.equal(lost_mass(scores, closed), lost_mass(scores, other))
    assert torch.isfinite(lost_mass(scores, closed))


@pytest.mark.parametrize("loss", ["mass", "kl"])
def test_rows_without_tiles_to_choose_are_no_lesson(loss: str) -> None:
    given = lesson(0)
    empty = Lesson(*vars(given).values())
    object.__setattr__(empty, "keep", torch.zeros_like(given.keep))
    trainer = ScoreTrainer(2, 8, 1.0, torch.device("cpu"), loss)
    trainer.step([empty])
    assert torch.isfinite(trainer.weights).all()


def test_factors_of_full_rank_are_exact_up_to_row_shifts() -> None:
    draw = torch.Generator().manual_seed(0)
    moments = SpreadMoments(3, 8)
    for _ in range(4):
        second = torch.rand(2, 3, 50, 8, generator=draw)
        variance = torch.rand(2, 3, 50, 8, generator=draw)
        moments.add([0, 1, 2], second, variance)
    full = moments.factors(8)
    true = second @ variance.transpose(-1, -2)
    got = (second @ full[0]) @ (variance @ full[1]).transpose(-1, -2)

    def centred(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True)

    torch.testing.assert_close(centred(got), centred(true), rtol=1e-3, atol=1e-4)


def test_low_rank_factors_beat_other_projections_of_that_rank() -> None:
    draw = torch.Generator().manual_seed(0)
    mix = torch.rand(8, 8, generator=draw) ** 4
    moments = SpreadMoments(1, 8)
    second = torch.rand(1, 1, 400, 8, generator=draw) @ mix
    variance = torch.rand(1, 1, 400, 8, generator=draw) @ mix.T
    moments.add([0], second, variance)
    right = variance - variance.mean(2, keepdim=True)
    true = second @ right.transpose(-1, -2)

    def error(pair: torch.Tensor) -> float:
        return float(((second @ pair[0]) @ (right @ pair[1]).transpose(-1, -2) - true).norm())

    fitted = error(moments.factors(2))
    assert fitted < error(torch.eye(8)[None, None, :, :2].expand(2, 1, -1, -1))
    for seed in range(5):
        basis = torch.linalg.qr(torch.randn(8, 2, generator=torch.Generator().manual_seed(seed))).Q
        assert fitted < error(basis[None, None].expand(2, 1, -1, -1))
