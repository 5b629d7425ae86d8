"""Why an attention call stays dense, and what a user can do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Reason(Enum):
    """Why a site was left as it was. The value is the sentence the report prints."""

    CROSS_ATTENTION = "queries and keys are different tokens (cross-attention)"
    TEXT_ONLY = "self-attention over tokens without a T x H x W grid (text, audio, ...)"
    FACTORISED = "spatial and temporal attention are separate calls; each is short already"
    ONE_FRAME = "self-attention over one frame, not over a video"
    NO_GRID = "self-attention whose token grid the graph does not show; option grid=(T, H, W) can"
    NO_PROVENANCE = "the tokens of q, k and v could not be followed through the graph"
    GRID_CONTRADICTED = "two sources of evidence, or the option `grid`, disagree about the grid"
    TOKEN_ORDER = "the video tokens are not in raster order"
    UNPROVEN_SIZES = "the grid is known but not as an expression of the graph's symbolic sizes"
    CAUSAL = "causal attention"
    MASK_NOT_A_KEY_LENGTH = "the mask is more than padding of keys"
    DROPOUT = "attention dropout is on"
    PLAIN_SOFTMAX = "more than plain softmax attention"
    OUTPUT_USED = "the log-sum-exp or another extra output of the attention op is used"
    HEAD_DIM = "the executor does not take this head_dim"
    DTYPE = "the executor does not take this dtype or device"
    TOO_FEW_TOKENS = "below `min_tokens`: dense attention is faster here"
    DENSE_LAYER = "named in option `dense_layers`"
    NO_PLAN = "the sidecar knows this layer's siblings but not this layer"
    LAYER_UNKNOWN = "the layer cannot be told, and the sidecar's plans differ from layer to layer"
    REQUIRES_GRAD = "gradients are needed; run under torch.no_grad() or inference_mode()"
    HEAD_SPLIT_UNPROVEN = "which heads this call holds is not proven"


HARMLESS = frozenset(
    {
        Reason.CROSS_ATTENTION,
        Reason.TEXT_ONLY,
        Reason.ONE_FRAME,
        Reason.TOO_FEW_TOKENS,
        Reason.DENSE_LAYER,
    }
)
"""Reasons `strict=True` accepts: nothing to gain, or the user's own choice."""


@dataclass(frozen=True)
class Refusal:
    """A reason with what was seen here: names, numbers, shapes."""

    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value} ({self.detail})" if self.detail else self.reason.value
