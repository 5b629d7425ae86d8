"""The sizes of an attention call, as hints for the verdict and as the graph has them."""

from __future__ import annotations

import torch

from .layers import Layer
from .sites import Operand, Site
from .sizes import Size, example_tensor, hint
from .verdict import Dimensions


def dimensions(site: Site, layer: Layer) -> Dimensions | None:
    """Hints of the site's sizes; None if an operand is not one tensor of the expected rank."""
    operands = (site.q, site.k, site.v)
    tensors = [example_tensor(operand.node) for operand in operands]
    for operand, tensor in zip(operands, tensors, strict=True):
        if tensor is None or tensor.dim() != len(operand.axes) or "n" not in operand.axes:
            return None
    q, k, v = tensors
    assert q is not None and k is not None and v is not None

    def side(tensor: torch.Tensor, operand: Operand, letter: str) -> int:
        if letter not in operand.axes:
            return operand.samples if letter == "b" else 1
        size = hint(tensor.shape[operand.axes.index(letter)])
        return size // operand.samples if letter == "n" else size

    mismatch = None
    for letter, name in (("b", "batch"), ("n", "tokens"), ("d", "head_dim")):
        sides = [side(tensor, operand, letter) for tensor, operand in
                 ((q, site.q), (k, site.k), (v, site.v))]  # fmt: skip
        if letter == "n":  # the token map tells whether q has a part of the tokens
            sides = sides[1:]
        if len(set(sides)) > 1:
            mismatch = f"{name} of q, k, v: {sides}"
    heads = [side(t, operand, "h") for t, operand in ((q, site.q), (k, site.k), (v, site.v))]
    if heads[1] != heads[2] or heads[0] % heads[1]:
        mismatch = f"heads of q, k, v: {heads}"
    head_dim = side(q, site.q, "d")
    if site.projections is not None:
        heads, head_dim = [site.projections.heads] * 3, site.projections.head_dim
    return Dimensions(
        side(q, site.q, "b"),
        heads[0],
        heads[1],
        side(q, site.q, "n"),
        side(k, site.k, "n"),
        head_dim,
        _computing_dtype(site, q, k, v),
        q.device.type,
        torch.is_grad_enabled()
        and any(t.requires_grad for t in (*tensors, *_weights(site)) if t is not None),
        ("h" in site.q.axes or site.projections is not None)
        and (not site.calls or layer.name is not None),
        mismatch,
    )


def token_size(operand: Operand) -> Size:
    """The tokens of one sample of an operand of known rank."""
    tensor = example_tensor(operand.node)
    assert tensor is not None
    tokens = tensor.shape[operand.axes.index("n")]
    return tokens if operand.samples == 1 else tokens // operand.samples


def is_symbolic(site: Site) -> bool:
    """Whether the graph leaves open how many tokens there are."""
    return any(isinstance(token_size(operand), torch.SymInt) for operand in (site.q, site.k))


def _weights(site: Site) -> list[torch.Tensor | None]:
    """The weights of a call that projects its operands itself."""
    return [] if site.projections is None else [example_tensor(x) for x in site.projections.nodes]


def _computing_dtype(site: Site, *operands: torch.Tensor) -> torch.dtype:
    """The dtype of the attention itself.

    Fused attention returns what it computes in, and under autocast casts its operands to it.
    Written-out attention computes in the widest of its operands' dtypes.
    """
    result = site.first_output()
    if site.fused and result is not None:
        return result.dtype
    widest = operands[0].dtype
    for operand in operands[1:]:
        widest = torch.promote_types(widest, operand.dtype)
    return widest
