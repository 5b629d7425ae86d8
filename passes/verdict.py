"""Verdicts: rewrite a site, or leave it and say why. Pure functions of what was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..kernels.cost_model import Forecast
from ..kernels.executors import Answer
from .dead import is_live, takes_output
from .given import Given
from .layers import Layer, matches
from .layout import SiteLayout
from .masks import KeyValidity
from .reasons import Reason, Refusal
from .sites import Site
from .sizes import hint
from .token_map import TokenMap

_LEAST_DENSITY = 0.05
"""Where less than this has to be kept for sparse to be faster, the video is too short."""


@dataclass(frozen=True)
class Policy:
    """What the user and the sidecar decide.

    given: the grids the user names, by option or `attach`. dense_layers: the option of this name.
    min_tokens: video tokens below which a site stays dense, where `forecast` does not decide that.
    verify: can the executor run (device type, dtype, head_dim)? plan: a refusal if there is no plan
    for (layer, heads, head_dim, heads proven). forecast: what to expect of a site that could run
    sparse, None where nothing is known; None where the user has decided by tokens.
    """

    given: Given | None
    dense_layers: tuple[str | int, ...]
    min_tokens: Callable[[str], int]
    verify: Callable[[str, torch.dtype, int, int], Answer]
    plan: Callable[[Layer, int, int, bool], Refusal | None]
    forecast: Forecasting | None = None


@dataclass(frozen=True)
class Dimensions:
    """Hints of a site's sizes.

    dtype: what the attention computes in; operands of another dtype are cast (autocast does so).
    heads_proven: the call's heads are the layer's heads, in order. mismatch: what keeps the
    operands from being one plain attention call, or None.
    """

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    keys: int
    head_dim: int
    dtype: torch.dtype
    device: str
    requires_grad: bool
    heads_proven: bool
    mismatch: str | None


Forecasting = Callable[[Layer, Dimensions, SiteLayout], Forecast | None]
"""What to expect of a site; None where nothing is known."""


def judge_identity(site: Site, tokens: TokenMap | None, unknown: Sequence[str]) -> Refusal | None:
    """Is it self-attention at all?"""
    if site.oddity is not None:
        return Refusal(Reason.PLAIN_SOFTMAX, site.oddity)
    if site.structure is not None and (
        tokens is None or not tokens.content or not tokens.paired or not tokens.asked
    ):
        return site.structure
    names = ", ".join(sorted(unknown)[:5])
    if tokens is not None and tokens.apart and (tokens.tokens == 1 or not names):
        return Refusal(Reason.CROSS_ATTENTION)
    if tokens is None or not tokens.content or not (tokens.asked or not names):
        return Refusal(Reason.NO_PROVENANCE, f"not followed: {names}" if names else "")
    if not tokens.paired:
        broken = "k and v enter apart: the graph breaks between projections and attention"
        return Refusal(Reason.NO_PROVENANCE, f"not followed: {names}" if names else broken)
    if not tokens.same:
        return Refusal(Reason.TOKENS_DIFFER if tokens.shared else Reason.CROSS_ATTENTION)
    if tokens.by_head:
        return Refusal(Reason.TOKEN_ORDER, "another order in every head")
    if tokens.by_batch:
        return Refusal(Reason.TOKEN_ORDER, "another order in every batch element")
    return None


def judge_call(
    site: Site,
    layout: SiteLayout | Refusal,
    mask: KeyValidity | str | None,
    dims: Dimensions,
    policy: Policy,
) -> Refusal | None:
    """Can this self-attention run sparse as it is called?"""
    few = policy.min_tokens(dims.device)
    if isinstance(layout, Refusal):
        if layout.reason is Reason.NO_GRID and _too_short(dims, policy.given):
            return Refusal(Reason.TEXT_ONLY, f"{dims.tokens} tokens cannot hold {policy.given}")
        if layout.reason is Reason.NO_GRID and dims.tokens < few:
            return Refusal(Reason.TOO_FEW_TOKENS, f"{dims.tokens} tokens, break-even {few}")
        return layout
    if dims.mismatch is not None:
        return Refusal(Reason.PLAIN_SOFTMAX, dims.mismatch)
    if site.causal:
        return Refusal(Reason.CAUSAL)
    if site.dropout > 0.0:
        return Refusal(Reason.DROPOUT, f"p = {site.dropout}")
    if site.structure is not None:
        return site.structure
    parted = _parted_video(site, layout, dims)
    if parted is not None:
        return Refusal(Reason.SEGMENTS, parted)
    if isinstance(mask, str):
        return Refusal(Reason.MASK_NOT_A_KEY_LENGTH, mask)
    if site.output_first and _other_outputs_used(site):
        return Refusal(Reason.OUTPUT_USED)
    if dims.requires_grad:
        return Refusal(Reason.REQUIRES_GRAD)
    video = sum(run.length for run in layout.videos)
    if policy.forecast is None and video < few:
        return _too_few(video, few)
    answer = policy.verify(dims.device, dims.dtype, dims.head_dim, video)
    if not answer.ok:
        usual = policy.verify(dims.device, dims.dtype, 64, video)
        return Refusal(Reason.HEAD_DIM if usual.ok else Reason.DTYPE, answer.reason)
    return None


def _parted_video(site: Site, layout: SiteLayout, dims: Dimensions) -> str | None:
    """Says so where the segment of padding may reach into the video. No more than a matter of
    worth: rows of the padding are exact whatever they are."""
    padding = None if site.segments is None else site.segments.padding
    if padding is None:
        return None
    first = dims.tokens - (padding if isinstance(padding, int) else hint(padding.size))
    last = max(run.stop for run in layout.videos)
    return None if first >= last else f"they part at token {first} of a video that ends at {last}"


def _too_short(dims: Dimensions, given: Given | None) -> bool:
    """Whether a video of the grid that was measured is longer than all samples of the call; they
    may be its windows. A grid that a user names may be a mistake, which must not pass for this."""
    return given is not None and given.measured and dims.batch * dims.keys < given.tokens


def judge_layer(layer: Layer, index: int, dims: Dimensions, policy: Policy) -> Refusal | None:
    """Does the user, or the sidecar, want this layer sparse?"""
    if matches(layer.name, index, policy.dense_layers):
        return Refusal(Reason.DENSE_LAYER)
    return policy.plan(layer, dims.heads, dims.head_dim, dims.heads_proven)


def judge_gain(
    layer: Layer, layout: SiteLayout, dims: Dimensions, policy: Policy
) -> tuple[Forecast | None, Refusal | None]:
    """Is it to be faster sparse? For sites that nothing else keeps dense.

    Decided once, by the sizes and plans at hand while the graph is compiled: a graph with dynamic
    sizes keeps the verdict of the first ones.
    """
    if policy.forecast is None:
        return None, None
    video, few = sum(run.length for run in layout.videos), policy.min_tokens(dims.device)
    expected = policy.forecast(layer, dims, layout)
    if expected is None:
        return None, _too_few(video, few) if video < few else None
    if expected.worth:
        return expected, None
    told = f"{video} video tokens: sparse is predicted to run at {expected.gain:.2f}x of dense"
    if not expected.measured:
        told += ", a guess, as nothing was measured on such a device"
    if expected.most_kept < _LEAST_DENSITY:
        return expected, Refusal(Reason.TOO_FEW_TOKENS, told)
    return expected, Refusal(
        Reason.DENSITY_TOO_HIGH,
        told,
        f"keep less, options={{'density': {_rounded_down(expected.most_kept)}}} at most, or go "
        "sparse all the same by options={'min_tokens': 0}",
    )


def _too_few(video: int, few: int) -> Refusal:
    return Refusal(Reason.TOO_FEW_TOKENS, f"{video} video tokens, break-even {few}")


def _rounded_down(share: float) -> float:
    return math.floor(100 * share) / 100


def _other_outputs_used(site: Site) -> bool:
    return any(is_live(user) for user in site.node.users if not takes_output(user))
