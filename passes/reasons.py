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
    NO_GRID = "self-attention whose T x H x W token grid the graph does not show"
    NO_PROVENANCE = "the tokens of q, k and v could not be followed through the graph"
    TOKENS_DIFFER = "queries and keys share tokens, but are not the same tokens in one order"
    GRID_CONTRADICTED = "two sources of evidence, or the option `grid`, disagree about the grid"
    TOKEN_ORDER = "the video tokens are not in raster order"
    UNPROVEN_SIZES = "the grid is known but not as an expression of the graph's symbolic sizes"
    CAUSAL = "causal attention"
    MASK_NOT_A_KEY_LENGTH = "the mask is more than padding of keys"
    BLOCK_MASK = "flex_attention with a BlockMask that may hide tokens from each other"
    SEGMENTS = "packed attention whose segments are not proven to be whole samples and padding"
    DROPOUT = "attention dropout is on"
    PLAIN_SOFTMAX = "more than plain softmax attention"
    OUTPUT_USED = "the log-sum-exp or another extra output of the attention op is used"
    HEAD_DIM = "the executor does not take this head_dim"
    DTYPE = "the executor does not take this dtype or device"
    TOO_FEW_TOKENS = "too short a video: dense attention is faster here"
    DENSITY_TOO_HIGH = "so much is kept that dense attention is faster here"
    DENSE_LAYER = "named in option `dense_layers`"
    NO_PLAN = "the sidecar knows this layer's siblings but not this layer"
    LAYER_UNKNOWN = "the layer cannot be told, and the sidecar's plans differ from layer to layer"
    REQUIRES_GRAD = "gradients are needed, and the sparse op has none"
    HEAD_SPLIT_UNPROVEN = "which heads this call holds is not proven"

    @property
    def remedy(self) -> str | None:
        """What the user can change to have such a call sparse; None where nothing is amiss."""
        return _REMEDIES.get(self.name)


HARMLESS = frozenset(
    {
        Reason.CROSS_ATTENTION,
        Reason.TEXT_ONLY,
        Reason.ONE_FRAME,
        Reason.TOO_FEW_TOKENS,
        Reason.DENSITY_TOO_HIGH,
        Reason.DENSE_LAYER,
    }
)
"""Reasons `strict=True` accepts: nothing to gain, or the user's own choice."""


@dataclass(frozen=True)
class Refusal:
    """A reason with what was seen here: names, numbers, shapes.

    advice: what helps here, where that is more than what the reason says by itself.
    """

    reason: Reason
    detail: str = ""
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.reason.value} ({self.detail})" if self.detail else self.reason.value

    @property
    def remedy(self) -> str | None:
        """What the user can change, if anything."""
        return self.advice or self.reason.remedy


_GIVE_GRID = (
    "give options=dict(grid=(T, H, W)) in tokens, or call veda_compile.attach(model) before the "
    "first call, on what torch.compile returns where it compiles the whole model"
)
_SAY_WHICH_LAYER = (
    "compile the whole model with torch.compile, or make the sidecar anew with weights whose "
    "small parameters (norms, biases) differ from layer to layer; where the graph breaks within "
    "the layer (TORCH_LOGS=graph_breaks shows it), keep projections and attention in one graph"
)
_REMEDIES = {
    "NO_GRID": _GIVE_GRID,
    "NO_PROVENANCE": "the report's `unknown` names the operations that were not followed: write "
    "them with plain torch operations; where the graph breaks (TORCH_LOGS=graph_breaks shows it), "
    "keep projections and attention in one graph, or let neither eager code nor "
    "torch.inference_mode come between them",
    "TOKENS_DIFFER": "compile the whole model instead of its blocks; where it attends to parts of "
    "the sequence, nothing helps",
    "GRID_CONTRADICTED": "leave out option `grid`, or correct it: it counts tokens after "
    "patching, (frames, height, width)",
    "TOKEN_ORDER": "hand the tokens over in raster order (frame by frame, row by row), the same in "
    "every head and batch element",
    "UNPROVEN_SIZES": "compile with dynamic=False, or call veda_compile.attach(model) before the "
    "first call, on what torch.compile returns where it compiles the whole model",
    "MASK_NOT_A_KEY_LENGTH": "where it is padding, give it as a boolean mask of shape "
    "(B, 1, 1, keys), or none where nothing is hidden",
    "BLOCK_MASK": "give flex_attention no block_mask where nothing is to be hidden; padding is "
    "understood where create_block_mask runs in the compiled graph with a mask_mod that only looks "
    "up boolean tensors, and under scaled_dot_product_attention, with a boolean mask",
    "SEGMENTS": "make cu_seqlens in the graph that attends, from sizes and a mask of the text "
    "(compile the whole model, not its blocks), or use another attention backend, with the padding "
    "as a boolean mask of shape (B, 1, 1, keys)",
    "DROPOUT": "call model.eval()",
    "HEAD_DIM": "choose another executor with options={'executor': ...}",
    "DTYPE": "run the model in bfloat16 or float16, on a device of the executor, or choose "
    "another executor with options={'executor': ...}",
    "TOO_FEW_TOKENS": "options={'min_tokens': 0} goes sparse all the same",
    "DENSITY_TOO_HIGH": "keep less by option `density`, or go sparse all the same by "
    "options={'min_tokens': 0}",
    "DENSE_LAYER": "take the layer out of option `dense_layers`",
    "NO_PLAN": "make the sidecar anew for this model, so that it has a plan for every layer",
    "LAYER_UNKNOWN": _SAY_WHICH_LAYER,
    "HEAD_SPLIT_UNPROVEN": "compile without the sidecar, or with all heads in one attention call",
    "REQUIRES_GRAD": "run under torch.no_grad() or torch.inference_mode()",
}
