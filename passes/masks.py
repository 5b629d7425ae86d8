"""Masks: recognising padding of keys, which becomes key validity instead of an N x N tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from .sites import Site
from .sizes import example_tensor, expression


@dataclass(frozen=True, eq=False)
class KeyValidity:
    """A boolean mask node that holds one row of key validity per batch element.

    axes: which side of the mask is the batch (None: one row for all) and which are the keys.
    """

    node: fx.Node
    batch_axis: int | None
    key_axis: int


def key_validity(site: Site, tokens: object) -> KeyValidity | str | None:
    """None without a mask, a KeyValidity where the mask is one by its shape, else what it is.

    A boolean mask whose head and query sides are 1 treats every query alike: it is key validity by
    definition, whatever its values.
    """
    if site.mask is None:
        return None
    mask = example_tensor(site.mask)
    if mask is None:
        return "a mask that is not one tensor"
    shape = f"{tuple(mask.shape)} {mask.dtype}".replace("torch.", "")
    if mask.dtype != torch.bool:
        return f"an additive mask {shape}"
    if mask.dim() < 2 or mask.dim() > 4:
        return f"a mask {shape}"
    ones = [d for d in range(mask.dim()) if isinstance(mask.shape[d], int) and mask.shape[d] == 1]
    alike = [d for d in (mask.dim() - 3, mask.dim() - 2) if d >= 0]
    if any(d not in ones for d in alike):
        return f"a mask {shape} that differs between queries or heads"
    keys = mask.shape[-1]
    if isinstance(tokens, (int, torch.SymInt)) and expression(keys) != expression(tokens):
        return f"a mask {shape} for another number of keys than {tokens}"
    batch_axis = 0 if mask.dim() == 4 and 0 not in ones else None
    return KeyValidity(site.mask, batch_axis, mask.dim() - 1)
