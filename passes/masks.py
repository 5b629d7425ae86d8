"""Masks: padding of keys becomes key validity instead of an N x N tensor.

Any mask that provably lets the queries of one set attend to the keys of one set is understood; the
proof is by the operations that make the mask, so it holds whatever values it will have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch

from .logit_mask import LogitMask
from .mask_values import MaskValues
from .sites import Site
from .sizes import Size, equal, example_tensor, expression
from .truth import Predicate, Table, Unproven, combine, sides
from .writes import Writes

_ADDED = -9e8
"""Added to a logit, this or less leaves a weight of exactly 0 beside an attended key. In float32 it
also swallows the logit, so that where no key is attended to all weigh the same."""
_SET = -1e8
"""A logit of this or less has a weight of exactly 0 beside any real one."""


class Nothing(Enum):
    """What a query that attends to no key gets."""

    ZEROS = "zeros"
    MEAN = "the mean of all values"
    NAN = "not a number"


@dataclass(frozen=True, eq=False)
class KeyValidity:
    """A mask that is "this query counts and this key counts".

    keys, queries: None where all count. nothing: the output of a query that does not count, and of
    every query where no key counts.
    """

    keys: Predicate | None
    queries: Predicate | None
    nothing: Nothing


def key_validity(site: Site, queries: Size, keys: Size, writes: Writes) -> KeyValidity | str | None:
    """None where nothing is masked, a KeyValidity where the masks are proven one, else what they
    are. queries, keys: their numbers. writes: those of the site's graph."""
    if not site.masks:
        return None
    values = MaskValues(site.node, writes)
    holds: Table | None = None
    hidden: set[float] = set()
    for mask in site.masks:
        tensor = example_tensor(mask.node)
        if tensor is None:
            return "a mask that is not one tensor"
        shape = f"{tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")
        kind = "a mask" if tensor.dtype == torch.bool else "an additive mask"
        try:
            attended, values_hidden = _attended(values, mask, tensor, {"q": queries, "k": keys})
            holds = attended if holds is None else _both(holds, attended)
        except Unproven as reason:
            return f"{kind} {shape}: {reason}"
        hidden |= values_hidden
    assert holds is not None
    found = sides(holds)
    if found is None:
        return f"a mask {shape} that differs from query to query"
    asking, seen = found
    if asking.never or seen.never:
        return f"a mask {shape} that hides everything"
    if asking.always and seen.always:
        return None
    nothing = _nothing(hidden, site)
    if nothing is None:
        return f"masks that hide keys by different values: {sorted(hidden)}"
    return KeyValidity(None if seen.always else seen, None if asking.always else asking, nothing)


def _attended(
    values: MaskValues, mask: LogitMask, tensor: torch.Tensor, tokens: dict[str, Size]
) -> tuple[Table, set[float]]:
    """Where the mask lets queries attend, and the values that hide the other keys."""
    roles = mask.roles
    if tensor.dim() > len(roles):
        raise Unproven("it has more sides than the logits")
    own = tuple(
        "" if isinstance(size, int) and size == 1 else role
        for size, role in zip(tensor.shape, roles[len(roles) - tensor.dim() :], strict=True)
    )
    for size, role in zip(tensor.shape, own, strict=True):
        if role in tokens and not equal(expression(size), expression(tokens[role])):
            raise Unproven(f"it is made for {size} tokens, not {tokens[role]}")
    table = values.table(mask.node, own)
    if mask.hides is not None:
        if not mask.hides <= _SET:
            raise Unproven(f"it sets logits to {mask.hides:g}")
        shown = table if mask.shown_where else combine([table], torch.bool, torch.logical_not)
        return shown, {mask.hides} if bool((~shown.values).any()) else set()
    offsets = {float(x) * mask.factor for x in table.values.flatten().tolist()}
    hidden = {x for x in offsets if x != 0.0}
    if any(math.isnan(x) or x > _ADDED for x in hidden):
        shown_values = ", ".join(f"{x:g}" for x in sorted(hidden))
        raise Unproven(f"it adds {shown_values} to the logits")
    return combine([table], torch.bool, lambda x: x == 0), hidden


def _both(a: Table, b: Table) -> Table:
    return combine([a, b], torch.bool, torch.logical_and)


def _nothing(hidden: set[float], site: Site) -> Nothing | None:
    if hidden <= {-math.inf}:
        return Nothing.ZEROS if site.fused else Nothing.NAN
    # every logit is this one number: the weights are equal
    return Nothing.MEAN if len(hidden) == 1 else None
