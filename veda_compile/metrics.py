"""How far one video clip is from another: PSNR, SSIM and temporal difference error.

`bootstrap_interval` tells how sure a mean over clips is.

Clips are (B, C, T, H, W): batch, channels, frames, height, width. Values are compared as given;
clamp what a screen would clamp before calling. All sums run in float32, or in float64 where the
clips are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .errors import VedaError

SSIM_WINDOW = 11
"""Side of the SSIM window in pixels (Wang et al. 2004, section III-C)."""

SSIM_SIGMA = 1.5
"""Standard deviation of the SSIM window in pixels."""

_K1, _K2 = 0.01, 0.03


class MetricError(VedaError, ValueError):
    """Clips that cannot be compared."""


def psnr(a: torch.Tensor, b: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Peak signal-to-noise ratio of each clip, in dB: 10 log10(data_range^2 / mean squared error).

    The error is averaged over a whole clip, not frame by frame.

    Args:
        a: (B, C, T, H, W), floating point.
        b: as a.
        data_range: largest value minus smallest value a pixel can have; 2 for [-1, 1].

    Returns:
        (B,); infinite where a clip equals the other.

    Raises:
        MetricError: the clips do not go together, or data_range is not positive.
    """
    a, b = _pair(a, b, data_range)
    error = (a - b).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(data_range * data_range / error)


def ssim(a: torch.Tensor, b: torch.Tensor, data_range: float = 2.0) -> torch.Tensor:
    """Structural similarity of each clip, mean over its frames, channels and window places.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to
    structural similarity", 2004, equation 13, with its Gaussian window of 11 x 11 pixels. Windows
    lie inside the frame: nothing is padded.

    Args:
        a: (B, C, T, H, W), floating point, H and W at least `SSIM_WINDOW`.
        b: as a.
        data_range: as for `psnr`.

    Returns:
        (B,), at most 1; 1 where a clip equals the other.

    Raises:
        MetricError: as `psnr`, or the frames are smaller than the window.
    """
    a, b = _pair(a, b, data_range)
    height, width = a.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise MetricError(
            f"frames of {height} x {width} pixels: SSIM needs at least {SSIM_WINDOW} x "
            f"{SSIM_WINDOW}; use psnr for smaller ones"
        )
    window = _gaussian(a.dtype, a.device)
    frames_a, frames_b = (x.reshape(-1, 1, height, width) for x in (a, b))
    mean_a, mean_b = _blur(frames_a, window), _blur(frames_b, window)
    var_a = _blur(frames_a.square(), window) - mean_a.square()
    var_b = _blur(frames_b.square(), window) - mean_b.square()
    cov = _blur(frames_a * frames_b, window) - mean_a * mean_b
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    luminance = (2.0 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2.0 * cov + c2) / (var_a + var_b + c2)
    return (luminance * structure).reshape(a.shape[0], -1).mean(dim=1)


def temporal_difference_error(a: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """How much the motion of each clip departs from the reference's, flicker included.

    Root mean square of (a[t+1] - a[t]) - (reference[t+1] - reference[t]) over a clip. An error
    that stands still from frame to frame does not count; one that comes and goes does.

    Args:
        a: (B, C, T, H, W), floating point, T at least 2.
        reference: as a.

    Returns:
        (B,), in the units of the pixels; 0 where both clips move alike.

    Raises:
        MetricError: the clips do not go together, or have a single frame.
    """
    a, reference = _pair(a, reference)
    if a.shape[2] < 2:
        raise MetricError(f"clips of {a.shape[2]} frame: temporal differences need at least 2")
    # differences are linear: those of the error are the error of those
    change = (a - reference).diff(dim=2)
    return change.square().flatten(1).mean(dim=1).sqrt()


def bootstrap_interval(
    values: torch.Tensor,
    baseline: torch.Tensor | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """An interval for the mean over clips, by the percentile bootstrap.

    Clips are drawn with replacement, `resamples` times; the interval holds the middle share
    `confidence` of the means (Efron and Tibshirani, "An introduction to the bootstrap", 1993,
    chapter 13). With a baseline it is the mean of the differences, clip by clip: pair them by seed,
    and what makes a clip hard for both drops out. With few clips the interval is too narrow.

    Args:
        values: (B,), finite, one for each clip.
        baseline: (B,), those of the same clips from something else, or None.
        confidence: share of the means within the interval, between 0 and 1.
        resamples: how many means are drawn.
        seed: the same seed draws the same clips.

    Returns:
        (low, high), in the units of the values.

    Raises:
        MetricError: not one finite value per clip, or confidence or resamples out of range.
    """
    for x in (values,) if baseline is None else (values, baseline):
        if x.dim() != 1 or x.shape != values.shape or not len(x) or not bool(x.isfinite().all()):
            raise MetricError(
                f"values of shape {tuple(x.shape)}: must be (B,), finite and at least one, the "
                "baseline's as many"
            )
    if not 0.0 < confidence < 1.0 or resamples < 1:
        raise MetricError(
            f"confidence {confidence} and resamples {resamples}: must be between 0 and 1, and at "
            "least 1"
        )
    sample = values.double().cpu()
    if baseline is not None:
        sample = sample - baseline.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(sample), (resamples, len(sample)), generator=generator)
    outside = (1.0 - confidence) / 2.0
    ends = torch.tensor([outside, 1.0 - outside], dtype=torch.float64)
    low, high = sample[drawn].mean(dim=1).quantile(ends).tolist()
    return low, high


def _pair(
    a: torch.Tensor, b: torch.Tensor, data_range: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both clips in one dtype fit for sums."""
    for x in (a, b):
        if x.dim() != 5 or 0 in x.shape:
            raise MetricError(
                f"a clip of shape {tuple(x.shape)}: must be (B, C, T, H, W), no side 0; "
                "add the missing axes"
            )
        if not x.is_floating_point():
            raise MetricError(f"a clip of {x.dtype}: must be floating point, such as x.float()")
    if a.shape != b.shape:
        raise MetricError(
            f"clips of shapes {tuple(a.shape)} and {tuple(b.shape)}: must have the same shape"
        )
    if not data_range > 0.0:
        raise MetricError(f"data_range {data_range}: must be above 0; 2 for pixels in [-1, 1]")
    both = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(both), b.to(both)


def _gaussian(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(SSIM_WINDOW,) weights that add up to 1."""
    place = torch.arange(SSIM_WINDOW, dtype=dtype, device=device) - SSIM_WINDOW // 2
    weights = torch.exp(-place.square() / (2.0 * SSIM_SIGMA * SSIM_SIGMA))
    return weights / weights.sum()


def _blur(frames: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """(N, 1, H - 10, W - 10) weighted means; the 2-D window is the product of two 1-D ones."""
    rows = F.conv2d(frames, window.view(1, 1, -1, 1))
    return F.conv2d(rows, window.view(1, 1, 1, -1))
