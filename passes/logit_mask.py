"""What keeps queries from keys, as a graph has it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True, eq=False)
class LogitMask:
    """A tensor that keeps queries from keys.

    roles: what the sides of the logits are, "b" batch, "h" heads, "q" queries, "k" keys; the node
        broadcasts to them. hides: what a boolean mask sets the other logits to, None where the
        tensor is added to the logits. shown_where: the boolean that stands for "may attend".
    factor: of an added tensor, where the sum is scaled.
    """

    node: fx.Node
    roles: tuple[str, ...]
    hides: float | None
    shown_where: bool = True
    factor: float = 1.0
