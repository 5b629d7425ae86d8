"""Video metrics against values worked out by hand."""

import math
from typing import Any

import pytest
import torch

from veda_compile.metrics import (
    MetricError,
    bootstrap_interval,
    psnr,
    ssim,
    temporal_difference_error,
)


def clip(batch: int = 2, frames: int = 3, height: int = 16, width: int = 20) -> torch.Tensor:
    gen = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, frames, height, width, generator=gen) * 2 - 1


def naive_ssim(a: torch.Tensor, b: torch.Tensor, data_range: float) -> float:
    """One image (H, W), window by window, from the definition."""
    side, sigma = 11, 1.5
    weight = torch.tensor(
        [
            [math.exp(-((y - 5) ** 2 + (x - 5) ** 2) / (2 * sigma**2)) for x in range(side)]
            for y in range(side)
        ],
        dtype=torch.float64,
    )
    weight /= weight.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for y in range(a.shape[0] - side + 1):
        for x in range(a.shape[1] - side + 1):
            p = a[y : y + side, x : x + side].double()
            q = b[y : y + side, x : x + side].double()
            mp, mq = float((weight * p).sum()), float((weight * q).sum())
            vp = float((weight * (p - mp) ** 2).sum())
            vq = float((weight * (q - mq) ** 2).sum())
            cov = float((weight * (p - mp) * (q - mq)).sum())
            values.append(
                (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
            )
    return sum(values) / len(values)


def test_equal_clips_are_perfect():
    a = clip()
    assert torch.isinf(psnr(a, a)).all()
    torch.testing.assert_close(ssim(a, a), torch.ones(2))
    assert torch.equal(temporal_difference_error(a, a), torch.zeros(2))


@pytest.mark.parametrize(
    ("error", "data_range", "expected"),
    [(0.2, 2.0, 20.0), (0.02, 2.0, 40.0), (0.1, 1.0, 20.0), (25.5, 255.0, 20.0)],
)
def test_psnr_of_a_known_error(error, data_range, expected):
    a = clip().double()
    sign = torch.where(torch.rand(a.shape, generator=torch.Generator().manual_seed(1)) < 0.5, 1, -1)
    torch.testing.assert_close(
        psnr(a, a + error * sign, data_range), torch.full((2,), expected, dtype=torch.float64)
    )


def test_psnr_is_one_number_per_clip_over_all_its_frames():
    a = clip(frames=4)
    b = a.clone()
    b[1, :, 0] += 0.2  # a quarter of the frames: a quarter of the squared error
    found = psnr(a, b)
    assert torch.isinf(found[0])
    assert float(found[1]) == pytest.approx(20 + 10 * math.log10(4), abs=1e-4)


def test_psnr_of_gaussian_noise():
    a = torch.zeros(1, 3, 8, 64, 64)
    noise = 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(2))
    assert float(psnr(a, noise)) == pytest.approx(10 * math.log10(4 / 0.01), abs=0.1)


def test_ssim_is_that_of_the_definition():
    a = clip(1, 1, 14, 13)
    b = a + 0.3 * torch.randn(a.shape, generator=torch.Generator().manual_seed(3))
    expected = sum(naive_ssim(a[0, c, 0], b[0, c, 0], 2.0) for c in range(3)) / 3
    assert float(ssim(a, b)) == pytest.approx(expected, abs=1e-5)
    assert expected < 0.99


def test_ssim_takes_each_frame_by_itself_and_averages():
    a = clip(1, 2)
    b = a + 0.3 * torch.randn(a.shape, generator=torch.Generator().manual_seed(4))
    each = [float(ssim(a[:, :, t : t + 1], b[:, :, t : t + 1])) for t in range(2)]
    assert float(ssim(a, b)) == pytest.approx(sum(each) / 2, abs=1e-6)


def test_ssim_of_flat_frames_is_the_luminance_term():
    a, b = torch.full((1, 3, 1, 11, 11), 0.5), torch.full((1, 3, 1, 11, 11), 0.25)
    c1 = 0.02**2
    expected = (2 * 0.5 * 0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    assert float(ssim(a, b)) == pytest.approx(expected, abs=1e-4)


def test_ssim_does_not_depend_on_the_unit_of_the_pixels():
    a = clip().double()
    b = a + 0.2 * torch.randn(a.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(ssim(a, b, 2.0), ssim(127.5 * a, 127.5 * b, 255.0))


def test_ssim_works_on_a_frame_of_just_one_window_and_refuses_less():
    a = clip(1, 1, 11, 11)
    expected = sum(naive_ssim(a[0, c, 0], 1 - a[0, c, 0], 2.0) for c in range(3)) / 3
    assert float(ssim(a, 1 - a)) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(MetricError, match=r"10 x 32 pixels.*at least 11 x 11"):
        ssim(clip(1, 1, 10, 32), clip(1, 1, 10, 32))


def test_temporal_difference_error_sees_flicker_but_no_standing_error():
    a = clip(frames=4)
    torch.testing.assert_close(temporal_difference_error(a + 0.3, a), torch.zeros(2), atol=1e-6,
                               rtol=0)  # fmt: skip
    flicker = a + 0.1 * torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 1, 4, 1, 1)
    torch.testing.assert_close(temporal_difference_error(flicker, a), torch.full((2,), 0.2))


def test_temporal_difference_error_of_one_bright_frame():
    a = clip(1, 3)
    b = a.clone()
    b[:, :, 2] += 0.5  # of two differences one is off by 0.5
    found = float(temporal_difference_error(b, a))
    assert found == pytest.approx(0.5 / math.sqrt(2), abs=1e-6)


def test_low_precision_clips_are_compared_in_float32():
    a = clip().bfloat16()
    assert psnr(a, a + 0.125).dtype == torch.float32
    assert ssim(a, a.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(3, 4, 16, 16), torch.zeros(3, 4, 16, 16), r"\(3, 4, 16, 16\)"),
        (torch.zeros(1, 3, 4, 16, 16), torch.zeros(1, 3, 4, 16, 18), "same shape"),
        (torch.zeros(1, 3, 0, 16, 16), torch.zeros(1, 3, 0, 16, 16), "no side 0"),
        (torch.zeros(1, 3, 4, 16, 16, dtype=torch.uint8),) * 2 + ("uint8",),
    ],
)
@pytest.mark.parametrize("metric", [psnr, ssim, temporal_difference_error])
def test_clips_that_cannot_be_compared(metric, a, b, message):
    with pytest.raises(MetricError, match=message):
        metric(a, b)


def test_other_bad_arguments():
    a = clip()
    with pytest.raises(MetricError, match=r"data_range 0\.0"):
        psnr(a, a, data_range=0.0)
    with pytest.raises(MetricError, match="1 frame"):
        temporal_difference_error(a[:, :, :1], a[:, :, :1])


class TestBootstrap:
    def test_the_interval_is_that_of_the_mean(self) -> None:
        gen = torch.Generator().manual_seed(0)
        values = torch.randn(400, generator=gen) * 2 + 5
        low, high = bootstrap_interval(values)
        mean, error = float(values.mean()), float(values.std()) / 20
        assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
        assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
        narrow = bootstrap_interval(values, confidence=0.5)
        assert low < narrow[0] < narrow[1] < high

    def test_pairs_take_out_what_both_share(self) -> None:
        gen = torch.Generator().manual_seed(0)
        hard = torch.randn(50, generator=gen) * 10
        noise = torch.randn(50, generator=gen) * 0.01
        low, high = bootstrap_interval(hard + 1 + noise, hard)
        assert 0.99 < low < 1 < high < 1.01

    def test_the_seed_decides(self) -> None:
        values = clip().flatten()[:20]
        assert bootstrap_interval(values) == bootstrap_interval(values)
        assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
        assert bootstrap_interval(torch.tensor([3.0])) == (3.0, 3.0)

    @pytest.mark.parametrize(
        ("values", "given"),
        [
            (torch.ones(0), {}),
            (torch.ones(2, 2), {}),
            (torch.tensor([1.0, float("inf")]), {}),
            (torch.ones(3), {"baseline": torch.ones(2)}),
            (torch.ones(3), {"confidence": 1.0}),
            (torch.ones(3), {"resamples": 0}),
        ],
    )
    def test_bad_values_are_refused(self, values: torch.Tensor, given: dict[str, Any]) -> None:
        with pytest.raises(MetricError):
            bootstrap_interval(values, **given)
