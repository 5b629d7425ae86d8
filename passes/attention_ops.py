"""A registry of attention custom ops: which argument means what.

Ops are known by qualified name, so that none of their packages is imported. Arguments that are not
named here must hold their neutral value; otherwise the call is more than plain attention and stays
as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx
from torch._library.custom_ops import CustomOpDef

from .compute import attention
from .movement import Rule, Value
from .sizes import example_tensor, expression

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "window_size": (None, (-1, -1), [-1, -1]),
    "window_size_left": (None, -1),
    "window_size_right": (None, -1),
    "softcap": (None, 0, 0.0),
    "alibi_slopes": (None,),
    "block_table": (None,),
    "leftpad_k": (None,),
    "seqused_k": (None,),
    "seqused_q": (None,),
    "attention_chunk": (None, 0),
    "qv": (None,),
    "q_descale": (None,),
    "k_descale": (None,),
    "v_descale": (None,),
    "bias": (None,),
    "custom_mask_type": (None, 0),
}
"""Values that leave attention plain, for arguments that can change it."""


@dataclass(frozen=True)
class AttentionOp:
    """How to read one attention op.

    name: "namespace::op". axes: sides of q, k, v and the output (see `Operand`). The other fields
    name arguments. output_first: the op returns a tuple that starts with the output.
    packed: (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) of a varlen op.
    """

    name: str
    axes: str = "bnhd"
    q: str = "q"
    k: str = "k"
    v: str = "v"
    scale: str | None = "softmax_scale"
    causal: str | None = "causal"
    dropout: str | None = None
    mask: str | None = None
    output_first: bool = True
    packed: tuple[str, str, str, str] | None = None


_VARLEN = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")

_REGISTRY: dict[str, AttentionOp] = {
    op.name: op
    for op in (
        AttentionOp("flash_attn::_flash_attn_forward", dropout="dropout_p"),
        AttentionOp("flash_attn::_flash_attn_varlen_forward", axes="nhd", dropout="dropout_p",
                    packed=_VARLEN),
        AttentionOp("flash_attn_3::_flash_attn_forward"),
        AttentionOp("_diffusers_flash_attn_3::_flash_attn_forward"),
        AttentionOp("xformers_flash::flash_fwd", q="query", k="key", v="value", causal="is_causal",
                    dropout="p"),
        AttentionOp("xformers::efficient_attention_forward_cutlass", q="query", k="key", v="value",
                    scale="scale", causal=None, mask="attn_bias", dropout="dropout_p"),
    )
}  # fmt: skip


def register_attention_op(op: AttentionOp) -> None:
    """Teach the pass a custom attention op. Raises ValueError if the name is taken."""
    if op.name in _REGISTRY:
        raise ValueError(f"attention op {op.name!r} is registered already")
    _REGISTRY[op.name] = op


def provenance_rules() -> dict[str, Rule]:
    """How token codes pass through every known op, by qualified name."""

    def rule(op: AttentionOp, out: Any, *args: Any, **kwargs: Any) -> Value:
        space, name = op.name.split("::")
        target = getattr(getattr(torch.ops, space), name)
        given = dict(zip(_argument_names(target), args, strict=False)) | kwargs
        return attention(out, given[op.q], given[op.k], given[op.v])

    return {op.name: partial(rule, op) for op in _REGISTRY.values()}


def find_op(node: fx.Node) -> AttentionOp | None:
    """The registry entry of the op that `node` calls."""
    if node.op != "call_function":
        return None
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _REGISTRY.get(target._schema.name)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _REGISTRY.get(target._qualified_op_name)
    if isinstance(target, CustomOpDef):
        return _REGISTRY.get(target._qualname)
    return None


@dataclass(frozen=True, eq=False)
class OpCall:
    """The arguments of one call, by meaning. oddity: what makes it more than plain attention."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None = None
    scale: float | None = None
    causal: bool = False
    dropout: float = 0.0
    oddity: str | None = field(default=None)


def arguments(op: AttentionOp, node: fx.Node) -> OpCall:
    """Read a call of `op` by the names of its schema."""
    given = _bound(node)
    used = {op.q, op.k, op.v, op.scale, op.causal, op.dropout, op.mask, *(op.packed or ())}
    odd = [
        name
        for name, value in given.items()
        if name not in used and name in _NEUTRAL and value not in _NEUTRAL[name]
    ]
    scalars = {name: given.get(name) if name else None for name in (op.scale, op.causal,
                                                                    op.dropout)}  # fmt: skip
    odd += [str(name) for name, value in scalars.items() if isinstance(value, fx.Node)]
    oddity = f"argument {odd[0]} = {given[odd[0]]}" if odd else None
    if op.packed and oddity is None and not _one_segment(op, node, given):
        oddity = "a packed sequence that is not provably one segment"
    mask = given.get(op.mask) if op.mask else None
    scale = scalars[op.scale] if op.scale else None
    return OpCall(
        given[op.q],
        given[op.k],
        given[op.v],
        mask if isinstance(mask, fx.Node) else None,
        None if scale is None or isinstance(scale, fx.Node) else float(scale),
        bool(scalars[op.causal]) if op.causal else False,
        float(scalars[op.dropout] or 0.0) if op.dropout and not oddity else 0.0,
        oddity,
    )


def _bound(node: fx.Node) -> dict[str, Any]:
    return dict(zip(_argument_names(node.target), node.args, strict=False)) | node.kwargs


def _argument_names(target: object) -> list[str]:
    if isinstance(target, CustomOpDef):
        target = target._opoverload
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    assert isinstance(target, torch._ops.OpOverload)
    return [argument.name for argument in target._schema.arguments]


def _one_segment(op: AttentionOp, node: fx.Node, given: dict[str, Any]) -> bool:
    """One segment as long as the whole tensor: two bounds, and a longest segment of all tokens."""
    assert op.packed is not None
    for bounds, longest, operand in ((0, 2, op.q), (1, 3, op.k)):
        offsets = example_tensor(given[op.packed[bounds]])
        tensor = example_tensor(given[operand])
        length = given[op.packed[longest]]
        if isinstance(length, fx.Node):
            length = length.meta.get("example_value")
        if offsets is None or tensor is None or not isinstance(length, (int, torch.SymInt)):
            return False
        tokens = tensor.shape[op.axes.index("n")]
        if tuple(offsets.shape) != (2,) or expression(length) != expression(tokens):
            return False
    return True
