"""The score weights of a sidecar, projections and factors: what they must be, and equal ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .errors import SidecarError, shown
from .kernels.plan import Plan
from .sidecar_schema import LayerCard, projection_shape

Factors = tuple[torch.Tensor | None, ...]
"""Per layer (2, heads, head_dim, r) float32 on CPU, as `Plan` takes it, or None; () for none."""


def check_projections(
    layers: Sequence[LayerCard], score: str, projections: Sequence[torch.Tensor]
) -> None:
    """Raise SidecarError unless there is one per layer with score "projection", else none."""
    wanted = len(layers) if score == "projection" else 0
    if len(projections) != wanted:
        raise SidecarError(
            f"{len(projections)} projections with score {score!r} and "
            f"{len(layers)} layers: must be {wanted}"
        )
    for card, tensor in zip(layers, projections, strict=False):
        _check(f"projection of layer {card.name}", tensor, projection_shape(card))


def check_factors(layers: Sequence[LayerCard], score: str, factors: Factors) -> None:
    """Raise SidecarError unless there are none, or per layer a tensor or None."""
    if not isinstance(factors, tuple) or len(factors) not in (0, len(layers)):
        count = len(factors) if isinstance(factors, tuple) else shown(factors)
        raise SidecarError(
            f"factors for {count} of {len(layers)} layers: must be a tuple with a tensor or None "
            "for each layer, or ()"
        )
    if factors and score == "mean":
        raise SidecarError("factors with score 'mean', which has no use for them: leave them out")
    for card, tensor in zip(layers, factors, strict=False):
        if tensor is None:
            continue
        what = f"factors of layer {card.name}"
        rank = tensor.shape[-1] if isinstance(tensor, torch.Tensor) and tensor.dim() == 4 else 0
        if isinstance(tensor, torch.Tensor) and not 1 <= rank <= card.head_dim:
            raise SidecarError(
                f"{what} have shape {tuple(tensor.shape)}: must be (2, {card.heads}, "
                f"{card.head_dim}, r) with r from 1 to {card.head_dim}"
            )
        _check(what, tensor, (2, card.heads, card.head_dim, rank))


def _check(what: str, tensor: object, must: tuple[int, ...]) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise SidecarError(f"{what} is {shown(tensor)}: must be a Tensor")
    if tuple(tensor.shape) != must or tensor.dtype != torch.float32:
        raise SidecarError(
            f"{what} is {tensor.dtype} of shape {tuple(tensor.shape)}: must be torch.float32 of "
            f"shape {must}"
        )
    if tensor.device.type != "cpu":
        raise SidecarError(f"{what} is on {tensor.device}: move it to the CPU")
    if not bool(torch.isfinite(tensor).all()):
        raise SidecarError(f"{what} holds NaN or infinity: calibrate it again")


def same_weights(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Whether all are equal; None equals None alone."""
    first = tensors[0] if tensors else None
    if first is None:
        return all(tensor is None for tensor in tensors)
    return all(tensor is not None and torch.equal(first, tensor) for tensor in tensors)


def common_rank(layers: Sequence[LayerCard], factors: Factors, head_dim: int) -> int:
    """The rank in which every layer of this head_dim can have its factors; 0 if none has any.

    A compiled graph that serves many layers takes factors of one shape. A layer without factors
    has those of its whole second-order term, which are of rank head_dim.
    """
    ranks = [
        None if tensor is None else tensor.shape[3]
        for card, tensor in zip(layers, factors, strict=False)
        if card.head_dim == head_dim
    ]
    known = [rank for rank in ranks if rank is not None]
    return 0 if not known else head_dim if len(known) < len(ranks) else max(known)


def factors_of_rank(plan: Plan, head_dim: int, rank: int) -> torch.Tensor:
    """The factors of a plan as (2, heads, head_dim, rank), contiguous, with the same scores."""
    if plan.factors is None:
        whole = torch.eye(head_dim, rank, device="cpu")
        return whole.expand(2, plan.heads, -1, -1).contiguous()
    padded = torch.nn.functional.pad(plan.factors, (0, rank - plan.factors.shape[3]))
    return padded.contiguous()
