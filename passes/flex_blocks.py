"""Block masks that `create_block_mask` makes in the graph, from masks indexed by token.

flex_attention skips blocks that are not listed, and its mask function only enters blocks that are
listed as partial. So the lists must be proven to come from that very function: the graph is held
against the steps by which torch makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .operations import operation_name
from .sizes import Size, equal, example_tensor, expression

_ROLES = ("b", "h", "q", "k")
"""What the four arguments of a mask function count."""
_AND = frozenset({"and_", "__and__", "logical_and", "bitwise_and"})


@dataclass(frozen=True)
class Indexed:
    """A boolean tensor that is read once per pair of tokens. roles: what each side is indexed by;
    "" for a side of size 1."""

    node: fx.Node
    roles: tuple[str, ...]


def indexed_masks(body: fx.GraphModule, captured: Sequence[object]) -> list[Indexed] | None:
    """The masks all of which must be true by a mask function; None if it is more than that.

    captured: the outer graph's nodes for what the function takes beyond its four indices.
    """
    placeholders = body.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(_ROLES) + len(captured):
        return None
    role_of = dict(zip(placeholders, _ROLES, strict=False))
    outer = dict(zip(placeholders[len(_ROLES) :], captured, strict=True))
    return _read(_returned(body), lambda x: role_of.get(x), lambda x: outer.get(x))


def lists_all_of(
    block_mask: Sequence[Any], masks: Sequence[Indexed], q: fx.Node, k: fx.Node
) -> fx.Node | None:
    """The node at which the masks were read to list the blocks; None if that is not proven."""
    counts, places, full_counts, full_places = block_mask[2:6]
    block = block_mask[-3] * block_mask[-2]
    partial, full = _listed(counts, places), _listed(full_counts, full_places)
    if partial is None or full is None or not _calls(partial, "and_"):
        return None
    if not (_calls(full, "eq") or _calls(full, "__eq__")):  # the latter before torch 2.13
        return None
    shown = full.args[0]
    more, less = partial.args
    bounded = (
        _calls(more, "gt")
        and _calls(less, "lt")
        and more.args == (shown, 0)
        and less.args == (shown, block)
        and full.args[1] == block
    )
    dense = _blocked(shown, block_mask[-3], block_mask[-2]) if bounded else None
    return None if dense is None else _read_everywhere(dense, masks, q, k)


def _listed(counts: Any, places: Any) -> Any:
    """Which blocks a pair of lists shows: the counts of a row, and its places in order."""
    count, order = _without_casts(counts), _without_casts(places)
    if not _calls(count, "sum") or not _calls(order, "argsort"):
        return None
    wanted = {"dim": -1, "descending": True, "stable": True}
    if count.kwargs != {"dim": -1} or order.kwargs != wanted or count.args != order.args:
        return None
    return _without_casts(count.args[0])


def _blocked(shown: Any, rows: int, columns: int) -> fx.Node | None:
    """The (B, H, Nq, Nk) mask whose true elements are counted per block."""
    if not _calls(shown, "sum") or shown.kwargs != {"dim": [-2, -1]}:
        return None
    moved = shown.args[0]
    if not _calls(moved, "permute") or moved.args[1:] != (0, 1, 2, 4, 3, 5):
        return None
    parted = moved.args[0]
    if not _calls(parted, "view") or (parted.args[4], parted.args[6]) != (rows, columns):
        return None
    mask = parted.args[0]
    if _calls(mask, "pad"):
        widths = mask.args[1]
        plain = mask.args[2:] in ((), ("constant",), ("constant", None)) and not mask.kwargs
        if not plain or not isinstance(widths, (tuple, list)) or len(widths) != 4:
            return None
        if (widths[0], widths[2]) != (0, 0):  # what is added behind hides, and hides nothing there
            return None
        mask = mask.args[0]
    return mask if isinstance(mask, fx.Node) else None


def _read_everywhere(
    dense: fx.Node, masks: Sequence[Indexed], q: fx.Node, k: fx.Node
) -> fx.Node | None:
    """The node whose value, mapped over all indices, is `dense`, if it reads the same masks."""
    queries, keys = example_tensor(q), example_tensor(k)
    if queries is None or keys is None:
        return None
    levels: dict[object, str] = {}
    inner: Any = dense
    for role in _ROLES:
        if not _calls(inner, "_remove_batch_dim") or inner.args[3] != 0:
            return None
        levels[inner.args[1]] = role
        inner = inner.args[0]
    sizes: dict[str, Size] = {"b": queries.shape[0], "q": queries.shape[2], "k": keys.shape[2]}

    def role_of(x: Any) -> str | None:
        if not _calls(x, "_add_batch_dim") or x.args[1] != 0:
            return None
        role = levels.get(x.args[2])
        return role if role is not None and _counts_to(x.args[0], sizes.get(role)) else None

    found = _read(inner, role_of, lambda x: x if _holds_booleans(x) else None)
    return inner if found == list(masks) and isinstance(inner, fx.Node) else None


def _counts_to(node: Any, size: Size | None) -> bool:
    """Whether a node is 0, 1, ... below a size. None: any; of heads only the first is asked, and
    masks that differ from head to head are none of keys."""
    if not _calls(node, "arange") or set(node.kwargs) - {"device", "dtype"}:
        return False
    start, end = (0, *node.args)[-2:]
    if len(node.args) > 2 or start != 0:
        return False
    value = end.meta.get("example_value") if isinstance(end, fx.Node) else end
    if not isinstance(value, (int, torch.SymInt)):
        return False
    return size is None or equal(expression(value), expression(size))


def _read(
    node: object, role_of: Callable[[Any], str | None], tensor_of: Callable[[Any], object]
) -> list[Indexed] | None:
    """The masks that a value is the conjunction of."""
    if not isinstance(node, fx.Node):
        return None
    subject: Any
    index: Any
    name = operation_name(node) if node.op in ("call_function", "call_method") else ""
    if name in _AND and not node.kwargs:
        parts = [_read(arg, role_of, tensor_of) for arg in node.args]
        flat = [mask for part in parts if part is not None for mask in part]
        return None if None in parts else flat
    if name not in ("getitem", "index"):
        return None
    subject, index = tensor_of(node.args[0]), node.args[1]
    if not isinstance(subject, fx.Node) or not _holds_booleans(subject):
        return None
    items = index if isinstance(index, (tuple, list)) else [index]
    tensor = example_tensor(subject)
    assert tensor is not None
    if len(items) != tensor.dim():
        return None
    roles = []
    for item, size in zip(items, tensor.shape, strict=True):
        first = type(item) is int and item == 0 and isinstance(size, int) and size == 1
        role = "" if first else role_of(item)
        if role is None:
            return None
        roles.append(role)
    named = [role for role in roles if role]
    return [Indexed(subject, tuple(roles))] if len(set(named)) == len(named) else None


def _holds_booleans(node: object) -> bool:
    tensor = example_tensor(node)
    return tensor is not None and tensor.dtype == torch.bool


def _returned(body: fx.GraphModule) -> object:
    value = body.graph.output_node().args[0]
    return value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value


def _without_casts(node: Any) -> Any:
    """What was cast to other integers. Of those that are too small, only booleans are cast."""
    while _calls(node, "to") and (tensor := example_tensor(node)) is not None:
        wide = tensor.dtype in (torch.int32, torch.int64)
        if not wide and not (tensor.dtype == torch.int8 and _holds_booleans(node.args[0])):
            break
        node = node.args[0]
    return node


def _calls(node: Any, name: str) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op in ("call_function", "call_method")
        and operation_name(node) == name
    )
